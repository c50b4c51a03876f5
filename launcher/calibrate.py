"""`launch submit … --dry-run --calibrate`: the same jobs with a few steps each, where they would run and supervised as
ever. What they take is measured as for every job; their run directories are removed.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.spec import RestartPolicy
from launcher import api
from launcher.errors import Failed, Interrupted, Wrong
from launcher.groups import GroupDraft
from launcher.index import open_index
from launcher.jobs import JobStatus, find_all, status_of
from launcher.submit import Draft

if TYPE_CHECKING:
    from configs.load import Resolved
    from launcher.stages import Request


def calibrate(request: Request, tell: Callable[[str], None]) -> None:
    """Raises Wrong for what cannot be measured so, Failed when one of the jobs fails (that one is kept)."""
    if not request.stage or request.sweeps or request.after:
        raise Wrong("--calibrate: measures a stage or a pipeline as it stands, no command, no --sweep, no --after")
    ready = api.draft(_shortened(request), carry=True)
    drafts = [member.draft for member in ready.members] if isinstance(ready, GroupDraft) else [ready]
    if unknown := [one.spec.stage for one in drafts if one.spec.cost is None]:
        raise Wrong(f"--calibrate: nobody knows what makes a step of {', '.join(unknown)}: its run file has no schema")
    name = _send(ready)
    tell(f"{name} runs a few steps to be measured: " + ", ".join(
        f"{one.spec.stage} {one.spec.cost.steps or ''}".rstrip() for one in drafts if one.spec.cost))
    try:
        ended = api.wait([name], tell=tell, start=request.start)
    except KeyboardInterrupt:
        api.kill([name], now=True, start=request.start)
        _remove(_jobs(name), request.start)
        raise Interrupted("\nthe calibration was ended and removed") from None
    failed = [job for job in ended if job.state not in ("COMPLETED", "CANCELLED")]
    _remove([job for job in ended if job not in failed], request.start)
    if failed:
        job = failed[0]
        raise Failed(f"the calibration failed: {job.id} {job.state}: {job.detail or job.reason}",
                     hint=f"it is kept to be looked at: launch logs {job.id}")


def _shortened(request: Request) -> Request:
    from configs.costs import calibration_sets
    from configs.load import load_run, load_stage
    from configs.pipeline import load_pipeline

    start, given = request.start, list(request.sets)
    stage = load_stage(request.stage or "", start)
    more: list[str] = []
    if stage.spec.pipeline is None:
        run = load_run(stage, request.config, given, start)
        more = calibration_sets(run, _ranks(request.gpus, stage.spec.kind, run))
    else:
        for member in load_pipeline(stage, request.config, given, start):
            run = load_run(member.stage, member.config, list(member.sets), start)
            gpus = request.gpus if member.entry.gpus is None else member.entry.gpus
            more += [f"{member.label}.{one}"
                     for one in calibration_sets(run, _ranks(gpus, member.stage.spec.kind, run))]
    return replace(request, sets=(*given, *more), name=None, resume="auto" if stage.spec.pipeline else "never")


def _ranks(gpus: int | None, kind: str, run: Resolved) -> int:
    asked = gpus if gpus is not None else run.resources.gpus
    return (asked if isinstance(asked, int) and asked else run.resources.procs) if kind == "torchrun" else 1


def _send(ready: Draft | GroupDraft) -> str:
    """-> the name of all of it."""
    if isinstance(ready, Draft):
        return api.send(_marked(ready)).id
    members = tuple(replace(member, draft=_marked(member.draft)) for member in ready.members)
    api.send_group(replace(ready, members=members))
    return ready.id


def _marked(one: Draft) -> Draft:
    assert one.spec.cost
    cost = replace(one.spec.cost, calibration=True)
    return replace(one, spec=replace(one.spec, cost=cost, restart=RestartPolicy(0)))


def _jobs(name: str) -> list[JobStatus]:
    with open_index() as index:
        return [status_of(job) for job in find_all(index, name)]


def _remove(jobs: Sequence[JobStatus], start: Path) -> None:
    from launcher.nodes import node_named
    from launcher.reconcile import backend_of

    for node in dict.fromkeys(job.node for job in jobs):
        backend_of(node_named(node, start)).discard([job.run_dir for job in jobs if job.node == node])
    with open_index() as index:
        for job in jobs:
            for known in index.with_id(job.id):
                index.forget(known)
