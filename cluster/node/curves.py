"""Metrics as curves that are short enough to be sent and drawn."""
from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.node.findings import Line, Points

_MOST = 40  # metrics
_NO_CURVE = ("t", "step", "total", "eta_s", "samples", "save_s")
_VERDICTS = ("weights", "gradients")  # events that are said once


def curves(lines: Sequence[Line], points: int) -> dict[str, list[list[float]]]:
    """Each metric as [step, lowest, mean, highest] of at most so many stretches of equal numbers of lines."""
    found: dict[str, Points] = {}
    for line in lines:
        if line.get("event") in _VERDICTS:
            continue
        for key, value in line.items():
            if type(value) in (float, int) and key not in _NO_CURVE and math.isfinite(value):
                found.setdefault(key, []).append((line["step"], value))
    return {key: shortened(values, points) for key, values in list(found.items())[:_MOST]}


def shortened(values: Points, points: int) -> list[list[float]]:
    count = min(points, len(values))
    cuts = [i * len(values) // count for i in range(count + 1)] if count else []
    parts = [values[a:b] for a, b in zip(cuts, cuts[1:])]
    return [[part[-1][0], min(v for _, v in part), sum(v for _, v in part) / len(part), max(v for _, v in part)]
            for part in parts]
