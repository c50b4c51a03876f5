"""`--sweep a.b=v1,v2`: one job for every combination of values, all with the same code, on one node."""
from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.spec import Group, JobSpec, digest
from launcher import needs, reconcile, stages
from launcher.errors import Refused, Wrong
from launcher.groups import GroupDraft, Member
from launcher.index import Index
from launcher.stages import Request
from launcher.submit import check_name, draft, new_id

if TYPE_CHECKING:
    from launcher.submit import Draft

Point = dict[str, str]  # dotted key -> value, as it was typed
_OPEN, _CLOSE = "[{(", "]})"
_TAKES = ("gpus", "procs", "time_s")  # of a point, which its values may change


def points(sweeps: Sequence[str]) -> list[Point]:
    """The product of all values, the last key varying fastest. Raises Wrong."""
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not key.strip() or not values:
            raise Wrong(f"--sweep {sweep}: must be KEY=V1,V2", hint="example: --sweep training.optimizer.lr=1e-5,5e-6")
        if key in axes:
            raise Wrong(f"--sweep {key}: given twice", hint=f"once with all values: --sweep {key}=…,…")
        axes[key] = split_values(values)
        if doubled := next((one for one in axes[key] if axes[key].count(one) > 1), None):
            raise Wrong(f"--sweep {sweep}: {doubled} stands there twice")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def split_values(text: str) -> list[str]:
    """At the commas outside of brackets and quotes: `[1,2],[3]` are two values. Raises Wrong."""
    found, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not found[-1]:
            quote = character
        else:
            depth += (character in _OPEN) - (character in _CLOSE)
        if character == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += character
    if depth or quote or not all(one.strip() for one in found):
        raise Wrong(f"--sweep …={text}: an empty value, or a bracket or quote that is not closed")
    return [one.strip() for one in found]


def draft_sweep(index: Index, request: Request) -> GroupDraft:
    """Raises what `submit.draft` raises, and Wrong for points that do not go together."""
    if not request.stage:
        raise Wrong("--sweep belongs to a stage; a command is run as it stands")
    check_name(index, request.name, request.start)
    values = points(request.sweeps)
    plain = replace(request, sweeps=(), parallel=None, name=None, after=())
    asked = [replace(plain, sets=(*request.sets, *(f"{key}={value}" for key, value in point.items())))
             for point in values]
    first = draft(index, asked[0])
    drafts = [first, *_derived(first, asked[1:])]
    _check_alike(drafts)
    found = needs.of_words(index, request.after, first.node, request.start)
    if carried := next((need for need in found if need.way.carried), None):
        raise Refused(f"the sweep cannot wait for {carried.label}: {carried.way.carried}",
                      hint=f"submit it once that has ended: launch wait {carried.label} && launch submit …")
    needs.check_references(first.config, found)
    name = request.name or new_id(request.stage)
    stem = new_id(request.name) if request.name else name
    parallel = _parallel(request, first.spec, len(values))
    members = tuple(
        Member(str(number), replace(one, spec=replace(
            one.spec, id=f"{stem}-{number}", name=f"{name}/{number}", submitted_at=first.spec.submitted_at,
            group=Group(name, "sweep", str(number), len(values), number, parallel, point))), tuple(found))
        for number, (one, point) in enumerate(zip(drafts, values)))
    return GroupDraft(name, "sweep", members, request.start, parallel, first.notes)


def _parallel(request: Request, spec: JobSpec, size: int) -> int:
    """A host gives a GPU to one point at a time unless it is told otherwise; a scheduler knows better."""
    default = 1 if spec.gpus and spec.slurm is None else 0
    parallel = default if request.parallel is None else request.parallel
    return 0 if parallel >= size else parallel


def _derived(first: Draft, asked: Sequence[Request]) -> list[Draft]:
    """The other points: each config is resolved by itself, the node is asked once about all their paths."""
    if not asked:
        return []
    node = first.node
    plans = [stages.plan(request, node) for request in asked]
    paths = [stages.paths_of(plan.run, plan.stage, node, request.start) if plan.run and plan.stage
             else stages.NO_PATHS for plan, request in zip(plans, asked)]
    prepared = reconcile.backend_of(node).prepare(stat=[path for one in paths for path in one.asked()])
    for one in paths:
        stages.check_paths(one, prepared["stats"], node)
    found = []
    for plan, one in zip(plans, paths):
        config = stages.config_text(plan.run, one.values, prepared["home"]) if plan.run else None
        takes = {name: getattr(plan.spec, name) for name in _TAKES}
        spec = replace(first.spec, token=os.urandom(16).hex(), **takes,
                       config_digest=digest(config.encode()) if config is not None else None)
        found.append(replace(first, spec=spec, config=config, script=None))
    return found


def _check_alike(drafts: Sequence[Draft]) -> None:
    """On SLURM the points are one array, which asks for the same for each."""
    first = drafts[0].spec
    for one in drafts[1:]:
        if other := next((name for name in _TAKES if getattr(one.spec, name) != getattr(first, name)), None):
            if first.slurm:
                raise Wrong(f"--sweep: the points differ in {other}; on SLURM they are one array, whose jobs all take "
                            "the same")
