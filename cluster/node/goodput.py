"""Where the time of a job went: useful steps, and all the rest. From its attempts' journals and metrics."""
from __future__ import annotations

from collections.abc import Sequence

from cluster.node import thresholds as limit
from cluster.node.findings import Attempt, as_number, median
from cluster.node.pacing import intervals

# In the order of a job's life; seconds of each, which add up to `wall`.
PARTS = ("useful", "replay", "evaluation", "checkpoint", "stall", "start", "finish", "between", "queue")


def goodput(attempts: Sequence[Attempt], submitted: float | None, until: float) -> dict[str, float]:
    """-> {"wall": s, and of each of PARTS: s}; empty when it never began.

    queue: until the first attempt; start: until its first line; replay: steps done again after a restart; evaluation,
    checkpoint: pauses of the steps for these; stall: pauses of more than three steps that nothing explains; finish:
    after the last line; between: from one attempt to the next.
    """
    begun = [one for one in attempts if one.started is not None]
    if not begun:
        return {}
    parts = dict.fromkeys(PARTS, 0.0)
    first = begun[0].started or 0.0
    parts["queue"] = max(0.0, first - (submitted or first))
    for index, one in enumerate(begun):
        following = begun[index + 1] if index + 1 < len(begun) else None
        started = one.started or 0.0
        ended = one.ended if one.ended is not None else following.started if following else until
        _attempt(parts, one, started, max(started, ended or started), following.resume_step if following else None)
        if following and following.started is not None:
            parts["between"] += max(0.0, following.started - (ended or 0.0))
    return {"wall": sum(parts.values()), **parts}


def _attempt(parts: dict[str, float], one: Attempt, started: float, ended: float, kept: int | None) -> None:
    """`kept`: the step at which the next attempt went on, None: all of its steps count."""
    times = [t for line in one.lines if (t := as_number(line.get("t"))) is not None]
    if not times:  # a program without metrics: nobody can say more
        parts["useful"] += ended - started
        return
    first, last = min(max(times[0], started), ended), min(max(times[-1], started), ended)
    parts["start"] += first - started
    parts["finish"] += ended - last
    _lines(parts, one, kept)
    parts["useful"] += last - first - max(0.0, times[-1] - times[0])  # what clocks disagree about


def _lines(parts: dict[str, float], one: Attempt, kept: int | None) -> None:
    """From the first line to the last: each stretch belongs to the line that ends it."""
    steps = intervals(one.lines)
    pace = median(seconds / count for _, count, seconds in steps) if steps else 0.0
    before = one.lines[0]
    for line in one.lines[1:]:
        seconds = max(0.0, (as_number(line.get("t")) or 0.0) - (as_number(before.get("t")) or 0.0))
        count = max(0, line["step"] - before["step"])
        own = min(seconds, limit.STALL_STEPS * count * pace) if count and pace else 0.0
        rest, kind = seconds - own, {"eval": "evaluation", "checkpoint": "checkpoint"}.get(line.get("event"), "stall")
        if kind == "stall" and not (pace and count):  # lines without a step or a pace say nothing about a stall
            own, rest = seconds, 0.0
        parts["replay" if kept is not None and line["step"] > kept else "useful"] += own
        parts[kind] += rest
        before = line
