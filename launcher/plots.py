"""Curves: in a terminal (braille), as SVG, as a PNG. A curve is [step, lowest, mean, highest] per stretch of steps."""
from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from launcher.errors import Failed
from launcher.views import number

Curve = list[list[float]]  # of [step, lowest, mean, highest]

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character: column, row
_SPREAD = 20.0  # highest over lowest, from which on a scale by powers of ten is read better
_LINEAR = ("lr",)  # but for these: the shape of a schedule is known


def terminal(title: str, curve: Curve, width: int, rows: int,
             marked: tuple[int | None, int | None] = (None, None), until: int | None = None,
             level: float | None = None) -> str:
    """`title` over a plot of `rows` lines, its steps below; `marked` are the steps of a finding, drawn as a bar.

    `until`: the job's newest step, where it has no value any more; `level`: what the values are held against, dotted.
    By powers of ten where the values are positive and far apart.
    """
    shown = [one[2] for one in curve] + around(level)
    by_tens = _far_apart(min(shown), max(shown), title)
    points = [(one[0], math.log10(one[2]) if by_tens else one[2]) for one in curve]
    low, high = _range([math.log10(value) if by_tens else value for value in shown])
    labels = distinct([10 ** value if by_tens else value for value in (high, low)])
    labels[1:1] = [""] * (rows - 2)
    left = max(map(len, labels))
    columns = max(8, width - left - 2)
    grid = [[0] * columns for _ in range(rows)]
    first, last = curve[0][0], max(curve[-1][0], until or 0)
    if level is not None:
        y = round((high - (math.log10(level) if by_tens else level)) / (high - low) * (4 * rows - 1))
        for x in range(0, 2 * columns, 4):
            grid[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    for x, y in _dots(points, (first, last), (low, high), 2 * columns, 4 * rows):
        grid[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    lines = [f"{label:>{left}} ┤" + "".join(chr(0x2800 + cell) for cell in row).rstrip("\u2800")
             for label, row in zip(labels, grid)]
    begin, end = f"{first:g}", f"step {last:g}"
    below = " " * (left + 2) + begin + " " * max(1, columns - len(begin) - len(end)) + end
    bar = _bar(marked, (first, last), columns)
    head = f"{title} (by powers of ten)" if by_tens else title
    head += "" if level is None else f"; dotted: {number(level)}"
    return "\n".join([head, *lines, *([" " * (left + 2) + bar] if bar else []), below])


def around(level: float | None) -> list[float]:
    """What a drawing shows besides the values, so that a curve on that level does not look like a mountain range."""
    return [] if level is None else [level - abs(level) / 10, level, level + abs(level) / 10]


def distinct(values: Sequence[float]) -> list[str]:
    """Labels of as many digits as it takes to tell the values apart, three at least."""
    found = ([number(round(value, 12), digits) for value in values] for digits in range(3, 8))
    return next((labels for labels in found if len(set(labels)) == len(labels)), [number(value, 8) for value in values])


def _far_apart(low: float, high: float, title: str) -> bool:
    return title not in _LINEAR and low > 0 and high / low > _SPREAD


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10)


def _dots(points: Sequence[tuple[float, float]], across: tuple[float, float], up: tuple[float, float], width: int,
          height: int) -> set[tuple[int, int]]:
    """The cells of a line through `points`, (0, 0) at the upper left."""
    found: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for step, value in points:
        x = round((step - across[0]) / ((across[1] - across[0]) or 1) * (width - 1))
        y = round((up[1] - value) / (up[1] - up[0]) * (height - 1))
        found.add((x, y))
        if before and x - before[0] > 0:
            found |= {(column, round(before[1] + (y - before[1]) * (column - before[0]) / (x - before[0])))
                      for column in range(before[0], x)}
        before = (x, y)
    return found


def _bar(marked: tuple[int | None, int | None], across: tuple[float, float], columns: int) -> str:
    """Under which columns the steps of a finding are; nothing when it is about all of them."""
    if marked[0] is None or marked[1] is None or across[1] <= across[0]:
        return ""
    begin, end = (min(1.0, max(0.0, (step - across[0]) / (across[1] - across[0]))) * (columns - 1) for step in marked)
    return "" if end - begin > 0.9 * columns else " " * int(begin) + "▔" * max(1, int(end) - int(begin) + 1)


# --- SVG ----------------------------------------------------------------------------------------------------

_FEW = 24  # points: each has a dot of its own
_W, _H, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 220, 58, 24, 10, 12
INKS = tuple(f"var(--{letter})" for letter in "abcdefgh")  # colours of the page that it stands on


def svg(title: str, curves: dict[str, Curve], marks: Sequence[tuple[int, int]] = (),
        resumes: Sequence[int] = (), until: int | None = None, level: float | None = None) -> str:
    """One drawing of some curves over their steps. `marks`: steps of findings, as bands; `resumes`: dotted lines.

    `until`: the job's newest step, where they have no value any more; `level`: what the values are held against.
    By powers of ten where the values are positive and far apart. A band behind a line is its lowest to highest.
    """
    shown = {name: curve for name, curve in curves.items() if curve}
    steps = [one[0] for curve in shown.values() for one in curve]
    values = sorted([*(one[2] for curve in shown.values() for one in curve), *around(level)])
    scale = Scale(min(steps), max(*steps, until or 0), values, title)
    parts = [f'<rect class="mark" x="{scale.x(a):.1f}" y="{_TOP}" width="{max(2.0, scale.x(b) - scale.x(a)):.1f}" '
             f'height="{_H - _TOP - _BOTTOM}"/>' for a, b in marks]
    parts += [f'<line class="resume" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_H - _BOTTOM}"/>'
              for x in (scale.x(step) for step in resumes if scale.first < step <= scale.last)]
    ticks = scale.ticks()
    parts += [line for value, words in zip(ticks, distinct(ticks)) for line in _tick(scale, value, words)]
    parts += [] if level is None else _level(scale, level)
    for ink, curve in zip(cycle(INKS), shown.values()):
        parts += _line(scale, curve, ink)
    parts += [f'<text x="{_LEFT}" y="{_H - 6}">{scale.first:g}</text>',
              f'<text x="{_W - _RIGHT}" y="{_H - 6}" text-anchor="end">step {scale.last:g}</text>']
    words = ", ".join(f"{name}: from {number(curve[0][2])} to {number(curve[-1][2])}" for name, curve in shown.items())
    label = html.escape(f"{title}; {words}", quote=True)
    frame = (f'data-last="{scale.last:.0f}" data-left="{_LEFT}" data-right="{_W - _RIGHT}" data-top="{_TOP}" '
             f'data-bottom="{_H - _BOTTOM}"')
    return f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{label}" {frame}>{"".join(parts)}</svg>'


class Scale:
    """Steps and values to places on the drawing."""

    def __init__(self, first: float, last: float, values: Sequence[float], title: str) -> None:
        self.first, self.last = first, last
        low, high = values[0], values[-1]
        self.by_tens = _far_apart(low, high, title)
        self.low, self.high = (math.log10(low), math.log10(high)) if self.by_tens else _range([low, high])

    def x(self, step: float) -> float:
        inside = min(self.last, max(self.first, step))
        return _LEFT + (inside - self.first) / ((self.last - self.first) or 1) * (_W - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        height = math.log10(max(value, 1e-300)) if self.by_tens else value
        share = min(1.0, max(0.0, (height - self.low) / ((self.high - self.low) or 1)))
        return _H - _BOTTOM - share * (_H - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        if self.by_tens:
            tens = [10.0 ** k for k in range(math.ceil(self.low), math.floor(self.high) + 1)]
            return tens[::max(1, len(tens) // 4)] or [10 ** self.low, 10 ** self.high]
        unit = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        step = next(unit * by for by in (1, 2, 5, 10) if (self.high - self.low) / (unit * by) <= 6)
        return [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _level(scale: Scale, value: float) -> list[str]:
    y = scale.y(value)
    return [f'<line class="level" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text x="{_W - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">chance: {number(value)}</text>']


def _tick(scale: Scale, value: float, words: str) -> list[str]:
    y = scale.y(value)
    return [f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>']


def _line(scale: Scale, curve: Curve, ink: str) -> list[str]:
    upper = [f"{scale.x(step):.1f},{scale.y(high):.1f}" for step, _, _, high in curve]
    lower = [f"{scale.x(step):.1f},{scale.y(low):.1f}" for step, low, _, _ in curve]
    middle = [f"{scale.x(step):.1f},{scale.y(mean):.1f}" for step, _, mean, _ in curve]
    around = " ".join([*upper, *reversed(lower)])
    band = [] if upper == lower else [f'<polygon points="{around}" fill="{ink}" class="band"/>']
    dots = [f'<circle cx="{scale.x(step):.1f}" cy="{scale.y(mean):.1f}" r="2.5" fill="{ink}"/>'
            for step, _, mean, _ in curve] if len(curve) <= _FEW else []
    return [*band, f'<polyline points="{" ".join(middle)}" stroke="{ink}" class="line"/>', *dots]


# --- PNG ----------------------------------------------------------------------------------------------------

_INKS = ((31, 119, 180), (214, 90, 20), (44, 140, 70), (190, 40, 60), (120, 80, 170), (110, 80, 60), (20, 150, 160),
         (90, 90, 90))
_GREY = (90, 90, 90)
_PX, _PANEL, _MARGIN, _ROW = 1200, 360, 70, 24


def png(path: Path, panels: dict[str, dict[str, Curve]]) -> None:
    """Draw `panels`: title -> {name of a line: curve}, one below the other. Raises Failed: no Pillow, not writable."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise Failed("a PNG is drawn by Pillow, which is not installed here", hint="pip install pillow") from None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    inks = {name: _INKS[i % len(_INKS)] for i, name in enumerate(names)}
    whole = Image.new("RGB", (_PX, _PANEL * len(panels) + _ROW * (1 + len(names))), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(15)
    for i, (title, lines) in enumerate(panels.items()):
        _panel(draw, font, title, lines, inks, i * _PANEL)
    for i, name in enumerate(names):
        y = _PANEL * len(panels) + _ROW * i + 6
        draw.line([(_MARGIN, y + 9), (_MARGIN + 30, y + 9)], fill=inks[name], width=3)
        draw.text((_MARGIN + 40, y), name, fill="black", font=font)
    try:
        whole.save(path, format="PNG")
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror or error}") from None


def _panel(draw, font, title: str, lines: dict[str, Curve], inks: dict[str, tuple[int, int, int]], top: int) -> None:
    scale = Scale(min(c[0][0] for c in lines.values()), max(c[-1][0] for c in lines.values()),
                  sorted(one[2] for curve in lines.values() for one in curve), title)

    def at(step: float, value: float) -> tuple[float, float]:
        x = (scale.x(step) - _LEFT) / (_W - _LEFT - _RIGHT) * (_PX - 2 * _MARGIN) + _MARGIN
        return x, (scale.y(value) - _TOP) / (_H - _TOP - _BOTTOM) * (_PANEL - 80) + top + 36

    draw.text((_MARGIN, top + 8), title, fill="black", font=font)
    for value, words in zip(scale.ticks(), distinct(scale.ticks())):
        _, y = at(scale.first, value)
        draw.line([(_MARGIN, y), (_PX - _MARGIN, y)], fill=(225, 225, 225))
        draw.text((_MARGIN - 8, y), words, fill=_GREY, font=font, anchor="rm")
    for step, anchor in ((scale.first, "la"), (scale.last, "ra")):
        x, _ = at(step, 1.0)
        words = f"{step:g}" if anchor == "la" else f"step {step:g}"
        draw.text((x, top + _PANEL - 38), words, fill=_GREY, font=font, anchor=anchor)
    for name, curve in lines.items():
        points = [at(one[0], one[2]) for one in curve]
        draw.line(points, fill=inks[name], width=2, joint="curve")
        if len(points) <= _FEW:
            for x, y in points:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=inks[name])
