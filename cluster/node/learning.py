"""Rules over loss, gradients, updates and learning rate."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from cluster.node import thresholds as limit
from cluster.node.findings import Case, Finding, Line, Points, as_number, is_broken, mean, points, recent

_BATCHES = tuple(2 ** k for k in range(2, 17))  # that a contrastive loss is usual over, where nobody says
_NO_DECAY = ("constant", "plateau", "none", "null")


def non_finite(case: Case) -> Iterator[Finding]:
    broken = [line for line in case.steps if is_broken(line.get("loss")) or is_broken(line.get("grad_norm"))]
    if not broken:
        return
    newest = {line["step"] for line in case.steps[-limit.NONFINITE_RECENT:]}
    lasting = broken[-limit.NONFINITE_STREAK:] == case.steps[-limit.NONFINITE_STREAK:]
    severity = "error" if lasting else "warning" if broken[-1]["step"] in newest else "info"
    samples = _samples(case.skips)
    yield Finding(
        "non-finite", severity,
        f"loss or gradient norm not finite in {len(broken)} of {len(case.steps)} logged steps"
        + (", to the last one" if lasting else ""),
        "an update from such a gradient destroys the weights; one that is skipped is lost",
        (f"most often with the sample {samples}: look at it; else " if samples else "")
        + "a learning rate that is too high, or values that bf16 cannot hold",
        case.gentler(), broken[0]["step"], broken[-1]["step"])


def _samples(skips: list[Line]) -> str:
    """The sample that most skipped updates have in common; empty: none stands out."""
    named = [name for line in skips for name in str(line.get("samples_named") or "").split(", ") if name]
    [(name, count)] = Counter(named).most_common(1) or [("", 0)]
    return f"{name} ({count} times)" if count > 2 else ""


def updates_skipped(case: Case) -> Iterator[Finding]:
    """Applied updates of those attempted, in all or of late."""
    whole, newest = _updates(case, 0), _updates(case, _window_start(case))
    found = [one for one in (newest, whole) if one and one[1] >= limit.SKIP_FEWEST]
    if not found or newest is None or newest[0] / newest[1] >= limit.APPLIED_WARNING:
        return
    applied, attempted = found[0]
    share = applied / attempted
    of = f"{applied} of {attempted}"
    if whole and whole != found[0]:
        of = f"{applied} of the last {attempted}; {whole[0]} of {whole[1]} in all"
    first = case.skips[0]["step"] if case.skips else case.lines[0]["step"]
    yield Finding(
        "updates-skipped", "error" if share < limit.APPLIED_ERROR else "warning",
        f"{100 * share:.0f} % of updates applied: {of}{_norms(case.skips)}",
        "the rest of the time is wasted, and a schedule that counts applied updates never reaches its end",
        "gradients explode: a learning rate that is too high or a warm-up that is too short, or a limit on the "
        "gradient norm below what is normal for this model",
        case.gentler(), first, case.step)


def _norms(skips: list[Line]) -> str:
    norms = sorted(value for _, value in points(skips, "skipped"))
    return f"; gradient norms of skipped ones around {norms[len(norms) // 2]:.3g}" if norms else ""


def _window_start(case: Case) -> int:
    """The line after which SKIP_WINDOW updates were attempted; 0: there were no more."""
    if not case.skips or case.applied is None:
        return 0
    seen, latest = 0, case.applied
    for index in range(len(case.lines) - 1, 0, -1):
        line = case.lines[index]
        seen += line.get("event") == "skipped"
        if isinstance(line.get("applied"), int) and seen + latest - line["applied"] >= limit.SKIP_WINDOW:
            return index
    return 0


def _updates(case: Case, start: int) -> tuple[int, int] | None:
    """(applied, attempted) from that line on; None: it says too little about either."""
    lines = case.lines[start:]
    counted = [line for line in lines if isinstance(line.get("attempted"), int | float)]
    if counted and isinstance(counted[-1].get("applied"), int | float):
        return int(counted[-1]["applied"]), int(counted[-1]["attempted"])
    skipped = sum(line.get("event") == "skipped" for line in lines)
    if not skipped:
        return None
    known = [line["applied"] for line in lines if isinstance(line.get("applied"), int)]
    applied = known[-1] - (known[0] if start else 0) if known else lines[-1]["step"] - lines[0]["step"] + 1 - skipped
    return max(0, applied), max(0, applied) + skipped


def at_chance(case: Case) -> Iterator[Finding]:
    """A contrastive loss that is that of a guess: ln B over a batch of B."""
    loss = points(case.steps, "loss")
    if not _judged(case, loss):
        return
    now = recent(loss, limit.RECENT)
    newer = loss[-max(limit.CHANCE_POINTS, len(loss) // 2):]
    for batch, seen in (*((batch, newer) for batch in case.batches), *((batch, loss) for batch in _BATCHES)):
        chance = math.log(batch)
        if _stands_at(chance, seen):
            validation = points(case.lines, "val/loss")[-limit.RECENT:]
            val = f", validation {recent(validation, limit.RECENT):.4g}" if validation else ""
            yield Finding(
                "at-chance", "error",
                f"the loss stands at chance: ln {batch} = {chance:.4g}; it is {now:.4g}{val}, from step "
                f"{loss[0][0]} to {loss[-1][0]}",
                f"a guess among the {batch} of a batch costs exactly that: nothing has been learned, however steady "
                "the curve looks",
                "the embeddings have collapsed or get no gradient: a learning rate that is too high for pretrained "
                "weights, frozen towers without a head that trains, a temperature outside the optimizer, or inputs "
                "that are all alike",
                case.gentler(anew=True), loss[0][0], loss[-1][0], chance)
            return


def _judged(case: Case, loss: Points) -> bool:
    """Whether enough was trained to call it chance."""
    if len(loss) < limit.CHANCE_POINTS:
        return False
    if case.applied is None:
        return True
    rates = [rate for _, rate in points(case.steps, "lr")]
    rising = len(rates) > 10 and rates[-1] >= max(rates) > rates[-10]
    return case.applied >= (limit.CHANCE_IN_WARMUP_UPDATES if rising else limit.CHANCE_UPDATES)


def _stands_at(chance: float, loss: Points) -> bool:
    """All means are in the band, no single point far from it: a loss that passes by, or is noisy, is another one."""
    size, values = limit.RECENT, [value for _, value in loss]
    return all(abs(value - chance) <= limit.CHANCE_NOISE for value in values) and all(
        abs(mean(values[end - size:end]) - chance) <= limit.CHANCE_BAND for end in range(len(values), size - 1, -size))


def loss_constant(case: Case) -> Iterator[Finding]:
    loss = [] if case.from_log else points(case.steps, "loss")[-limit.SAME_LOSS:]
    if len(loss) == limit.SAME_LOSS and len({value for _, value in loss}) == 1:
        yield Finding(
            "loss-constant", "error",
            f"the loss is {loss[-1][1]:.6g} to the last bit in the last {limit.SAME_LOSS} logged steps",
            "another batch has another loss: this number does not come from the data, so nothing is learned from it",
            "a loss that was replaced by a constant after an error, weights that do not move, or one batch over and "
            "over",
            case.again_or("logs"), loss[0][0], loss[-1][0])


def no_gradient(case: Case) -> Iterator[Finding]:
    """Of all that is trained; of some tensors, by what our trainer says of them (its events gradients and weights)."""
    norms = points(case.steps, "grad_norm")[-limit.ZERO_GRADIENTS:]
    ended, watched = _event(case, "gradients"), _event(case, "weights")
    unused = "what is trained is not part of the loss (detached, frozen, behind a gate of 0), or the loss is a constant"
    fix = case.again_or("logs")
    if frozen := ended.get("frozen"):
        yield Finding(
            "no-gradient", "error", f"{frozen} frozen tensors have a gradient: {ended.get('named')}",
            "they would be trained, or cost memory for nothing: the trainer ended the run",
            "requires_grad_(False) was not called on them, or was undone", fix, ended["step"], ended["step"])
    elif missing := ended.get("missing"):
        yield Finding(
            "no-gradient", "error",
            f"{missing} of {ended.get('of')} trained tensors have no gradient: {ended.get('named')}",
            "they learn nothing: the trainer ended the run", unused, fix, ended["step"], ended["step"])
    elif len(norms) == limit.ZERO_GRADIENTS and not any(value for _, value in norms):
        yield _no_gradient_left(case) or Finding(
            "no-gradient", "error", f"the gradient norm is exactly 0 in the last {len(norms)} logged steps",
            "no weight changes any more", unused, fix, norms[0][0], norms[-1][0])
    elif idle := watched.get("idle"):
        yield Finding(
            "no-gradient", "warning",
            f"{idle} of {watched.get('of')} trained tensors had no gradient in {watched.get('updates')} updates: "
            f"{watched.get('idle_named')}",
            "they learn nothing and keep the values they began with",
            "the forward pass does not use them, or very seldom, or a gate before them is 0", fix,
            watched["step"], watched["step"])


def _no_gradient_left(case: Case) -> Finding | None:
    """Of one that had gradients before; None: there never was any."""
    norms = points(case.steps, "grad_norm")
    alive = [(step, value) for step, value in norms if value]
    if not alive:
        return None
    at, highest = max(alive, key=lambda point: point[1])
    dead = next(step for step, _ in norms if step > alive[-1][0])
    rate = case.number("lr")
    return Finding(
        "no-gradient", "error",
        f"the gradient norm is exactly 0 since step {dead}; before it was up to {highest:.3g} (step {at})",
        "no weight changes any more, and the weights are where nothing pulls them back",
        "a learning rate that is too high" + (f" ({rate:.3g})" if rate else "") + ": a few updates threw the weights "
        "to where every output is the same (saturated, transparent, all alike)",
        case.gentler(anew=True), dead, norms[-1][0])


def weights_still(case: Case) -> Iterator[Finding]:
    """Weights that have a gradient and stay what they are, by our trainer's event."""
    said = _event(case, "weights")
    moved, still = as_number(said.get("moved")), as_number(said.get("still"))
    if moved is None or moved >= limit.WEIGHTS_MOVED and not still:
        return
    of = f"; {still:.0f} of {said.get('of')} tensors not at all: {said.get('still_named')}" if still else ""
    coarse = moved < limit.WEIGHTS_MOVED
    yield Finding(
        "weights-still", "error" if coarse else "warning",
        f"{100 * moved:.0f} % of the weights that had a gradient changed in {said.get('updates')} updates{of}",
        "a step that is rounded away is lost, however often it is taken: what stands still learns nothing",
        "weights in bf16 or fp16, whose neighbouring values are further apart than a step (train them in fp32, compute "
        "in bf16), or a learning rate that is far too low" if coarse else
        "tensors that the optimizer does not have, or that have a learning rate of 0 or nearly 0",
        case.again_or("logs"), said["step"], said["step"])


