"""Restarting a job: what would change, and then the restart itself."""
from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import Unreachable
from cluster.inventory import Node
from cluster.spec import CodeRef, Cost, JobSpec, digest
from launcher import estimates, move as moving, reconcile, snapshot, stages, team
from launcher.control import heard, node_and_backend, whoami
from launcher.errors import Refused, Wrong
from launcher.index import Index, Job
from launcher.jobs import ENDED, find
from launcher.nodes import node_named
from launcher.submit import packed, secret_values

if TYPE_CHECKING:
    from cluster.backends.base import Backend
    from launcher.move import Move


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
    others: tuple[Node, ...] = ()  # the other machines of the same job
    gives_up: str = ""  # what it has now and will not have then
    move: Move | None = None  # to another machine


@dataclass(frozen=True)
class Restarted:
    id: str
    node: str
    attempt: int
    resume_step: int | None
    resume: str | None = None  # the checkpoint's path, when its name says no step
    slurm_id: str | None = None  # it waits in SLURM's queue
    waits: str = ""  # for what other jobs, or for whose GPUs
    anew: bool = False  # by wish not from its checkpoints
    stays: tuple[str, ...] = ()  # what of it is still on the node that it left


@dataclass(frozen=True)
class Elsewhere:
    """What a restart is to have instead of what the job has; None: the same."""

    node: str | None = None
    gpus: int | None = None
    time_s: float | None = None


SAME = Elsewhere()


def plan_restart(index: Index, word: str, sets: Sequence[str], fresh_code: bool, start: Path,
                 other: Elsewhere = SAME, command: Sequence[str] = ()) -> RestartPlan:
    """What a restart would change; `command`: the words it runs from now on, if they are others.

    Raises Wrong, Refused, ConfigError and ClusterError.
    """
    job = find(index, word)
    node, backend = node_and_backend(job, start)
    try:
        shown = backend.show(job.run_dir)
    except Unreachable as error:
        raise (moving.lost(job, error) if other.node else error) from None
    spec = _spec_of(shown, job)
    if other != SAME:
        if sets or fresh_code or command:
            raise Wrong("--node, --gpus and --time keep the job as it is; --set, --fresh-code and -- CMD keep where it "
                        "runs",
                        hint="one restart after the other does both")
        return _plan_elsewhere(job, node, shown, spec, other, start)
    others = tuple(node_named(name, start) for name in spec.hosts[1:])
    if not sets and not fresh_code and not command:
        return RestartPlan(job, node, None, None, None, secret_values(spec), others=others)
    config, changes, cost = (_changed_config(shown, spec, sets, node, backend, start) if sets
                             else (None, (), spec.cost))
    if command:
        spec, changes = _with_words(spec, command)
    code = _fresh_code(spec, start) if fresh_code else None
    spec = replace(spec, code=code.code if code else spec.code, cost=cost,
                   config_digest=digest(config.encode()) if config is not None else spec.config_digest)
    return RestartPlan(job, node, spec, config, code, secret_values(spec), changes, others)


def _plan_elsewhere(job: Job, node: Node, shown: dict[str, Any], spec: JobSpec, other: Elsewhere,
                    start: Path) -> RestartPlan:
    had = spec
    if spec.slurm is not None and other != Elsewhere(node=other.node):
        raise Wrong("--gpus and --time: a restart on SLURM keeps those of its allocation",
                    hint=f"a new job has others: launch submit {spec.stage} --resume {spec.id} …")
    if other.gpus is not None:
        spec = replace(spec, gpus=other.gpus, gpu_share=False)
    if other.time_s is not None:
        spec = replace(spec, time_s=other.time_s)
    if other.node is None:
        return RestartPlan(job, node, spec, None, None, secret_values(spec), gives_up=_given_up(shown, had, spec, None))
    move, spec, config = moving.plan(job, shown, spec, node, other.node, start)
    return RestartPlan(job, node, spec, config, None, secret_values(spec), move=move,
                       gives_up=_given_up(shown, had, spec, move.to))


