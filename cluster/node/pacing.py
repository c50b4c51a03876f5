"""Rules over time: a job that became slow, stands still, ended badly or did nothing."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.events import Reason
from cluster.node import thresholds as limit
from cluster.node.findings import Case, Finding, Line, as_number, mean, median

Interval = tuple[int, int, float]  # (step before, steps, seconds)
_EVALUATES = ("validation.every_steps", "evaluate_every", "eval_every", "eval_steps", "validation_steps")
ENDED_BADLY = {
    "FAILED": ("an error ended it", "launch logs {job} -n 50"),
    "OUT_OF_MEMORY": ("more memory was needed than there is", ""),
    "TIMEOUT": ("its time was over before its last step", "launch restart {job}"),
    "NODE_FAIL": ("its machine was lost", "launch restart {job}"),
}


def intervals(lines: Sequence[Line]) -> list[Interval]:
    """From one update's line to the next, without those in which it evaluated. The passes of an update are written at
    once, and only its last line has a speed."""
    found: list[Interval] = []
    before: Line | None = None
    for line in lines:
        if "event" in line:
            before = line if line["event"] in ("eval", "resumed") else before
        elif "it_s" in line or "grad_norm" in line:
            steps, seconds = (0, 0.0) if before is None else (line["step"] - before["step"], _between(before, line))
            if steps > 0 and seconds >= 0:
                found.append((line["step"] - steps, steps, seconds))
            before = line
    return found


def _between(before: Line, line: Line) -> float:
    start, end = as_number(before.get("t")), as_number(line.get("t"))
    return -1.0 if start is None or end is None else end - start


def slower(case: Case) -> Iterator[Finding]:
    """The newest stretch beside the middle of what was before it, in the attempt that runs or ran last."""
    found = intervals(case.attempts[-1].lines if case.attempts else case.lines)[limit.SETTLING_STEPS:]
    paces = [seconds / steps for _, steps, seconds in found]
    size = max(limit.SLOWER_STEPS, len(paces) // 5)
    if len(paces) < 2 * size:
        return
    before, now = median(paces[:-size]), median(paces[-size:])
    if now >= limit.SLOWER * before > 0 and sum(seconds for _, _, seconds in found[-size:]) >= limit.SLOWER_S:
        since = len(paces) - size
        while paces[since - 1] >= limit.SLOWER * before:
            since -= 1
        first = found[since][0]
        yield Finding(
            "slower", "warning",
            f"{now:.3g} s per step since step {first}, {before:.3g} s before: {now / before:.1f} times as slow",
            f"what is left takes {now / before:.1f} times as long as was planned",
            "something else runs on this machine, the data comes more slowly (a disk that is shared or full), or the "
            "GPU is throttled",
            "launch nodes", first, found[-1][0] + found[-1][1])


def starved(case: Case) -> Iterator[Finding]:
    """Of late more than half of the time went by without data, in the attempt that runs or ran last."""
    lines = case.attempts[-1].lines if case.attempts else case.lines
    told = [line for line in lines if as_number(line.get("data_wait")) is not None]
    since = len(told)
    while since and told[since - 1]["data_wait"] > limit.STARVED:
        since -= 1
    waited = told[since:]
    if len(waited) < limit.STARVED_STEPS or _between(waited[0], waited[-1]) < limit.SLOWER_S:
        return
    share, first = mean(line["data_wait"] for line in waited), waited[0]["step"]
    workers = case.number("workers")
    by = "" if workers is None else (f" ({workers:.0f} loader processes)" if workers else
                                     " (in the training process itself: there is no other)")
    more = "" if workers is None else f"{max(limit.STARVED_WORKERS, 2 * workers):.0f}"
    yield Finding(
        "starved", "warning", f"{100 * share:.0f} % of the time since step {first} it waited for its data{by}",
        f"the device has nothing to do meanwhile: with the data at hand a step takes {100 * (1 - share):.0f} % of the "
        "time",
        "too few loader processes" + (f" ({more} next time)" if more and case.over else "")
        + ", samples that are decoded or augmented slowly, or a disk that is shared or slow",
        "launch nodes" if case.over or not more else case.restart(workers=float(more)),
        first, waited[-1]["step"])


def gpus_idle(case: Case) -> Iterator[Finding]:
    """What the driver said while steps were made, look after look."""
    looks = case.gpu_use[-limit.IDLE_LOOKS:]
    busiest = max((busy for _, busy in looks), default=limit.IDLE_PERCENT)
    if len(looks) < limit.IDLE_LOOKS or busiest >= limit.IDLE_PERCENT:
        return
    minutes = (looks[-1][0] - looks[0][0]) / 60
    yield Finding(
        "gpus-idle", "warning",
        f"its GPUs were busy for {busiest} % of the time at the most, in {len(looks)} looks over {minutes:.0f} minutes",
        "it makes steps and holds GPUs that do next to nothing",
        "it trains on the CPU (torch.cuda.is_available() is false, a model that was never moved), waits for its data, "
        "or is far too small for a GPU",
        f"launch logs {case.job} -n 50", None, case.step)


def stalled(case: Case) -> Iterator[Finding]:
    if not case.runs or case.whole or case.written is None:
        return
    gap, allowed = case.now - case.written, allowed_gap(case)
    if allowed is not None and gap > allowed:
        yield standstill(case.job, gap, allowed, case.step, case.world, case.gpus, case.again_or("logs")
                         if case.by_hand else case.restart())


def standstill(job: str, gap: float, allowed: float, step: int | None, ranks: int, gpus: int, fix: str = "") -> Finding:
    """The finding of a job that wrote no step for `gap` seconds."""
    return Finding(
        "stalled", "error",
        f"no step for {gap:.0f} s; its pauses until now allow {allowed:.0f} s",
        f"it holds its GPU{'s' * (gpus > 1)} and does nothing" if gpus else "it does nothing, and does not end either",
        "a rank that hangs (in a collective the others wait for it), a loader that waits for a disk, or a lock"
        if ranks > 1 else
        "it waits for something that does not come (a disk, the network, a lock, another process), or runs in a circle",
        fix or f"launch restart {job}", step, step)


def allowed_gap(case: Case) -> float | None:
    """Seconds without a line that are no stall; None: nothing is known of its pace."""
    lines = case.attempts[-1].lines if case.attempts else case.lines
    pauses = _pauses(lines)
    steps = [seconds for line, seconds in pauses if "event" not in line][-limit.STALL_LINES:]
    if not steps and case.from_log:
        steps = _paces_of_log(case)
    if len(steps) < limit.STALL_FEWEST:
        return limit.STALL_FIRST_STEP_S if case.will_step or lines and not case.from_log else None
    longest = [max(steps)]
    if _may_evaluate(lines):
        longest += [seconds for line, seconds in pauses if "event" in line]
    if _evaluates_first(case, lines):
        longest.append(limit.STALL_FIRST_EVALUATION_S / limit.STALL_PAUSES)
    return max(limit.STALL_STEPS * median(steps), limit.STALL_PAUSES * max(longest)) + limit.STALL_S


def _pauses(lines: Sequence[Line]) -> list[tuple[Line, float]]:
    """(line, seconds since the one before it), but for those whose predecessor is not at hand."""
    pairs = [(before, line) for before, line in zip(lines, lines[1:])
             if _between(before, line) >= 0 and before.get("event") != "resumed"]  # a start takes what it takes
    jumps = [line["step"] - before["step"] for before, line in pairs if "event" not in line]
    usual = median(jumps) if jumps else 0
    return [(line, _between(before, line)) for before, line in pairs
            if line["step"] - before["step"] <= limit.STALL_JUMP * max(1, usual)]


def _may_evaluate(lines: Sequence[Line]) -> bool:
    """Whether its last step is one after which it evaluates, by those after which it did."""
    evaluated = [line["step"] for line in lines if line.get("event") == "eval" and line["step"]]
    return not evaluated or lines[-1]["step"] % math.gcd(*evaluated) == 0


def _evaluates_first(case: Case, lines: Sequence[Line]) -> bool:
    """Whether, by its config, its first evaluation may follow its last line."""
    steps = [line["step"] for line in lines if "event" not in line]
    every = next((as_number(value) for key, value in case.config.items() if key.endswith(_EVALUATES)), None)
    if not every or len(steps) < 2 or any(line.get("event") == "eval" and line["step"] for line in lines):
        return False
    jump = max(1, steps[-1] - steps[-2])
    return (steps[-1] + jump) // every > (steps[-1] - jump) // every


def _paces_of_log(case: Case) -> list[float]:
    """A log has no times: the mean from its start to its last line stands for every step, the start-up included."""
    attempt = case.attempts[-1] if case.attempts else None
    lines = attempt.lines if attempt else ()
    if attempt is None or attempt.launched is None or case.written is None or len(lines) < limit.STALL_FEWEST:
        return []
    return [(case.written - attempt.launched) / len(lines)] * len(lines)


def ended_badly(case: Case) -> Iterator[Finding]:
    if case.state not in ENDED_BADLY:
        return
    cause, fix = ENDED_BADLY[case.state]
    at = f" at step {case.step}" if case.step is not None else ""
    total = f" of {case.total}" if case.total and case.step is not None else ""
    asked = replace(case, config=case.newest or case.config)
    batch = asked.number("batch") or 0
    smaller = asked.restart(**({"batch": batch // 2} if batch > 1 else {}))
    yield Finding(
        "ended-badly", "error", f"{case.reason or case.state.lower()}{at}{total}",
        "it did not do what it was started for", case.detail.strip().split("\n", 1)[0] or cause,
        fix.format(job=case.job) or smaller, case.step, case.step)


def ended_early(case: Case) -> Iterator[Finding]:
    """Exit code 0 far from the last step, of a program that says no other way that it is done."""
    steps = [line["step"] for line in case.steps]
    if case.state != "COMPLETED" or case.total is None or not steps or any(
            line.get("event") in ("done", "stopped") for line in case.lines):
        return
    jumps = [after - before for before, after in zip(steps, steps[1:]) if after > before]
    usual = median(jumps) if jumps else 1
    if steps[-1] < limit.EARLY_SHARE * case.total and case.total - steps[-1] > limit.EARLY_LINES * usual:
        yield Finding(
            "ended-early", "warning", f"it ended at step {steps[-1]} of {case.total}, with exit code 0",
            "it looks like a success, and the last part of its training is missing",
            "it stopped early by its own rule, or it caught an error, said so in its log and went on to its end",
            f"launch logs {case.job} -n 50", steps[-1], steps[-1])


def nothing_done(case: Case) -> Iterator[Finding]:
    """Completed without a step: a resume past the end, more passes per update than passes."""
    if case.state != "COMPLETED" or not case.attempts:
        return
    newest, step = case.attempts[-1], case.attempts[-1].resume_step
    events = {line.get("event") for line in newest.lines}
    if newest.lines and step is not None and None not in events and "done" not in events:
        yield _nothing(f"the last attempt began at step {step} and trained no step", step,
                       "it resumed from a checkpoint that is at the end already",
                       case.restart(steps=2.0 * (case.total or step)))
    elif not newest.lines and case.step and any(one.reason == Reason.DONE.value for one in case.attempts[-2:-1]):
        yield _nothing(f"the last attempt trained no step; the one before it had come to its end, step {case.step}",
                       case.step, "it resumed from a checkpoint that is at the end already",
                       case.restart(steps=2.0 * (case.total or case.step)))
    elif case.steps and case.applied == 0:
        yield _nothing(f"{case.step} steps and not one update", case.step,
                       "every update was skipped, or `accumulation` is larger than the number of steps",
                       case.again_or("logs"))


def _nothing(what: str, step: int | None, cause: str, fix: str) -> Finding:
    return Finding("nothing-trained", "error", what,
                   "it exited 0 and looks like a success; the weights are those it began with", cause, fix, step, step)
