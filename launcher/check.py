"""What is wrong with a job before it is started: the checks of a submit, collected, and the deep tier behind them."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, Explained, Unreachable
from cluster.inventory import Node
from launcher import check_again, check_once
from launcher.errors import LaunchError, Refused, Wrong

if TYPE_CHECKING:
    from cluster.node.check import Found
    from launcher.index import Index
    from launcher.stages import Paths, Plan, Request
    from launcher.submit import Draft

Sure = Callable[..., Any]
SKEW_S = 2.0  # clocks that differ by more make times of different machines hard to compare
_LATE = 0.9  # of the time limit
_FULL = 0.8  # of the disk
_TOTAL = ("training", "max_steps")
_ON_BAD = (("training", "dataset", "on_bad"), ("sources", "on_bad"), ("data", "on_bad"))


# --- of a submit --------------------------------------------------------------------------------------------

def at_once(check: Callable[..., Any], *args: Any) -> Any:
    """The first thing that is wrong ends a submit."""
    return check(*args)


def question(plan: Plan, paths: Paths, request: Request, resume: str) -> dict[str, Any] | None:
    """For `Backend.prepare`; None: there is nothing to look at."""
    if plan.run is None or request.no_check:
        return None
    port = plan.spec.env.get("MASTER_PORT", "")
    total = _value(plan.run.data, _TOTAL)
    return {"again": check_again.words(request), "node": request.node,
            "inputs": {key: paths.values[key] for key in paths.inputs},
            "skips_bad": "skip" in [_value(plan.run.data, key) for key in _ON_BAD], "resume": resume,
            "total": total if isinstance(total, int) else None, "ports": [int(port)] if port.isdecimal() else []}


def _value(data: Any, key: Sequence[str]) -> Any:
    for name in key:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def refuse(found: Iterable[dict[str, Any]], node: Node, request: Request) -> tuple[str, ...]:
    """Raises Refused for the errors of the quick tier -> its warnings, in words."""
    found = list(found)
    if errors := [one for one in found if one["severity"] == "error"]:
        first, more = errors[0], len(errors) - 1
        also = f"; and {more} more" if more else ""
        every = f"\n  all of them: {check_again.check(request)}" if more else ""
        raise Refused(f"{first['where']}: {first['what']}{also}", node.name,
                      f"{first['why']}\n  {first['fix']}{every}\n  --no-check submits it all the same")
    return tuple(f"warning: {one['where']}: {one['what']}" for one in found if one["severity"] == "warning")


# --- launch check -------------------------------------------------------------------------------------------

@dataclass
class Checked:
    """`seconds`: of the parts; `imports`: of each module, in the job's environment; neither where it was not asked."""

    stage: str
    node: str
    found: list[Found] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    imports: dict[str, float] = field(default_factory=dict)
    estimate: str = ""

    @property
    def bad(self) -> bool:
        return any(one.severity == "error" for one in self.found)


class _Collected:
    """Each check is called, and what it raises is kept: the next one may have something to say too."""

    def __init__(self, where: str) -> None:
        self.found: list[Found] = []
        self._where = where

    def __call__(self, check: Callable[..., Any], *args: Any) -> Any:
        if check is refuse:
            self.found += _founds(args[0])
            return None
        try:
            return check(*args)
        except Unreachable:
            raise
        except (LaunchError, ClusterError) as error:
            self.found.append(found_of(error, self._where))
        return None


def found_of(error: Explained, where: str) -> Found:
    from cluster.node.check import Found

    return Found("submit", "error", error.what, str(error.where or where), "a submit would be refused",
                 error.hint or "launch nodes shows what there is")


def _founds(raw: Iterable[dict[str, Any]]) -> list[Found]:
    from cluster.node.check import Found

    return [Found.from_json(one) for one in raw]


def check(index: Index, request: Request, deep: bool = True) -> Checked:
    """One stage. Raises ConfigError and Wrong for what cannot be meant at all, Unreachable."""
    return look_at(index, request, deep)[0]


