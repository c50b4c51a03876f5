"""`launch compare` as text and as an object."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from configs.load import ABSENT
from launcher.compare import Compared, Comparison, Learned, Number
from launcher.views import aligned, cut, number, point, visible

_SPARKS = "▁▂▃▄▅▆▇█"
_CURVE_COLUMNS = 16
_VALUE_COLUMNS = 40


def as_object(found: Comparison) -> dict[str, Any]:
    """`config`: key -> {job id: value}, without the jobs that lack the key."""
    jobs = [{"id": one.job.id, "name": one.job.name, "stage": one.job.stage, "state": one.job.state,
             "point": _points(one), "code": one.code, **asdict(one.learned)} for one in found.jobs]
    config = {key: {one.job.id: value for one, value in zip(found.jobs, values) if value is not ABSENT}
              for key, values in found.config.items()}
    return {"jobs": jobs, "config": config}


def as_text(found: Comparison) -> str:
    """Two tables: what differs, what came out. A column that is empty for every job is left out."""
    return "\n\n".join(filter(None, [_config(found), _results(found.jobs)]))


def _config(found: Comparison) -> str:
    rows = {key: [_value(value) for value in values] for key, values in found.config.items()}
    codes = [one.code[:12] or "-" for one in found.jobs]
    if len(set(codes)) > 1:
        rows = {"(code)": codes, **rows}
    ids = [one.job.id for one in found.jobs]
    if not rows:
        return "the configs are the same" if len(ids) > 1 else ""
    if len(ids) > len(rows):  # many points of a few keys
        return aligned({"job": ids, **rows}, numbers=())
    columns = {name: list(cells) for name, cells in zip(ids, zip(*rows.values()))}
    return aligned({"key": list(rows), **columns}, numbers=())


def _results(jobs: Sequence[Compared]) -> str:
    table = {"job": [one.job.id for one in jobs],
             "name": [visible(point(_points(one)) or one.job.name or "") for one in jobs],
             "state": [one.job.state for one in jobs],
             **{title: [cell(one.learned) for one in jobs] for title, cell in _COLUMNS.items()}}
    kept = {title: cells for title, cells in table.items() if any(cells)}
    return aligned(kept, numbers=_COLUMNS.keys() - {"curve"})


def _points(one: Compared) -> dict[str, str]:
    return (one.job.group or {}).get("point") or {}


def _value(value: Any) -> str:
    if value is ABSENT:
        return "-"
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return cut(visible(text), _VALUE_COLUMNS)


def _fixed(digits: int, of: Callable[[Learned], Number]) -> Callable[[Learned], str]:
    def cell(learned: Learned) -> str:
        value = of(learned)
        return "" if value is None else f"{value:.{digits}f}"
    return cell


def _applied(learned: Learned) -> str:
    return "" if learned.attempted is None else f"{learned.applied:g}/{learned.attempted:g}"


def sparkline(values: Sequence[float], columns: int = _CURVE_COLUMNS) -> str:
    """The course of a number in one line, from its lowest to its highest; each column is a mean."""
    if len(values) < 2:
        return ""
    columns = min(columns, len(values))
    cuts = [i * len(values) // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_SPARKS[int((mean - low) / span * (len(_SPARKS) - 1) + 0.5)] for mean in means)


_COLUMNS: dict[str, Callable[[Learned], str]] = {
    "step": _fixed(0, lambda one: one.step),
    "psnr": _fixed(2, lambda one: one.psnr),
    "val psnr": _fixed(2, lambda one: one.val_psnr),
    "best": _fixed(2, lambda one: one.val_psnr_best),
    "inputs": _fixed(2, lambda one: one.val_psnr_input),
    "val ssim": _fixed(3, lambda one: one.val_ssim),
    "val lpips": _fixed(3, lambda one: one.val_lpips),
    "copy": _fixed(2, lambda one: one.val_psnr_copy),
    "white": _fixed(2, lambda one: one.val_psnr_white),
    "mean": _fixed(2, lambda one: one.val_psnr_mean),
    "applied": _applied,
    "skipped": _fixed(0, lambda one: one.skipped),
    "lr": lambda one: number(one.lr, 3),
    "s/step": lambda one: number(one.s_step, 3),
    "loss": lambda one: number(one.loss),
    "curve": lambda one: sparkline(one.curve),
}
