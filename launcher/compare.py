"""What differs between jobs, and how well each did: from their configs and the metrics that their nodes have."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.node.curves import curves
from configs.errors import NO_VALUE
from configs.load import ABSENT, diff, look_up
from configs.yaml12 import parse
from launcher import control
from launcher.index import Index, Job
from launcher.jobs import JobStatus, find_all
from launcher.plots import Curve
from launcher.views import point

_POINTS = 400  # of a curve
_PANELS = 6
_DRAWN = ("loss", "val/psnr", "val/loss", "psnr", "val/ssim", "val/lpips", "lr")
_NOT_DRAWN = ("_white", "_mean", "_copy", "_vae", "_chance", "/objects", "/images")  # the same at every step
RECENT = 50  # logged steps that a training value is the mean of: one step alone says little
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
    skipped: Number = None  # updates that were not finite or exploded
    lr: Number = None  # of the last update
    s_step: Number = None
    curve: tuple[float, ...] = ()  # val/psnr of every evaluation, else loss of the steps


@dataclass(frozen=True)
class Compared:
    job: JobStatus
    config: dict[str, Any]  # empty: it has none
    code: str  # commit or digest
    learned: Learned
    curves: dict[str, Curve] = field(default_factory=dict)  # of each metric


@dataclass(frozen=True)
class Comparison:
    """`config`: dotted key -> its value in each job, of the keys that differ (ABSENT: it is not there)."""

    jobs: tuple[Compared, ...]
    config: dict[str, tuple[Any, ...]]


def compare(index: Index, words: Sequence[str], start: Path) -> Comparison:
    """Jobs, or all of a sweep or pipeline by its name. Raises Wrong, Unreachable."""
    found = {job.key: job for word in words for job in find_all(index, word)}
    jobs = tuple(_ask(index, job, start) for job in found.values())
    return Comparison(jobs, differences([one.config for one in jobs]))


def _ask(index: Index, job: Job, start: Path) -> Compared:
    backend = control.node_and_backend(job, start)[1]
    shown = backend.show(job.run_dir)
    status = control.heard(index, job, shown["view"])
    text = shown["config"] or ""
    config = parse(text, f"config.yaml of {job.id}").data if text.strip() else {}
    recorded = {**((shown["spec"] or {}).get("code") or {}), **(shown.get("code") or {})}
    code = recorded.get("digest") or recorded.get("git_sha") or ""
    lines = backend.metrics(job.run_dir)
    return Compared(status, config if isinstance(config, dict) else {}, code, learned(lines), curves(lines, _POINTS))


def panels(jobs: Sequence[Compared]) -> dict[str, dict[str, Curve]]:
    """What a drawing shows: metric -> {what a job is called: its curve}, of the metrics worth comparing."""
    found: dict[str, dict[str, Curve]] = {}
    for one in jobs:
        name = point((one.job.group or {}).get("point") or {}) or one.job.name or one.job.id
        for key, curve in one.curves.items():
            if (key.startswith("val/") or key in _DRAWN) and not key.endswith(_NOT_DRAWN):
                found.setdefault(key, {})[f"{one.job.id}  {name}" if name != one.job.id else name] = curve
    order = sorted(found, key=lambda key: (_DRAWN.index(key) if key in _DRAWN else len(_DRAWN), key))
    return {key: found[key] for key in order[:_PANELS]}


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The leaves in which any two differ."""
    keys = {key: None for other in configs[1:] for key, _, _ in diff(configs[0], other)}
    return {key: tuple(_leaf(config, key) for config in configs) for key in keys}


def _leaf(config: dict[str, Any], key: str) -> Any:
    value = look_up(config, tuple(key.split(".")))
    return ABSENT if value is NO_VALUE else value


def learned(lines: Sequence[dict[str, Any]]) -> Learned:
    """The numbers of merged metrics."""
    steps = [line for line in lines if "event" not in line]
    evaluations = [line for line in lines if line.get("event") == "eval"]
    last = evaluations[-1] if evaluations else {}
    applied, skipped = _last(steps, "applied"), sum(line.get("event") == "skipped" for line in lines)
    speed, best = _last(steps, "it_s"), _numbers(evaluations, "val/psnr")
    return Learned(
        step=_last(lines, "step"), loss=_recent(steps, "loss"), psnr=_recent(steps, "psnr"),
        val_psnr=_number(last.get("val/psnr")), val_psnr_best=max(best, default=None),
        val_psnr_input=_number(last.get("val/psnr_input")), val_ssim=_number(last.get("val/ssim")),
        val_ssim_input=_number(last.get("val/ssim_input")), val_lpips=_number(last.get("val/lpips")),
        val_psnr_white=_number(last.get("val/psnr_white")), val_psnr_mean=_number(last.get("val/psnr_mean")),
        val_psnr_copy=_number(last.get("val/psnr_copy")),
        applied=applied, attempted=None if applied is None else applied + skipped,
        skipped=skipped if steps or skipped else None, lr=_last(steps, "lr"),
        s_step=1 / speed if speed else None, curve=tuple(best) if len(best) > 1 else tuple(_numbers(steps, "loss")))


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