def _given_up(shown: dict[str, Any], had: JobSpec, spec: JobSpec, to: Node | None) -> str:
    """In words for a person; empty: nothing."""
    if shown["view"]["state"] in ENDED or to is None and had.gpus == spec.gpus:
        return ""
    gpus = f"its {had.gpus} GPU{'s' * (had.gpus > 1)} on {had.node}" if had.gpus else ""
    if to is None:
        return f"{gpus or 'nothing'}, and takes {spec.gpus} when they are free"
    return gpus or f"its place on {had.node}"


def _spec_of(shown: dict[str, Any], job: Job) -> JobSpec:
    if shown["spec"] is None:
        raise Wrong(f"{job.id} was started by hand; launch did not start it and cannot restart it", job.node)
    return JobSpec.from_json(json.dumps(shown["spec"]).encode())


def _changed_config(shown: dict[str, Any], spec: JobSpec, sets: Sequence[str], node: Node, backend: Backend,
                    start: Path) -> tuple[str, tuple[tuple[str, Any, Any], ...], Cost | None]:
    from configs.load import diff, load_stage, resolve_text

    if shown["config"] is None:
        raise Wrong(f"--set: {spec.id} is a command and has no config",
                    hint=f"with other words: launch restart {spec.id} -- {shlex.join(spec.argv)}")
    stage = load_stage(spec.stage, start)
    where = f"config.yaml of {spec.id}"
    old = resolve_text(stage, shown["config"], where, [])
    new = resolve_text(stage, shown["config"], where, list(sets))
    if any(key.split(".")[0] == "resources" for key in new.set_keys):
        raise Wrong("--set resources…: a restart keeps the GPUs and the time of the job",
                    hint=f"other ones: launch restart {spec.id} --gpus N --time T")
    paths = stages.paths_of(new, stage, node, start)
    prepared = backend.prepare(code_digest=None, stat=paths.asked(), python=spec.python)
    stages.check_paths(paths, prepared["stats"], node)
    text = stages.config_text(new, paths.values, prepared["home"])
    changes = tuple(diff(old.data, resolve_text(stage, text, where, []).data))
    return text, changes, estimates.after_change(spec.cost, old, new)


def _with_words(spec: JobSpec, command: Sequence[str]) -> tuple[JobSpec, tuple[tuple[str, Any, Any], ...]]:
    if spec.stage != stages.COMMAND:
        raise Wrong(f"-- {' '.join(command)}: {spec.id} is a stage and has no command of yours",
                    hint=f"its config is changed with --set: launch restart {spec.id} --set KEY=VALUE")
    return replace(spec, argv=tuple(command)), (("command", shlex.join(spec.argv), shlex.join(command)),)


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


def restart(index: Index, plan: RestartPlan, grace_s: float | None,
            progress: moving.Progress = lambda here, total, path: None) -> Restarted:
    """The same job, next attempt, from its last verified checkpoint; blocks until that attempt has begun."""
    job, node, stays = plan.job, plan.node, ()
    if plan.move:
        (job, stays), node = moving.carry_out(index, plan, grace_s, progress), plan.move.to
    backend = reconcile.backend_of(node)
    team.join(plan.others, job.run_dir)
    with packed(plan.code) as code:
        answer = backend.restart(job.run_dir, by=whoami(), grace_s=grace_s, spec=plan.spec, config=plan.config,
                                 secrets=plan.secrets, code=code, released=plan.move is not None)
    for view in backend.status([job.run_dir])["jobs"]:
        heard(index, job, view)
    attempt, step = answer["attempt"], answer["resume_step"]
    if answer["slurm_id"]:
        return Restarted(job.id, job.node, attempt, None, slurm_id=answer["slurm_id"])
    resume = _resumed_from(backend, job, attempt) if step is None else None
    return Restarted(job.id, job.node, attempt, step, resume, waits=answer.get("waits", ""), stays=stays,
                     anew=plan.spec is not None and plan.spec.resume == "never")


def _resumed_from(backend: Backend, job: Job, attempt: int) -> str | None:
    return next((one["resume"] for one in backend.show(job.run_dir)["attempts"] if one["n"] == attempt), None)
