"""Curves and histograms as PNG, drawn with pillow: no plotting library for three pictures."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_SIZE, _LEFT, _RIGHT, _TOP, _BOTTOM = (640, 480), 60, 20, 36, 48  # px
_PAPER, _INK, _PALE = (255, 255, 255), (30, 30, 30), (222, 222, 222)
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))


@dataclass(frozen=True)
class Line:
    """Points of a curve; `dashed`: as chance is drawn."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: tuple[int, int, int]
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    title: str
    x_label: str
    y_label: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    lines: list[Line] = field(default_factory=list)
    ticks: int = 5  # pieces of each axis
    legend_on_top: bool = False

    def save(self, path: Path) -> None:
        picture = Image.new("RGB", _SIZE, _PAPER)
        draw = ImageDraw.Draw(picture)
        self._axes(draw)
        for line in self.lines:
            points = [self._place(x, y) for x, y in zip(line.x, line.y)]
            if line.dashed:
                _dashed(draw, points, line.colour)
            else:
                draw.line(points, fill=line.colour, width=2)
        self._legend(draw)
        picture.save(path)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        (left, right), (low, high) = self.x_range, self.y_range
        width, height = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM
        return (_LEFT + (x - left) / (right - left) * width, _TOP + (high - y) / (high - low) * height)

    def _axes(self, draw: ImageDraw.ImageDraw) -> None:
        font = ImageFont.load_default(13)
        for tick in range(self.ticks + 1):
            x, y = (low + (high - low) * tick / self.ticks for low, high in (self.x_range, self.y_range))
            across, down = self._place(x, y)
            draw.line([(across, _TOP), (across, _SIZE[1] - _BOTTOM)], fill=_PALE)
            draw.line([(_LEFT, down), (_SIZE[0] - _RIGHT, down)], fill=_PALE)
            draw.text((across, _SIZE[1] - _BOTTOM + 5), f"{x:.3g}", fill=_INK, font=font, anchor="mt")
            draw.text((_LEFT - 6, down), f"{y:.3g}", fill=_INK, font=font, anchor="rm")
        draw.rectangle((_LEFT, _TOP, _SIZE[0] - _RIGHT, _SIZE[1] - _BOTTOM), outline=_INK)
        draw.text((_SIZE[0] / 2, 10), self.title, fill=_INK, font=ImageFont.load_default(15), anchor="mt")
        draw.text((_SIZE[0] / 2, _SIZE[1] - 8), self.x_label, fill=_INK, font=font, anchor="mb")
        draw.text((6, _TOP - 6), self.y_label, fill=_INK, font=font, anchor="lb")

    def _legend(self, draw: ImageDraw.ImageDraw) -> None:
        font = ImageFont.load_default(13)
        left = _SIZE[0] - _RIGHT - 10 - max(draw.textlength(line.name, font) for line in self.lines)
        height = 18 * len(self.lines)
        top = _TOP + 8 if self.legend_on_top else _SIZE[1] - _BOTTOM - 8 - height
        draw.rectangle((left - 30, top, _SIZE[0] - _RIGHT - 6, top + height), fill=_PAPER)
        for row, line in enumerate(self.lines):
            draw.line([(left - 26, top + 18 * row + 9), (left - 6, top + 18 * row + 9)], fill=line.colour, width=2)
            draw.text((left, top + 18 * row + 9), line.name, fill=_INK, font=font, anchor="lm")


def histogram(name: str, values: Sequence[float], edges: Sequence[float], colour: tuple[int, int, int]) -> Line:
    """The share of the values between neighbouring edges, as an outline."""
    counts = [0] * (len(edges) - 1)
    low, step = edges[0], edges[1] - edges[0]
    for value in values:
        counts[min(len(counts) - 1, max(0, int((value - low) / step)))] += 1
    shares = [count / max(1, len(values)) for count in counts]
    x = [edge for pair in zip(edges, edges[1:]) for edge in pair]
    return Line(name, x, [share for share in shares for _ in range(2)], colour)


def _dashed(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    """Dashes along straight pieces of 8 px."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        pieces = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / 8))
        for piece in range(0, pieces, 2):
            ends = [(x0 + (x1 - x0) * part / pieces, y0 + (y1 - y0) * part / pieces) for part in (piece, piece + 1)]
            draw.line(ends, fill=colour, width=2)
