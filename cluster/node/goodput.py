"""Where the time of a job went: useful steps, and all the rest. From its attempts' journals and metrics."""
from __future__ import annotations

from collections.abc import Sequence

from cluster.node import thresholds as limit
from cluster.node.findings import Attempt, Line, as_number, median
from cluster.node.pacing import intervals

# In the order of a job's life; seconds of each, which add up to `wall`.
PARTS = ("useful", "replay", "evaluation", "checkpoint", "stall", "start", "finish", "between", "queue")
UNTOLD = ("running", "between", "queue")  # all that can be told of a program whose steps have no times


def goodput(attempts: Sequence[Attempt], submitted: float | None, until: float) -> dict[str, float]:
    """-> {"wall": s, and of each of PARTS, or of UNTOLD: s}; empty when it never began. `until`: its end, or now.

    queue: until the first attempt; start: until its first step; replay: steps done again after a restart; evaluation,
    checkpoint: pauses of the steps for these; stall: pauses of more than three steps that nothing explains; finish:
    after the last line; between: from one attempt to the next, and after one that was lost since its last sign of
    life. Time in which the job had ended is no part of it (`rest`). running: all of an attempt's, where no attempt
    wrote metrics: what progress rules find in an output has no times.
    """
    begun = [one for one in attempts if one.started is not None]
    if not begun:
        return {}
    measured = any(as_number(line.get("t")) is not None for one in begun for line in one.lines)
    parts = dict.fromkeys(PARTS if measured else UNTOLD, 0.0)
    first = begun[0].started or 0.0
    parts["queue"] = 0.0 if submitted is None else max(0.0, first - submitted)
    for index, one in enumerate(begun):
        following = begun[index + 1:]
        started, next_one = one.started or 0.0, following[0].started or 0.0 if following else until
        ended = max(started, min(next_one, one.ended or (last_sign(one) if following else until)))
        if measured:
            _attempt(parts, one, started, ended, _kept(following))
        else:
            parts["running"] += ended - started
        later = following or attempts[attempts.index(one) + 1:]  # one that waits for GPUs has not begun
        parts["between"] += max(0.0, next_one - ended - rest(one, later[0] if later else None, ended, next_one))
    return {"wall": sum(parts.values()), **parts}


def rest(one: Attempt, following: Attempt | None, ended: float, until: float) -> float:
    """Seconds from the end of an attempt to `until`, the start of the following, in which nobody wanted the job: it
    had ended, by itself, by a person or with its supervisor, and no person had restarted it yet."""
    lost = one.ended is None and following is not None and following.by == "restart"
    if not (one.final or lost):
        return 0.0
    made = following.made if following else None
    wanted = made if made is not None and made > ended else until
    return max(0.0, min(wanted, until) - ended)


def last_sign(one: Attempt) -> float:
    """Of an attempt that wrote no ending."""
    times = [t for line in one.lines if (t := as_number(line.get("t"))) is not None]
    return max([one.started or 0.0, one.launched or 0.0, one.seen or 0.0, *times[-1:]])


def _kept(following: Sequence[Attempt]) -> int | None:
    """The step up to which no later attempt did the work again; None: all of it counts."""
    begun_at = [one.resume_step if one.resume_step is not None else _first_step(one) for one in following]
    return min((step for step in begun_at if step is not None), default=None)


def _first_step(one: Attempt) -> int | None:
    """Where its own lines begin, as the merged series sees it."""
    if not one.lines:
        return None
    return one.lines[0]["step"] - (one.lines[0].get("event") != "resumed")


def _attempt(parts: dict[str, float], one: Attempt, started: float, ended: float, kept: int | None) -> None:
    """`kept`: the step at which later attempts went on, None: all of its steps count."""
    times = [t for line in one.lines if (t := as_number(line.get("t"))) is not None]
    if not times:
        parts["start"] += ended - started
        return
    first, last = min(max(times[0], started), ended), min(max(times[-1], started), ended)
    parts["start"] += first - started
    _lines(parts, one, kept)
    _tail(parts, one, ended - last)
    parts["useful"] += last - first - max(0.0, times[-1] - times[0])  # what clocks disagree about


def _tail(parts: dict[str, float], one: Attempt, seconds: float) -> None:
    """After its last line. Of one that has not ended and is not at its end it is a step, or a stall."""
    newest, pace = one.lines[-1], _pace(one.lines)
    whole = newest.get("event") in ("done", "stopped") or newest["step"] == newest.get("total")
    if one.ended is not None or whole or not pace:
        parts["finish"] += seconds
        return
    parts["useful"] += min(seconds, limit.STALL_STEPS * pace)
    parts["stall"] += max(0.0, seconds - limit.STALL_STEPS * pace)


def _pace(lines: Sequence[Line]) -> float:
    """Seconds per step, 0 when nothing is known of it."""
    steps = intervals(lines)
    return median(seconds / count for _, count, seconds in steps) if steps else 0.0


def _lines(parts: dict[str, float], one: Attempt, kept: int | None) -> None:
    """From the first line to the last: each stretch belongs to the line that ends it."""
    pace, before, stepped = _pace(one.lines), one.lines[0], False
    reached = before["step"]  # the line of a save that went on meanwhile names an earlier one
    for line in one.lines[1:]:
        seconds = max(0.0, (as_number(line.get("t")) or 0.0) - (as_number(before.get("t")) or 0.0))
        count, reached = max(0, line["step"] - reached), max(reached, line["step"])
        kind = {"eval": "evaluation", "checkpoint": "checkpoint"}.get(line.get("event"), "stall")
        own = min(seconds, (limit.STALL_STEPS if kind == "stall" else 1) * count * pace) if count and pace else 0.0
        rest = seconds - own
        if kind == "stall" and not (pace and count):  # lines without a step or a pace say nothing about a stall
            own, rest = seconds, 0.0
        if kind == "stall" and not stepped:  # a loader, a compiler: that is its start
            kind = "start"
        stepped = stepped or count > 0
        parts["replay" if kept is not None and line["step"] > kept else "useful"] += own
        parts[kind] += rest
        before = line