def _event(case: Case, name: str) -> Line:
    """The newest line of that event: a resumed run is looked at anew, and what it says now holds."""
    return next((line for line in reversed(case.lines) if line.get("event") == name), {"step": case.step})


def learning_rate(case: Case) -> Iterator[Finding]:
    """A rate that is 0, never moves though it should, or ends at the wrong value."""
    rates = points(case.steps, "lr")
    if not rates or (case.applied or len(rates)) < limit.LR_UPDATES or len(rates) < 2:
        return
    values = [rate for _, rate in rates]
    first, last, peak = rates[0][0], rates[-1][0], max(values)
    warmup = case.number("warmup") or 0
    decay = case.config.get(case.key("decay", "lr_decay", "scheduler", "lr_scheduler") or "")
    if peak == 0:
        yield Finding(
            "lr-stuck", "error", f"the learning rate is 0 in all {len(values)} logged steps", "nothing is learned",
            "a schedule that is stepped before its warm-up begins, or a rate of 0 in the config",
            case.restart(anew=case.over, lr=1e-4), first, last)
    elif warmup >= 2 and min(values) == peak and len(values) >= limit.LR_UPDATES and first < warmup:
        yield Finding(
            "lr-stuck", "error",
            f"the learning rate is {peak:.3g} in all {len(values)} logged steps; it should rise for {warmup:g} updates",
            "the schedule does nothing: no warm-up protects the start and no decay settles the end",
            "the schedule's step() is never called, or called on another optimizer", case.again_or("logs"), first, last)
    elif case.whole and min(values) < peak and (decay not in _NO_DECAY if decay else warmup or values[-1] > values[-2]):
        yield from _end(case, values, first, last, warmup)


def _end(case: Case, values: list[float], first: int, last: int, warmup: float) -> Iterator[Finding]:
    """Of a run that went to its end under a decaying rate."""
    peak, end, skipped = max(values), values[-1], len(case.skips)
    if end <= limit.LR_END_SHARE * peak or end == peak == values[-2]:
        return
    ended = f"the learning rate ended at {end:.3g}, {100 * end / peak:.0f} % of its peak {peak:.3g}"
    if end == peak:
        of = f" of {warmup:g} updates" if warmup else ""
        what, cause = f"{ended}: still in the warm-up{of}", "the warm-up is longer than the run"
        fix = case.restart(anew=True, warmup=max(1, (case.applied or last) // limit.WARMUP_PART))
    elif skipped:
        what = f"{ended}: {skipped} updates were skipped, and the schedule counts applied ones"
        cause, fix = "skipped updates: see updates-skipped", case.gentler()
    else:
        what, cause = ended, "the schedule was made for more updates than the run has (accumulation counted twice?)"
        fix = case.again_or("show")
    yield Finding("lr-end", "warning", what,
                  "the last part of a decay is where most of the quality comes from; this run never had it",
                  cause, fix, first, last)
