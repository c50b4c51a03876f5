"""Stopping, restarting and waiting for jobs: requests to their nodes, and what came of them."""
from __future__ import annotations

import getpass
import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError
from cluster.inventory import Node
from cluster.spec import CodeRef, JobSpec, digest
from launcher import reconcile, snapshot, stages
from launcher.errors import LaunchError, Refused, Wrong
from launcher.index import Index, Job
from launcher.jobs import JobStatus, find, from_view, status_of
from launcher.logs import LogReader, Which
from launcher.submit import packed, secret_values

if TYPE_CHECKING:
    from cluster.backends.base import Backend

_STREAMS = 8  # at a time and node: a stock sshd takes ten sessions on one connection
_FOREVER_S = 30 * 86400.0


def whoami() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


@dataclass(frozen=True)
class Killed:
    """What a kill did. `error`: it could not be carried through."""

    id: str
    node: str
    state: str = ""
    already: bool = False  # it had ended, or somebody else had asked before
    detail: str = ""
    processes: int = 0  # freed
    gpu_mb: int = 0  # freed
    checkpoint_step: int | None = None
    survivors: tuple[tuple[int, str], ...] = ()  # pid, command
    error: LaunchError | ClusterError | None = None


@dataclass(frozen=True)
class RestartPlan:
    """A restart that was looked at and not yet asked for. `changes`: (dotted key, old, new) of the config."""

    job: Job
    node: Node
    spec: JobSpec | None  # None: as it was
    config: str | None  # None: as it was
    code: snapshot.Snapshot | None
    secrets: dict[str, str] = field(default_factory=dict)
    changes: tuple[tuple[str, Any, Any], ...] = ()


@dataclass(frozen=True)
class Restarted:
    id: str
    node: str
    attempt: int
    resume_step: int | None
    resume: str | None = None  # the checkpoint's path, when its name says no step


def node_and_backend(job: Job, start: Path) -> tuple[Node, Backend]:
    from launcher.nodes import node_named

    node = node_named(job.node, start)
    return node, reconcile.backend_of(node)


def heard(index: Index, job: Job, view: dict[str, Any]) -> JobStatus:
    """Remember what a node just said about a job."""
    fresh = from_view(view, job.node, time.time())
    index.put(fresh)
    return status_of(fresh)


def kill(index: Index, words: Sequence[str], grace_s: float | None, now: bool, start: Path) -> list[Killed]:
    """Stop jobs, all at the same time, each until its end is verified."""
    jobs = {job.key: job for job in (find(index, word) for word in words)}

    def ask(job: Job) -> dict[str, Any]:
        return node_and_backend(job, start)[1].kill(job.run_dir, by=whoami(), grace_s=grace_s, now=now)

    answers = reconcile.ask_all({key: lambda job=job: ask(job) for key, job in jobs.items()}, _FOREVER_S)
    answered = [job for key, job in jobs.items() if not isinstance(answers[key], Exception)]
    reconcile.refresh(index, answered, start)
    return [_killed(jobs[key], answer) for key, answer in answers.items()]


def _killed(job: Job, answer: dict[str, Any] | LaunchError | ClusterError) -> Killed:
    if isinstance(answer, Exception):
        return Killed(job.id, job.node, error=answer)
    freed = answer["freed"]
    return Killed(job.id, job.node, answer["state"], answer["already"], answer["detail"], freed["processes"],
                  freed["gpu_mb"], answer["checkpoint_step"],
                  tuple((one["pid"], one["cmd"]) for one in answer["survivors"]))


def plan_restart(index: Index, word: str, sets: Sequence[str], fresh_code: bool, start: Path) -> RestartPlan:
    """What a restart would change. Raises Wrong, Refused, ConfigError and ClusterError."""
    job = find(index, word)
    node, backend = node_and_backend(job, start)
    shown = backend.show(job.run_dir)
    spec = _spec_of(shown, job)
    if not sets and not fresh_code:
        return RestartPlan(job, node, None, None, None, secret_values(spec))
    config, changes = _changed_config(shown, spec, sets, node, backend, start) if sets else (None, ())
    code = _fresh_code(spec, start) if fresh_code else None
    spec = replace(spec, code=code.code if code else spec.code,
                   config_digest=digest(config.encode()) if config is not None else spec.config_digest)
    return RestartPlan(job, node, spec, config, code, secret_values(spec), changes)


