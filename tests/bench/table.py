"""One line per figure: what it is, what was measured, against what, and whether the goal was met."""
from __future__ import annotations

from dataclasses import dataclass

_WIDTHS = (46, 26, 32, 7, 22)


@dataclass(frozen=True)
class Row:
    what: str
    measured: str
    reference: str = "-"
    ratio: float | None = None  # measured / reference
    goal: str = "-"
    met: bool | None = None  # None: a figure without a goal


def header() -> str:
    return _columns("what", "measured", "reference, same run", "ratio", "goal", "result")


def line(row: Row) -> str:
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    result = {True: "met", False: "NOT MET", None: ""}[row.met]
    return _columns(row.what, row.measured, row.reference, ratio, row.goal, result)


def _columns(*cells: str) -> str:
    padded = [f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS)]
    return "  " + " | ".join([*padded, *cells[len(_WIDTHS):]]).rstrip()
