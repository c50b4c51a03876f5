"""`launch check` of a pipeline and of a sweep: each job looked at by itself, and whether they go together."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, Unreachable
from launcher import check
from launcher.errors import LaunchError

if TYPE_CHECKING:
    from cluster.node.check import Found
    from configs.load import Stage
    from launcher.index import Index
    from launcher.stages import Request
    from launcher.submit import Draft


@dataclass
class CheckedGroup:
    """`members`: by label, or by the values of a sweep; `found`: of all of them together."""

    stage: str
    node: str
    kind: str  # pipeline | sweep
    members: dict[str, check.Checked] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return any(one.severity == "error" for one in self.found) or any(one.bad for one in self.members.values())


def check_any(index: Index, request: Request, deep: bool = True) -> check.Checked | CheckedGroup:
    """What `launch check` was given. Raises what `check.check` does."""
    from launcher.pipeline import pipeline_named

    if request.sweeps:
        return _of_sweep(index, request, deep)
    stage = pipeline_named(request)
    return _of_pipeline(index, stage, request, deep) if stage else check.check(index, request, deep)


def _of_pipeline(index: Index, stage: Stage, request: Request, deep: bool) -> CheckedGroup:
    """What a stage takes from the ones before it is not there yet, and is not looked for."""
    from configs.pipeline import load_pipeline
    from launcher.pipeline import draft_pipeline, of_entry

    result, drafts = CheckedGroup(stage.name, request.node, "pipeline"), dict[str, "Draft"]()
    for entry in load_pipeline(stage, request.config, list(request.sets), request.start):
        result.members[entry.label], ready = check.look_at(index, of_entry(request, entry, drafts), deep)
        drafts |= {entry.label: ready} if ready else {}
    return _together(result, lambda: draft_pipeline(index, stage, request, carry=False))


def _of_sweep(index: Index, request: Request, deep: bool) -> CheckedGroup:
    from launcher.sweep import draft_sweep, points

    result = CheckedGroup(request.stage or "", request.node, "sweep")
    for point in points(request.sweeps):
        values = [f"{key}={value}" for key, value in point.items()]
        asked = replace(request, sweeps=(), sets=(*request.sets, *values))
        result.members[" ".join(values)] = check.check(index, asked, deep)
    return _together(result, lambda: draft_sweep(index, request))


def _together(result: CheckedGroup, draft: Callable[[], Any]) -> CheckedGroup:
    """What a submit of all would refuse, once each of them is well."""
    if not result.bad:
        try:
            draft()
        except Unreachable:
            raise
        except (LaunchError, ClusterError) as error:
            result.found.append(check.found_of(error, result.node))
    return result


def as_object(found: check.Checked | CheckedGroup) -> dict[str, Any]:
    if isinstance(found, check.Checked):
        return check.as_object(found)
    return {"stage": found.stage, "node": found.node, "kind": found.kind, "ok": not found.bad,
            "found": [asdict(one) for one in found.found],
            "members": {label: check.as_object(one) for label, one in found.members.items()}}


def as_text(found: check.Checked | CheckedGroup) -> str:
    if isinstance(found, check.Checked):
        return check.as_text(found)
    parts = [f"{label}\n{check.as_text(one)}" for label, one in found.members.items()]
    wrong = sum(one.bad for one in found.members.values()) + bool(found.found)
    deep = all("deep" in one.seconds for one in found.members.values())
    well = "nothing is in their way" if deep else "nothing that --quick looks at is in their way"
    said = f"{wrong} of them cannot begin" if wrong else well
    return "\n\n".join([*parts, "\n".join([*check.told(found.found), f"{found.kind} {found.stage}, "
                                           f"{len(found.members)} jobs: {said}"])])