def _spec_of(shown: dict[str, Any], job: Job) -> JobSpec:
    if shown["spec"] is None:
        raise Wrong(f"{job.id} was started by hand; launch did not start it and cannot restart it", job.node)
    return JobSpec.from_json(json.dumps(shown["spec"]).encode())


def _changed_config(shown: dict[str, Any], spec: JobSpec, sets: Sequence[str], node: Node, backend: Backend,
                    start: Path) -> tuple[str, tuple[tuple[str, Any, Any], ...]]:
    from configs.load import diff, load_stage, resolve_text

    if shown["config"] is None:
        raise Wrong(f"--set: {spec.id} is a command and has no config")
    stage = load_stage(spec.stage, start)
    where = f"config.yaml of {spec.id}"
    old = resolve_text(stage, shown["config"], where, [])
    new = resolve_text(stage, shown["config"], where, list(sets))
    if any(key.split(".")[0] == "resources" for key in new.set_keys):
        raise Wrong("--set resources…: a restart keeps the GPUs and the time of the job",
                    hint=f"a new job takes others: launch submit {spec.stage} --resume {spec.id} …")
    paths = stages.paths_of(new, stage, node, start)
    prepared = backend.prepare(code_digest=None, stat=paths.asked(), python=spec.python)
    stages.check_paths(paths, prepared["stats"], node)
    text = stages.config_text(new, paths.values, prepared["home"])
    return text, tuple(diff(old.data, resolve_text(stage, text, where, []).data))


def _fresh_code(spec: JobSpec, start: Path) -> snapshot.Snapshot:
    from configs.load import load_stage

    if spec.resume_rule.kind == "glob" and not (spec.resume_rule.glob or "").startswith(("/", "../")):
        raise Refused(f"--fresh-code: {spec.id} writes its checkpoints into its copy of the code "
                      f"({spec.resume_rule.glob}); they would go with it",
                      hint=f"a new job has the new code: launch submit {spec.stage} --resume PATH, "
                           "the path of the checkpoint on the node")
    if spec.stage != stages.COMMAND:
        return snapshot.take(*stages.code_of(load_stage(spec.stage, start), start))
    if spec.code == CodeRef() or spec.code.digest is None:
        raise Wrong(f"--fresh-code: {spec.id} runs in {spec.cwd} as it is; nothing was copied")
    return snapshot.take(stages.work_tree_or(start))


def restart(index: Index, plan: RestartPlan, grace_s: float | None) -> Restarted:
    """The same job, next attempt, from its last verified checkpoint; blocks until that attempt has begun."""
    backend = reconcile.backend_of(plan.node)
    with packed(plan.code) as code:
        answer = backend.restart(plan.job.run_dir, by=whoami(), grace_s=grace_s, spec=plan.spec,
                                 config=plan.config, secrets=plan.secrets, code=code)
    for view in backend.status([plan.job.run_dir])["jobs"]:
        heard(index, plan.job, view)
    attempt, step = answer["attempt"], answer["resume_step"]
    resume = _resumed_from(backend, plan.job, attempt) if step is None else None
    return Restarted(plan.job.id, plan.job.node, attempt, step, resume)


def _resumed_from(backend: Backend, job: Job, attempt: int) -> str | None:
    return next((one["resume"] for one in backend.show(job.run_dir)["attempts"] if one["n"] == attempt), None)


def wait(index: Index, words: Sequence[str], start: Path) -> list[JobStatus]:
    """Block until every job has ended; their last states in the order given.

    One quiet stream per job: the node speaks as soon as the job has ended, and a lost link is taken up again.
    """
    jobs = {job.key: job for job in (find(index, word) for word in words)}
    room = {node: threading.Semaphore(_STREAMS) for node in {job.node for job in jobs.values()}}

    def watch(job: Job) -> dict[str, Any]:
        with room[job.node]:
            reader = LogReader(node_and_backend(job, start)[1], job.run_dir, Which(ranks=(), follow=True))
            for _ in reader:
                pass
        assert reader.final is not None
        return reader.final

    answers = reconcile.ask_all({key: lambda job=job: watch(job) for key, job in jobs.items()}, _FOREVER_S)
    for answer in answers.values():
        if isinstance(answer, Exception):
            raise answer
    return [heard(index, jobs[key], answer) for key, answer in answers.items()]
