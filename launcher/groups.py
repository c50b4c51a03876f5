"""Several jobs that are submitted as one: the points of a sweep, the stages of a pipeline. All of them, or none."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ClusterError, Unreachable
from cluster.spec import JobSpec
from launcher import clients, reconcile
from launcher.errors import LaunchError, Wrong
from launcher.index import Index, Intent
from launcher.submit import Draft, Submitted, as_job, packed, secret_values

if TYPE_CHECKING:
    from launcher.needs import Need
    from launcher.stages import Request


@dataclass(frozen=True)
class Member:
    """One job of a group. `draft.spec.after` is filled in when the jobs it needs have their names."""

    label: str
    draft: Draft
    needs: tuple[Need, ...] = ()
    sets: tuple[str, ...] = ()  # what the person changed of it

    @property
    def spec(self) -> JobSpec:
        return self.draft.spec

    @property
    def carried(self) -> bool:
        return any(need.way.carried for need in self.needs)


@dataclass(frozen=True)
class GroupDraft:
    """A group that could be submitted now. `kind` job: one whose wait only this client can carry."""

    id: str
    kind: Literal["sweep", "pipeline", "job"]
    members: tuple[Member, ...]
    start: Path  # the directory of the person
    parallel: int = 0  # points at a time; 0: all
    notes: tuple[str, ...] = ()

    @property
    def unset_secrets(self) -> list[str]:
        return list(dict.fromkeys(name for member in self.members for name in member.draft.unset_secrets))

    @property
    def carried(self) -> bool:
        return any(member.carried for member in self.members)


def send_sweep(index: Index, ready: GroupDraft) -> list[Submitted]:
    """All points in one request to their node: it starts all of them or none.

    Raises Unreachable when twice no answer came; the next command finds out what became of them.
    """
    drafts = [replace(member.draft, spec=with_after(index, member)) for member in ready.members]
    node = drafts[0].node
    index.add_intents([Intent(one.spec.token, one.spec.id, one.spec.name, node.name, node.workdir, clients.me(),
                              time.time()) for one in drafts])
    try:
        answers = _ask_twice(drafts, ready.parallel)
    except Unreachable as error:
        raise Unreachable(error.what, error.node, f"whether {ready.id} was started is not known; "
                          "launch status finds out as soon as the node answers") from None
    except (ClusterError, LaunchError):  # the node said no: nothing was started
        index.drop_intents([one.spec.token for one in drafts])
        raise
    index.started(*(as_job(one.spec, node, answer) for one, answer in zip(drafts, answers)))
    return [Submitted(answer["id"], node.name, answer["run_dir"], answer.get("pid"), answer.get("attempt", 0),
                      answer.get("slurm_id")) for answer in answers]


def _ask_twice(drafts: Sequence[Draft], parallel: int) -> list[dict[str, Any]]:
    """The same tokens again are the same jobs."""
    try:
        return _ask(drafts, parallel)
    except Unreachable:
        return _ask(drafts, parallel)


def _ask(drafts: Sequence[Draft], parallel: int) -> list[dict[str, Any]]:
    first = drafts[0]
    with packed(None if first.have_code else first.code) as payload:
        return reconcile.backend_of(first.node).submit_array(
            [one.spec for one in drafts], [one.config for one in drafts], secret_values(first.spec), parallel, payload)


def with_after(index: Index, member: Member) -> JobSpec:
    """The spec with the jobs it waits for, which are known by now."""
    found = [(need, index.with_key(need.key)) for need in member.needs if not need.way.carried]
    return replace(member.spec, after=tuple(need.after(job) for need, job in found if job))


def draft_any(index: Index, request: Request, carry: bool) -> Draft | GroupDraft:
    """What a request comes to: one job, or several. `carry`: this client sees to what no machine can wait for."""
    from launcher import submit

    if request.stage:
        from launcher.pipeline import draft_pipeline, pipeline_named

        if stage := pipeline_named(request):
            return draft_pipeline(index, stage, request, carry)
    if request.sweeps:
        from launcher.sweep import draft_sweep

        return draft_sweep(index, request)
    if request.parallel is not None:
        raise Wrong("--parallel belongs to --sweep: so many of its points at a time")
    one = submit.draft(index, request)
    return _with_needs(index, one, request, carry) if request.after or "${" in (one.config or "") else one


def _with_needs(index: Index, one: Draft, request: Request, carry: bool) -> Draft | GroupDraft:
    from launcher import needs

    found = needs.of_words(index, request.after, one.node, request.start)
    needs.check_references(one.config, found)
    needs.check_carried(f"a job on {one.node.name}", found, {need.key: need.label for need in found}, carry)
    member = Member(one.spec.id, one, tuple(found))
    if member.carried:
        return GroupDraft(one.spec.id, "job", (member,), request.start, notes=one.notes)
    return replace(one, spec=with_after(index, member))