def look_at(index: Index, request: Request, deep: bool) -> tuple[Checked, Draft | None]:
    """The same, and the job as it would be submitted; None: its node cannot take any."""
    from cluster.node.check import by_severity
    from launcher import submit

    if request.node == "any":
        raise Wrong("launch check looks at one place: name a node", hint="--node any chooses when the job is submitted")
    began, result, sure = time.time(), Checked(request.stage or "command", request.node), _Collected(request.node)
    try:
        ready = submit.examined(index, request, sure)
    except (ClusterError, Refused) as error:  # its node cannot take any job
        if isinstance(error, Unreachable):
            raise
        result.found = list(dict.fromkeys([*sure.found, found_of(error, request.node)]))
        return result, None
    answered = time.time()
    judged = [*_judged(ready, request, began, answered), *(_of_others(ready, request, sure) if ready.others else ())]
    result.found = check_once.of_submit([*sure.found, *judged])
    result.estimate = submit.estimates.told(ready.spec.cost, ready.known)
    result.seconds["quick"] = round(answered - began, 3)
    if deep:
        _look_deep(ready, result)
    result.found = by_severity(result.found)
    return result, ready


def _look_deep(ready: Draft, result: Checked) -> None:
    from launcher.reconcile import backend_of
    from launcher.submit import packed

    began = time.time()
    gone = any("resume" in check_once.keys(one) for one in result.found if one.severity == "error")
    resume = ready.spec.resume if ready.spec.resume.startswith("/") and not gone else ""
    with packed(None if ready.have_code else ready.code) as payload:
        said = backend_of(ready.node).check(ready.spec, ready.config, payload, resume)
    result.found += check_once.not_told(_founds(said["found"]), result.found)
    result.imports = said["imports"]
    result.seconds["deep"] = round(time.time() - began - sum(said["imports"].values()), 3)


def _judged(ready: Draft, request: Request, began: float, answered: float) -> Iterator[Found]:
    """What this computer can say of the node's answer."""
    yield from clock(ready.node.name, ready.prepared.get("now"), began, answered)
    yield from _estimated(ready, request)
    yield from _waits(ready)


def _of_others(ready: Draft, request: Request, sure: Sure) -> Iterator[Found]:
    """Of a job on several machines: each of the others sees the inputs and has a port, and their clocks agree."""
    from launcher import stages
    from launcher.reconcile import backend_of

    plan = stages.plan(request, ready.node)
    paths = stages.NO_PATHS
    if plan.run and plan.stage:
        paths = stages.paths_of(plan.run, plan.stage, ready.node, request.start, told=True)
    asked = question(plan, paths, request, ready.spec.resume if ready.spec.resume.startswith("/") else "")
    ahead = {}
    for node in (ready.node, *ready.others):
        began = time.time()
        answer = sure(lambda node=node: backend_of(node).prepare(check=asked and {**asked, "node": node.name}))
        if answer is None:
            continue
        ahead[node.name] = (answer["now"] - time.time(), answer["now"] - began)
        if node is not ready.node:
            yield from clock(node.name, answer["now"], began, time.time())
            yield from _new_on(node.name, answer.get("found", ()), ready.prepared.get("found", ()))
    yield from apart(ahead)


def _new_on(node: str, found: Iterable[dict[str, Any]], known: Iterable[dict[str, Any]]) -> Iterator[Found]:
    """What the first machine has not said already."""
    said = [one["what"] for one in known]
    yield from _founds(one | {"where": f"{node}: {one['where']}"} for one in found if one["what"] not in said)


def apart(ahead: dict[str, tuple[float, float]]) -> Iterator[Found]:
    """node -> between which bounds its clock is ahead of this computer's, s -> the two that differ most."""
    from cluster.node.check import Found

    if not ahead:
        return
    first, last = max(ahead, key=lambda node: ahead[node][0]), min(ahead, key=lambda node: ahead[node][1])
    seconds = ahead[first][0] - ahead[last][1]
    if seconds > SKEW_S:
        yield Found("clock", "warning", f"the clock of {first} is {seconds:.0f} s ahead of that of {last}",
                    f"{first}, {last}", "ranks of one job would write times that cannot be compared",
                    "timedatectl on both; ask for NTP")


