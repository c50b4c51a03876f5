"""What jobs have learned, as numbers: from the evaluations and the last steps of their metrics."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.plots import Curve

RECENT = 50  # logged steps that a training value is the mean of: one step alone says little
BASELINES = ("_white", "_mean", "_copy", "_vae", "_chance", "/objects", "/images")  # the same at every step
# What the first word of a metric's name says about which of its values is the best; other names do not say it.
_HIGHER = frozenset({"psnr", "ssim", "acc", "accuracy", "auc", "f1", "recall", "precision", "map", "iou", "match",
                     "score", "win", "gap", "f2v", "v2f", "r1", "r5", "r10", "top1", "top5"})
_LOWER = frozenset({"loss", "lpips", "fid", "error", "eer", "wer", "cer", "mse", "mae", "rmse", "perplexity", "nll"})
_NO_AIM = ("_copied", "_other")  # how near pictures are to what they should not be
Number = float | int | None


@dataclass(frozen=True)
class Learned:
    """The numbers of one job; None: it has not said. PSNR in dB; val: of the last evaluation."""

    step: Number = None
    loss: Number = None  # mean of the last steps, as psnr
    psnr: Number = None  # of training pictures
    val_psnr: Number = None  # of views that were not put in
    val_psnr_best: Number = None
    val_psnr_input: Number = None  # of views that were put in; never to be compared with the others
    val_ssim: Number = None
    val_ssim_input: Number = None
    val_lpips: Number = None
    val_psnr_white: Number = None  # what the white picture scores
    val_psnr_mean: Number = None  # what the mean training picture scores
    val_psnr_copy: Number = None  # what the picture that was put in scores
    applied: Number = None  # updates
    attempted: Number = None  # updates
    skipped: Number = None  # updates that were not finite or exploded; a program that counts no updates says nothing
    lr: Number = None  # of the last update
    s_step: Number = None
    curve: tuple[float, ...] = ()  # val/psnr of every evaluation, else loss of the steps
    evaluated: dict[str, dict[str, Number]] = field(default_factory=dict)  # every val/… -> {last, best}


def learned(lines: Sequence[dict[str, Any]], skipped: int, curves: Mapping[str, Curve]) -> Learned:
    """The numbers of a series of metrics, of which the evaluations and the last steps are enough; `skipped` updates."""
    steps = [line for line in lines if "event" not in line]
    evaluations = [line for line in lines if line.get("event") == "eval"]
    last = evaluations[-1] if evaluations else {}
    applied, speed = _last(steps, "applied"), _last(steps, "it_s")
    best = _numbers(evaluations, "val/psnr")
    return Learned(
        step=_last(lines, "step"), loss=_recent(steps, "loss"), psnr=_recent(steps, "psnr"),
        val_psnr=_number(last.get("val/psnr")), val_psnr_best=max(best, default=None),
        val_psnr_input=_number(last.get("val/psnr_input")), val_ssim=_number(last.get("val/ssim")),
        val_ssim_input=_number(last.get("val/ssim_input")), val_lpips=_number(last.get("val/lpips")),
        val_psnr_white=_number(last.get("val/psnr_white")), val_psnr_mean=_number(last.get("val/psnr_mean")),
        val_psnr_copy=_number(last.get("val/psnr_copy")),
        applied=applied, attempted=None if applied is None else applied + skipped,
        skipped=skipped if applied is not None or skipped else None, lr=_last(steps, "lr"),
        s_step=1 / speed if speed else None,
        curve=tuple(best) if len(best) > 1 else tuple(mean for _, _, mean, _ in curves.get("loss", ())),
        evaluated=_evaluated(evaluations or steps))


def best_of(key: str, values: Sequence[float]) -> Number:
    """None: the name does not say which is better."""
    word = key.rpartition("/")[2].partition("_")[0]
    if key.endswith(_NO_AIM):
        return None
    return max(values) if word in _HIGHER else min(values) if word in _LOWER else None


def _evaluated(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Number]]:
    """A program whose output is read has no lines of evaluations: its val/… stand in those of its steps."""
    keys = {key: None for line in lines for key in line if key.startswith("val/") and not key.endswith(BASELINES)}
    found = {key: values for key in keys if (values := _numbers(lines, key))}
    return {key: {"last": values[-1], "best": best_of(key, values)} for key, values in found.items()}


def _number(value: Any) -> Number:
    """JSON lacks nan and inf, so they come as words: no number to compare."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [value for line in lines if (value := _number(line.get(key))) is not None]


def _last(lines: Sequence[dict[str, Any]], key: str) -> Number:
    return next(iter(_numbers(list(reversed(lines)), key)), None)


def _recent(lines: Sequence[dict[str, Any]], key: str) -> Number:
    values = _numbers(lines, key)[-RECENT:]
    return sum(values) / len(values) if values else None
