"""What is said about several jobs that are submitted or restarted as one."""
from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.node import handover
from launcher import estimates
from launcher.views import age, aligned, lasting, point, visible

if TYPE_CHECKING:
    from launcher.groups import GroupDraft, Member
    from launcher.submit import Submitted


def draft(ready: GroupDraft, command_lines: Sequence[list[list[str]]]) -> str:
    """What `--dry-run` prints: the jobs in their order, what each waits for and takes over, and what it runs."""
    rows = {
        ready.kind: [ready.id, *[""] * (len(ready.members) - 1)],
        "job": [member.label for member in ready.members],
        "point": [visible(point(member.spec.group.point)) if member.spec.group else "" for member in ready.members],
        "stage": [member.spec.stage for member in ready.members],
        "node": [member.draft.node.name for member in ready.members],
        "gpus": [str(member.spec.gpus or "") for member in ready.members],
        "set": [visible(" ".join(member.sets)) for member in ready.members],
        "steps": [_steps(member) for member in ready.members],
        "lasts": [_lasts(member) for member in ready.members],
        "disk": [_disk(member) for member in ready.members],
        "time": [age(member.spec.time_s) if member.spec.time_s else "" for member in ready.members],
        "after": [", ".join(_need(ready, need.key, need.label, need.any) for need in member.needs)
                  for member in ready.members],
        "takes": [", ".join(_taken(member)) for member in ready.members],
    }
    table = aligned({title: cells for title, cells in rows.items() if any(cells)})
    runs = [f"{member.label}: {shlex.join(line)}" for member, lines in zip(ready.members, command_lines)
            for line in lines]
    if ready.kind == "sweep":
        runs = [f"each: {shlex.join(line)}" for line in command_lines[0]]
    parallel = [f"at most {ready.parallel} of {len(ready.members)} run at a time"] if ready.parallel else []
    carried = [f"{member.label} is submitted by this computer: {need.way.carried}"
               for member in ready.members for need in member.needs if need.way.carried]
    return "\n".join([table, "", *runs, *parallel, *carried, *_measures(ready)])


def _steps(member: Member) -> str:
    return str(member.spec.cost.steps or "") if member.spec.cost else ""


def _lasts(member: Member) -> str:
    found = estimates.expected_of(member.spec.cost, member.draft.known)
    return f"~{lasting(found.seconds)}" if found else ""


def _disk(member: Member) -> str:
    found = estimates.expected_of(member.spec.cost, member.draft.known)
    return estimates.size(found.disk_bytes) if found else ""


def _measures(ready: GroupDraft) -> list[str]:
    """Where the estimates come from; of a sweep's points, which mostly are alike, each once."""
    known = {member.label: member.draft.known.measure for member in ready.members if member.spec.cost}
    lines = [f"{label}: {estimates.measured(found)}" for label, found in known.items() if found]
    missing = [label for label, found in known.items() if not found]
    if ready.kind == "sweep":
        lines = list(dict.fromkeys(line.partition(": ")[2] for line in lines))
    return [*lines, *_in_all(ready), *([f"{', '.join(missing)}: {estimates.NOT_MEASURED}"] if missing else [])]


def _in_all(ready: GroupDraft) -> list[str]:
    """Of a pipeline; what its stages need on one disk, they need together."""
    found = [one for member in ready.members
             if (one := estimates.expected_of(member.spec.cost, member.draft.known))]
    if ready.kind != "pipeline" or len(found) < len(ready.members):
        return []
    words = f"all of it: ~{lasting(sum(one.seconds for one in found))} one after the other"
    if len({member.draft.node.name for member in ready.members}) > 1:
        return [words]
    free = ready.members[0].draft.known.free_bytes
    return [f"{words}, disk {estimates.disk(sum(one.disk_bytes for one in found), free)}"]


def _need(ready: GroupDraft, key: str, label: str, any_end: bool) -> str:
    inside = key in (member.spec.token for member in ready.members)
    return (label if inside else f"job {label}") + (":any" if any_end else "")


def _taken(member: Member) -> list[str]:
    return [f"{label}.{what}" for label, what in handover.references(member.draft.config or "")]


def headline(ready: GroupDraft, member: Member) -> str:
    """Above the log of one of several jobs."""
    position = [one.label for one in ready.members].index(member.label) + 1
    takes = f", takes {', '.join(taken)}" if (taken := _taken(member)) else ""
    return f"--- {member.spec.name} ({position} of {len(ready.members)}{takes}) ---"


def submitted(ready: GroupDraft, jobs: Sequence[Submitted], following: bool) -> str:
    places = ", ".join(dict.fromkeys(job.node for job in jobs))
    count = f"{len(ready.members)} job{'' if len(ready.members) == 1 else 's'}"
    lines = [f"{ready.id}: {count}" + (f" on {places}" if places else "")]
    if len(jobs) < len(ready.members):
        lines.append(f"  {len(ready.members) - len(jobs)} of them are held by this computer until others have ended")
    if ready.unset_secrets:
        lines.append(f"  not set here: {', '.join(ready.unset_secrets)}")
    if following:
        lines.append(f"  Ctrl-C leaves them alone; stop them: launch kill {ready.id}")
    else:
        lines.append(f"  look: launch status {ready.id}; stop all: launch kill {ready.id}")
    return "\n".join(lines)