def clock(node: str, now: float | None, began: float, answered: float) -> Iterator[Found]:
    """Of a node that said `now` to a question of this computer; unix s."""
    from cluster.node.check import Found

    if now is None:
        return
    ahead = max(began - now, 0.0) or min(answered - now, 0.0)  # within the question itself nobody can say
    if abs(ahead) > SKEW_S:
        yield Found("clock", "warning", f"its clock is {abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} "
                    "this computer's", node, "ages and times of its jobs are wrong by that much",
                    "timedatectl on both; ask for NTP")


def _estimated(ready: Draft, request: Request) -> Iterator[Found]:
    from cluster.node.check import Found
    from launcher import estimates
    from launcher.views import lasting

    spec, need = ready.spec, estimates.expected_of(ready.spec.cost, ready.known)
    if need is None:
        if spec.cost is not None:
            yield Found("estimate", "info", "time, disk and GPU memory are not measured yet", ready.node.name,
                        "nothing like it has run there", check_again.calibrate(request))
        return
    free = ready.known.free_bytes
    if need.disk_bytes > _FULL * free:
        error = need.disk_bytes > free
        yield Found("disk", "error" if error else "warning", f"it will write {estimates.size(need.disk_bytes)}, "
                    f"{estimates.size(free)} are free", ready.node.workdir, "a full disk ends it in the middle",
                    "launch prune, or --set checkpoint.keep_last=1")
    if spec.time_s is not None and need.seconds > _LATE * spec.time_s:
        goes_on = spec.slurm is not None
        yield Found("time", "info" if goes_on else "warning", f"it will take {lasting(need.seconds)}, its limit is "
                    f"{lasting(spec.time_s)}", "--time", "it goes on in another allocation" if goes_on
                    else "it is stopped then, with a checkpoint", f"--time {need.seconds * 1.2 / 3600:.0f}h")


def _waits(ready: Draft) -> Iterator[Found]:
    """Who is in its way now; nothing that hinders a submit."""
    from cluster.node.check import Found
    from launcher.views import lasting

    spec, prepared = ready.spec, ready.prepared
    if spec.slurm:
        if not prepared.get("slurm"):  # it refuses the job
            return
        starts = prepared["slurm"]["starts_in_s"]
        when = "SLURM does not say when it would start" if starts is None else \
            f"SLURM would start it in {lasting(max(0.0, starts))}"
        yield Found("queue", "info", when, spec.place, "sbatch --test-only says so, of the queue as it is now",
                    "squeue --start")
        return
    busy = prepared.get("busy") or {}
    there = [gpu for gpu in prepared.get("gpus", ()) if spec.gpu_choice is None or gpu["index"] in spec.gpu_choice]
    taken = [f"GPU {gpu['index']}: {busy[gpu['uuid']]}" for gpu in there if gpu["uuid"] in busy]
    if len(there) - len(taken) < spec.gpus <= len(there):
        yield Found("gpus", "warning", f"it would wait for GPUs: {'; '.join(taken)}", ready.node.name,
                    "it starts when they are free", "--node any takes a node that is free now; launch nodes")


# --- views --------------------------------------------------------------------------------------------------

def as_object(found: Checked) -> dict[str, Any]:
    return asdict(found) | {"ok": not found.bad}


def as_text(found: Checked) -> str:
    return "\n".join([*told(found.found), *_summary(found)])


def told(found: Iterable[Found]) -> list[str]:
    """Lines for people."""
    from launcher.views import visible

    lines = []
    for one in found:
        what, *details = one.what.splitlines()
        lines += [f"{one.severity:8}{one.check:13}{visible(one.where)}: {visible(what)}",
                  *(f"{'':21}{visible(text.strip())}" for text in (one.why, one.fix, *details))]
    return lines


def _summary(found: Checked) -> Iterator[str]:
    if found.estimate:
        yield f"estimate: {found.estimate}"
    if found.imports:
        each = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.imports.items() if seconds >= 0.05)
        yield f"imports in the job's environment: {sum(found.imports.values()):.1f} s ({each})"
    counts = {word: sum(one.severity == word for one in found.found) for word in ("error", "warning")}
    said = ", ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count)
    took = ", ".join(f"{tier} {seconds:.2f} s" for tier, seconds in found.seconds.items())
    well = "nothing is in its way" if "deep" in found.seconds else "nothing that --quick looks at is in its way"
    yield f"{found.stage} on {found.node}: {said or well}" + (f" ({took})" if took else "")
