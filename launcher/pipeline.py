"""A pipeline as jobs: one per stage, each waiting for those it stands behind."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.inventory import Node
from cluster.spec import Group
from launcher import ways
from launcher.errors import Wrong
from launcher.groups import GroupDraft, Member
from launcher.index import Index
from launcher.needs import Need, check_carried, check_references, of_words
from launcher.stages import Request
from launcher.submit import Draft, check_name, draft, new_id

if TYPE_CHECKING:
    from configs.load import Stage
    from configs.pipeline import Member as Entry


def pipeline_named(request: Request) -> Stage | None:
    """The stage file of a pipeline; None for every other request, also for one that is mistaken otherwise."""
    from configs.load import list_stages, load_stage

    if request.stage is None or request.stage not in list_stages(request.start):
        return None
    stage = load_stage(request.stage, request.start)
    return stage if stage.spec.pipeline is not None else None


def draft_pipeline(index: Index, stage: Stage, request: Request, carry: bool) -> GroupDraft:
    """Every stage resolved and its node asked. Raises what `submit.draft` raises, and Refused for an edge that no
    machine can hold (unless `carry`: this client does).
    """
    from configs.pipeline import load_pipeline

    _check(request, stage)
    check_name(index, request.name, request.start)
    entries = load_pipeline(stage, request.config, list(request.sets), request.start)
    drafts: dict[str, Draft] = {}
    for entry in entries:
        drafts[entry.label] = draft(index, of_entry(request, entry, drafts))
    name = request.name or new_id(stage.name)
    stem = new_id(request.name) if request.name else name
    begun = next(iter(drafts.values())).spec.submitted_at
    edges = _Edges()
    members = []
    for position, entry in enumerate(entries):
        one = drafts[entry.label]
        spec = replace(one.spec, id=f"{stem}-{entry.label}", name=f"{name}.{entry.label}", submitted_at=begun,
                       group=Group(name, "pipeline", entry.label, len(entries), position))
        outer = of_words(index, request.after, one.node, request.start) if not entry.after else []
        needs = [*edges.of(entry, drafts), *outer]
        names = {drafts[label].spec.token: label for label in drafts} | {need.key: need.label for need in outer}
        check_carried(f"{entry.label} on {one.node.name}", needs, names, carry)
        check_references(one.config, needs)
        given = entry.sets[len(entry.entry.set) + len(entry.entry.takes):]
        members.append(Member(entry.label, replace(one, spec=spec), tuple(needs), given))
    notes = tuple(note for one in drafts.values() for note in one.notes)
    return GroupDraft(name, "pipeline", tuple(members), request.start, notes=notes)


def _check(request: Request, stage: Stage) -> None:
    if request.sweeps or request.parallel is not None:
        raise Wrong(f"--sweep: {stage.name} is a pipeline; a sweep is over one stage")
    if request.no_wait:
        raise Wrong(f"--no-wait: {stage.name} is a pipeline; its stages wait for each other")
    if request.resume != "auto":
        raise Wrong(f"--resume: {stage.name} is a pipeline; each of its stages goes on from its own checkpoints",
                    hint="launch restart PIPELINE.STAGE begins one again")


def of_entry(request: Request, entry: Entry, before: dict[str, Draft]) -> Request:
    """What is asked of one stage: the pipeline's file goes over what was asked of all. `--node any` is looked for
    once."""
    from configs.fields import parse_duration

    own = entry.entry
    node = own.node or request.node
    if node == "any" and before:
        node = next(iter(before.values())).node.name
    return replace(
        request, works=tuple((label, one.spec.cost.work) for label, one in before.items() if one.spec.cost),
        stage=entry.stage.name, config=entry.config, sets=entry.sets, name=None, after=(), node=node,
        nodes=request.nodes if own.nodes is None else own.nodes,
        gpus=request.gpus if own.gpus is None else own.gpus,
        time_s=parse_duration(own.time) if own.time else request.time_s)


class _Edges:
    """How stages can wait for each other; two nodes are asked once about each other."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], ways.Way] = {}

    def of(self, entry: Entry, drafts: dict[str, Draft]) -> list[Need]:
        return [Need(drafts[label].spec.token, label, entry.entry.any,
                     self._way(drafts[label].node, drafts[entry.label].node)) for label in entry.after]

    def _way(self, giver: Node, taker: Node) -> ways.Way:
        pair = (giver.name, taker.name)
        if pair not in self._known:
            self._known[pair] = ways.between(giver, taker)
        return self._known[pair]
