"""Restarting a job with what follows from it, or what has failed of a sweep or a pipeline."""
from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.events import Reason
from cluster.spec import JobSpec
from launcher import reconcile
from launcher.control import node_and_backend
from launcher.errors import Refused, Wrong
from launcher.index import Index, Job
from launcher.jobs import find_all
from launcher.restart import SAME, Elsewhere, RestartPlan, plan_restart


@dataclass(frozen=True)
class Again:
    """`plans` in the order in which they are restarted; `notes`: what is left alone, and how it would be restarted."""

    plans: tuple[RestartPlan, ...]
    notes: tuple[str, ...] = ()


def plan(index: Index, word: str, sets: Sequence[str], fresh_code: bool, start: Path,
         other: Elsewhere = SAME, command: Sequence[str] = (), anew: bool = False) -> Again:
    """`anew`: not from its checkpoints. Raises Wrong, Refused, ConfigError and ClusterError."""
    jobs = find_all(index, word)
    reconcile.refresh(index, [job for job in jobs if not job.ended], start)
    jobs = [index.with_key(job.key) or job for job in jobs]
    chosen = jobs if len(jobs) == 1 else _failed(jobs, word)
    if sets and len(chosen) > 1 and (chosen[0].view.get("group") or {}).get("kind") == "pipeline":
        raise Wrong(f"--set: {word} is a pipeline", hint=f"say which stage: launch restart {chosen[0].name} --set …")
    if anew and (other != SAME or command):
        raise Wrong("--resume never goes with --set and --fresh-code alone",
                    hint="one restart after the other does both")
    if other != SAME or command:
        if len(chosen) > 1:
            raise Wrong(f"--node, --gpus, --time and -- CMD are for one job, {word} is {len(chosen)}",
                        hint=f"say which: launch restart {chosen[0].name or chosen[0].id} …")
        return Again((plan_restart(index, chosen[0].id, sets, fresh_code, start, other, command),))
    plans = [_from_the_start(index, job, sets, fresh_code, start) if anew else
             _chosen(index, job, sets, fresh_code, start) for job in chosen]
    following, notes = _following(index, chosen)
    plans += [_anew(index, job, start) for job in following]
    return Again(tuple(plans), tuple(notes))


def _failed(jobs: Sequence[Job], word: str) -> list[Job]:
    """What of a group has ended without having completed; those that ended only because of another follow from it."""
    found = [job for job in jobs if job.ended and job.view.get("state") != "COMPLETED" and not _because(job)]
    if not found:
        raise Wrong(f"{word}: none of its {len(jobs)} jobs has failed",
                    hint=f"restart one of them: {', '.join(job.name or job.id for job in jobs[:8])}")
    return found


def _because(job: Job) -> bool:
    """Whether it ended because one that it waited for did not complete."""
    return job.view.get("reason") == Reason.DEPENDENCY.value


def _following(index: Index, begun: Sequence[Job]) -> tuple[list[Job], list[str]]:
    """What waits for these jobs, directly or not: those of the same pipeline that have to run (again), and words
    about the others.
    """
    known = index.all()
    again: list[Job] = []
    notes: list[str] = []
    reached = {job.run_dir for job in begun}
    grown = True
    while grown:
        waiting = [job for job in known if job.run_dir not in reached and reached & set(job.view.get("after") or ())]
        grown = bool(waiting)
        for job in waiting:
            reached.add(job.run_dir)
            same = job.group is not None and any(one.group == job.group for one in begun)
            if same and (_because(job) or job.view.get("state") == "COMPLETED"):
                again.append(job)
            elif note := _left_alone(job):
                notes.append(note)
    return sorted(again, key=lambda job: (job.view.get("group") or {}).get("position", 0)), notes


def _left_alone(job: Job) -> str:
    name, state = job.name or job.id, job.view.get("state")
    if not job.ended:
        return f"{name} waits for it, or runs with what it took over before"
    return f"{name} ended {state} and stays so; afterwards: launch restart {job.id}"


def _chosen(index: Index, job: Job, sets: Sequence[str], fresh_code: bool, start: Path) -> RestartPlan:
    """A stage of a pipeline that completed is run anew. Raises Refused for another job that would find nothing to do.
    """
    if fresh_code or job.view.get("state") != "COMPLETED" or job.view.get("by_hand"):
        return plan_restart(index, job.id, sets, fresh_code, start)
    if sets:
        return _with_more_to_do(plan_restart(index, job.id, sets, fresh_code, start), job, sets)
    if (job.view.get("group") or {}).get("kind") == "pipeline":
        return _anew(index, job, start)
    if _spec(job, start).resume_rule.kind != "none":
        raise Refused(f"{job.id} has completed: from its last checkpoint on there is nothing left to do", job.node,
                      f"give it more to do: launch restart {job.id} --set …   "
                      f"or begin anew: launch restart {job.id} --resume never")
    return plan_restart(index, job.id, sets, fresh_code, start)


def _with_more_to_do(found: RestartPlan, job: Job, sets: Sequence[str]) -> RestartPlan:
    """Raises Refused for one of our trainers whose number of steps stays: its last checkpoint is at its end."""
    if found.spec is None or found.spec.resume_rule.kind != "launch" or found.spec.group is not None:
        return found
    at_its_end = job.view.get("total") and job.view.get("step") == job.view.get("total")
    if at_its_end and not any(key.endswith("steps") for key, _, _ in found.changes):
        again = ["launch", "restart", job.id, "--resume", "never", *(word for one in sets for word in ("--set", one))]
        raise Refused(f"{job.id} has completed: with that, too, nothing is left to do from its last checkpoint on",
                      job.node, f"begin anew: {shlex.join(again)}")
    return found


def _from_the_start(index: Index, job: Job, sets: Sequence[str], fresh_code: bool, start: Path) -> RestartPlan:
    found = plan_restart(index, job.id, sets, fresh_code, start)
    return replace(found, spec=replace(found.spec or _spec(job, start), resume="never"))


def _anew(index: Index, job: Job, start: Path) -> RestartPlan:
    """One that completed with what it took over before begins from the start, not from its own checkpoints."""
    if job.view.get("state") != "COMPLETED":
        return plan_restart(index, job.id, (), False, start)
    return _from_the_start(index, job, (), False, start)


def _spec(job: Job, start: Path) -> JobSpec:
    shown = node_and_backend(job, start)[1].show(job.run_dir)
    return JobSpec.from_json(json.dumps(shown["spec"]).encode())
