"""Restarting a job with what follows from it, or what has failed of a sweep or a pipeline."""
from __future__ import annotations

import json
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
         other: Elsewhere = SAME, command: Sequence[str] = ()) -> Again:
    """Raises Wrong, Refused, ConfigError and ClusterError."""
    jobs = find_all(index, word)
    reconcile.refresh(index, [job for job in jobs if not job.ended], start)
    jobs = [index.with_key(job.key) or job for job in jobs]
    chosen = jobs if len(jobs) == 1 else _failed(jobs, word)
    if sets and len(chosen) > 1 and (chosen[0].view.get("group") or {}).get("kind") == "pipeline":
        raise Wrong(f"--set: {word} is a pipeline", hint=f"say which stage: launch restart {chosen[0].name} --set …")
    if other != SAME or command:
        if len(chosen) > 1:
            raise Wrong(f"--node, --gpus, --time and -- CMD are for one job, {word} is {len(chosen)}",
                        hint=f"say which: launch restart {chosen[0].name or chosen[0].id} …")
        return Again((plan_restart(index, chosen[0].id, sets, fresh_code, start, other, command),))
    plans = [_chosen(index, job, sets, fresh_code, start) for job in chosen]
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
    if sets or fresh_code or job.view.get("state") != "COMPLETED" or job.view.get("by_hand"):
        return plan_restart(index, job.id, sets, fresh_code, start)
    if (job.view.get("group") or {}).get("kind") == "pipeline":
        return _anew(index, job, start)
    if _spec(job, start).resume_rule.kind != "none":
        raise Refused(f"{job.id} has completed: from its last checkpoint on there is nothing left to do", job.node,
                      f"give it more to do: launch restart {job.id} --set …   or begin anew: launch submit …")
    return plan_restart(index, job.id, sets, fresh_code, start)


def _anew(index: Index, job: Job, start: Path) -> RestartPlan:
    """One that completed with what it took over before begins from the start, not from its own checkpoints."""
    found = plan_restart(index, job.id, (), False, start)
    if job.view.get("state") != "COMPLETED":
        return found
    return replace(found, spec=replace(_spec(job, start), resume="never"))


def _spec(job: Job, start: Path) -> JobSpec:
    shown = node_and_backend(job, start)[1].show(job.run_dir)
    return JobSpec.from_json(json.dumps(shown["spec"]).encode())
