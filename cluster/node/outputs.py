"""Rules over evaluations: what a model makes, beside what costs no learning.

The names are those that the trainers write: `val/X`, and beside it `val/X_white`, `_mean`, `_copy`, `_copied` (how much
what is made is like what was put in), `_other`, `_input` and, for anything that has a chance value, `val/X_chance`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.node import thresholds as limit
from cluster.node.findings import Case, Finding, Line, Points, as_number, points, recent

_WHITE = "the white picture"
_COSTS_NOTHING = {"val/psnr_copy": "the picture put in, copied", "val/psnr_white": _WHITE,
                  "val/psnr_mean": "the mean training picture"}
_CHANCE = "_chance"


def white_renders(case: Case) -> Iterator[Finding]:
    found = _settled(case, "val/psnr", "val/psnr_white")
    if _all(found, lambda line: abs(line["val/psnr"] - line["val/psnr_white"]) <= limit.WHITE_DB):
        yield Finding(
            "white-renders", "error",
            f"the pictures are white: {_db(found[-1], 'val/psnr')}, the white picture alone has "
            f"{_db(found[-1], 'val/psnr_white')}",
            "most of a picture is background, so white scores well while nothing of the object is there",
            "the object was lost early: a learning rate that is too high in the warm-up, opacities at 0, cameras that "
            "look past it, or masks that are empty",
            case.gentler(anew=True), found[0]["step"], found[-1]["step"])


def identity_copy(case: Case) -> Iterator[Finding]:
    """The picture that was put in comes back, in every view or in those that were put in."""
    found = _settled(case, "val/psnr", "val/psnr_copy")
    if _all(found, _copies):
        yield Finding(
            "identity-copy", "error",
            f"the picture put in comes back in every view: {_db(found[-1], 'val/psnr')}, copying it has "
            f"{_db(found[-1], 'val/psnr_copy')}{_likeness(found[-1])}",
            "such a generator adds nothing; a reconstructor that is trained on its views learns flat objects",
            "input and target are the same view (an export that wrote one camera's picture for all, "
            "reference_view_idx at random without the prompts in the same order), or prompts of the views that cannot "
            "be told apart",
            case.again_or("show"), found[0]["step"], found[-1]["step"])
    found = _settled(case, "val/psnr", "val/psnr_input", updates=limit.INPUT_GAP_UPDATES)
    if _all(found, lambda line: line["val/psnr_input"] - line["val/psnr"] >= limit.INPUT_GAP_DB):
        again = case.restart(anew=True) + " --set training.targets=heldout"
        yield Finding(
            "identity-copy", "warning",
            f"views that were put in come back with {_db(found[-1], 'val/psnr_input')}, all others with "
            f"{_db(found[-1], 'val/psnr')}",
            "the pictures are repeated, the object between them is not known",
            "the loss looks only at the views that are put in",
            again if case.config.get("training.targets") == "all" and not case.by_hand else case.again_or("show"),
            found[0]["step"], found[-1]["step"])


def _copies(line: Line) -> bool:
    """By its score, or because its views are the picture put in rather than the true ones: a copy that is a little
    blurred or noisy scores better, or worse, than the picture itself."""
    diversity = as_number(line.get("val/diversity")) or 0.0
    if copied := as_number(line.get("val/psnr_copied")):
        return diversity <= limit.DIVERSITY and copied - line["val/psnr"] >= limit.COPIED_DB
    return diversity <= limit.COPIED_DIVERSITY and abs(line["val/psnr"] - line["val/psnr_copy"]) <= limit.COPY_DB


def _likeness(line: Line) -> str:
    return f"; as the picture put in they have {_db(line, 'val/psnr_copied')}" if "val/psnr_copied" in line else ""


def views_collapsed(case: Case) -> Iterator[Finding]:
    found = _settled(case, "val/diversity")
    if _all(found, lambda line: line["val/diversity"] <= limit.DIVERSITY) and not _explained(case):
        yield Finding(
            "views-collapsed", "error",
            f"all views are alike: they differ by {100 * found[-1]['val/diversity']:.0f} % of what true views do",
            "one picture for every direction is no multi-view generator, whatever its loss",
            "data in which the views are alike (an export that wrote one camera's picture for all), or a model that "
            "cannot tell them apart: the same prompt for all, attention without the view's own tokens",
            case.again_or("show"), found[0]["step"], found[-1]["step"])


def _explained(case: Case) -> bool:
    """Whether what is made is known to be white, or what was put in: then the rest follows from it."""
    return any(one.severity == "error" for rule in (white_renders, identity_copy) for one in rule(case))


def embeddings_collapsed(case: Case) -> Iterator[Finding]:
    """Of every kind X of embeddings whose mean cosine over all pairs is written as X_cosine."""
    if (case.applied or 0) < limit.SETTLED_UPDATES:
        return
    for key in sorted({key for line in case.steps[-limit.RECENT:] for key in line if key.endswith("_cosine")}):
        found = points(case.steps[-limit.RECENT:], key)
        if len(found) == limit.RECENT and all(value > limit.SAME_COSINE for _, value in found):
            yield Finding(
                "embeddings-collapsed", "error",
                f"the mean cosine of all pairs of {key.removesuffix('_cosine')} embeddings is {found[-1][1]:.3f}",
                "every input has the same embedding, so nothing can be told apart",
                "a learning rate that is too high for pretrained weights, inputs that are all alike, or pooling over "
                "padding",
                case.gentler(anew=True), found[0][0], found[-1][0])


def input_ignored(case: Case) -> Iterator[Finding]:
    updates = limit.GAP_UPDATES if case.whole else limit.OTHER_UPDATES
    found = _settled(case, "val/psnr", "val/psnr_other", updates=updates)
    if _all(found, lambda line: line["val/psnr"] - line["val/psnr_other"] < limit.OTHER_DB) and not _explained(case):
        yield Finding(
            "input-ignored", "warning",
            f"{_db(found[-1], 'val/psnr')} with the right picture put in, {_db(found[-1], 'val/psnr_other')} with "
            "another object's",
            "it has learned how such objects look, not how this one does",
            "the condition does not arrive (dropped too often, zeroed channels), inputs that belong to other objects, "
            "or too little training",
            case.again_or("show"), found[0]["step"], found[-1]["step"])
    found = _settled(case, "val/gap", "val/gap_low", updates=updates)
    if _all(found, lambda line: line["val/gap_low"] <= 0):
        yield Finding(
            "input-ignored", "warning",
            f"the loss with another's input is {found[-1]['val/gap']:+.2g} higher than with the right one, by its 5 % "
            f"bound {found[-1]['val/gap_low']:+.2g}: not above 0",
            "what is made does not follow what is put in",
            "the condition does not arrive (its gates at 0, an attention processor that drops it), or too little "
            "training",
            case.again_or("show"), found[0]["step"], found[-1]["step"])


def no_better_than_baseline(case: Case) -> Iterator[Finding]:
    yield from _below_pictures(case)
    for key in sorted({key for line in case.evaluations for key in line if key.endswith(_CHANCE)}):
        yield from _at_chance(case, key.removesuffix(_CHANCE))


def _below_pictures(case: Case) -> Iterator[Finding]:
    evaluations = case.evaluations
    score = points(evaluations, "val/psnr")
    bars = {words: value for key, words in _COSTS_NOTHING.items()
            if evaluations and (value := as_number(evaluations[-1].get(key))) is not None}
    updates = case.applied or (score[-1][0] if score else 0)
    if updates < limit.BASELINE_UPDATES:  # a whole run, however short, does better than the picture that knows nothing
        settled = case.whole and bool(_settled(case, "val/psnr", evaluations=1))
        bars = {words: value for words, value in bars.items() if words == _WHITE and settled}
    if not score or not bars:
        return
    values = [value for _, value in score]
    before = values[:-limit.EVALUATIONS]
    stuck = len(values) >= limit.BASELINE_EVALUATIONS and max(values[-limit.EVALUATIONS:]) <= max(before) \
        + limit.BASELINE_RISE_DB
    best = max(bars, key=lambda words: bars[words])
    if max(values) <= bars[best] and (stuck or case.whole) and not list(white_renders(case)):
        yield Finding(
            "no-better-than-baseline", "warning",
            f"{values[-1]:.2f} dB at best {max(values):.2f}; {best} alone has {bars[best]:.2f} dB",
            "what costs no learning does better, so nothing shows that anything was learned",
            "too little training: at full size it takes thousands of updates; else a learning rate that is too low or, "
            "if it was better once, too high",
            case.again_or("show"), score[0][0], score[-1][0])


def _at_chance(case: Case, key: str) -> Iterator[Finding]:
    """Of a share between 0 and 1 whose chance value stands beside it."""
    found = _settled(case, key, key + _CHANCE, updates=limit.CHANCE_UPDATES)
    name = key.removeprefix("val/")
    if _all(found, lambda line: _above(line[key], line[key + _CHANCE]) <= limit.SHARE_ABOVE_CHANCE):
        yield Finding(
            "no-better-than-baseline", "warning",
            f"{name} is {found[-1][key]:.3f}, chance is {found[-1][key + _CHANCE]:.3f}",
            "a guess does as well, so nothing shows that anything was learned",
            "too little training, or what it is asked about does not reach the model",
            case.again_or("show"), found[0]["step"], found[-1]["step"])


def _above(share: float, chance: float) -> float:
    """How far from chance to 1 it came."""
    return (share - chance) / (1 - chance) if chance < 1 else 1.0


def overfitting(case: Case) -> Iterator[Finding]:
    """Validation falls while training improves, or is far behind it."""
    for key, higher in (("val/psnr", True), ("val/loss", False)):
        score = points([line for line in case.lines if key in line], key)
        if len(score) > limit.FALLEN_EVALUATIONS and (case.applied or len(score) * 10) >= limit.SETTLED_UPDATES:
            yield from _fallen(case, key, score, higher)
            yield from _gap(case, key, score, higher)


def _fallen(case: Case, key: str, score: list[tuple[int, float]], higher: bool) -> Iterator[Finding]:
    at, best = (max if higher else min)(score, key=lambda point: point[1])
    since = [value for step, value in score if step > at][-limit.FALLEN_EVALUATIONS:]
    worse = [value <= best - limit.FALLEN_DB if higher else value >= best * limit.FALLEN_LOSS for value in since]
    loss = points(case.steps, "loss")
    then = [value for step, value in loss if step <= at][-limit.RECENT:]
    if len(since) < limit.FALLEN_EVALUATIONS or not all(worse) or not then:
        return
    now = recent(loss, min(limit.RECENT, len(then)))
    if now < limit.TRAIN_IMPROVED * sum(then) / len(then):
        yield Finding(
            "overfitting", "warning",
            f"{key} was best at step {at} ({best:.4g}) and is {since[-1]:.4g} now, while the training loss fell from "
            f"{sum(then) / len(then):.4g} to {now:.4g}",
            "what it learns now, it learns by heart",
            "too few samples for so many steps" + (f"; the checkpoint of step {at} is the one to take"
                                                   if case.will_step else f"; it was at its best at step {at}"),
            case.again_or("show"), at, score[-1][0])


def _gap(case: Case, key: str, score: list[tuple[int, float]], higher: bool) -> Iterator[Finding]:
    train = points(case.steps, key.removeprefix("val/"))
    if not train:
        return
    now, name = recent(train, limit.RECENT), key.removeprefix("val/")
    values = [value for _, value in score]
    pairs, before = values[-limit.FALLEN_EVALUATIONS:], values[:-limit.FALLEN_EVALUATIONS]
    if higher and not all(now - value >= limit.GAP_DB for value in pairs):
        return
    if not higher and not all(value >= limit.GAP_LOSS * now > 0 and value >= min(before) for value in pairs):
        return
    first = next((step for step, value in reversed(score) if not _apart(train, step, value, higher)), None)
    since = score[0][0] if first is None else next(step for step, _ in score if step > first)
    yield Finding(
        "train-val-gap", "warning", f"{name} is {now:.4g} in training and {pairs[-1]:.4g} in validation",
        "on what it has not seen it is much worse than its training numbers say",
        "too few samples for so many steps, or validation data of another kind (other cameras, other preparation)",
        case.again_or("show"), since, score[-1][0])


def _apart(train: Points, step: int, value: float, higher: bool) -> bool:
    """Whether validation was far behind training at that step."""
    then = recent([point for point in train if point[0] <= step] or train[:1], limit.RECENT)
    return then - value >= limit.GAP_DB if higher else value >= limit.GAP_LOSS * then > 0


def _settled(case: Case, *keys: str, updates: int = limit.SETTLED_UPDATES, evaluations: int = limit.EVALUATIONS
             ) -> list[Line]:
    """The last evaluations that have all of these, after so many updates; empty: there are not enough."""
    found = [line for line in case.evaluations
             if all(not isinstance(line.get(key), str) and as_number(line.get(key)) is not None for key in keys)
             and (line["applied"] if isinstance(line.get("applied"), int) else line["step"]) >= updates]
    return found[-evaluations:] if len(found) >= evaluations else []


def _all(found: list[Line], true: Callable[[Line], bool]) -> bool:
    return bool(found) and all(true(line) for line in found)


def _db(line: Line, key: str) -> str:
    return f"{line[key]:.2f} dB"
