"""One picture of a data set for people: a row a sample, its views side by side, in red what no other view explains."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from jobs.data.lists import listings
from jobs.data.multiview import read_rgba
from jobs.data.rigs import rig_of
from jobs.data.samples import Sample, read_sample
from jobs.runtime import JobError
from models import hull

_CELL = 128  # px of a view; also the size at which silhouettes are compared
_CAPTION = 14  # px of a line of text
ROWS, _COLUMNS = 12, 8
_MARKED = 2048  # silhouette pixels tested per view: of a larger silhouette every second or third
_PAPER, _INK, _BAD, _RED = (255, 255, 255), (20, 20, 20), (190, 20, 20), (230, 30, 30)


def make_sheet(rows: Sequence[tuple[Sample, str, bool]], path: Path) -> None:
    """Write a PNG of (sample, caption, whether it is good) rows. Raises JobError: a picture cannot be read, or `path`
    not written."""
    strips = [_strip(*row) for row in rows]
    width = max((strip.width for strip in strips), default=_CELL)
    sheet = Image.new("RGB", (width, max(1, sum(strip.height for strip in strips))), _PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise JobError(f"contact sheet {path}: {error.strerror or error}", "name a file in a folder that exists"
                       ) from None


def sheet_of(data: Path, path: Path) -> None:
    """A sheet of the first samples of a data set. Raises JobError."""
    entries = [entry for listing in listings(data) for entry in listing.entries][:ROWS]
    make_sheet([(read_sample(entry.name, entry.directory), entry.name, True) for entry in entries], path)


def _strip(sample: Sample, caption: str, good: bool) -> Image.Image:
    rig = rig_of(sample).resized(_CELL, _CELL)
    cells, alpha = zip(*(_cell(sample.name, frame.image) for frame in sample.frames))
    fractions, marked = _mark(list(cells), torch.from_numpy(np.stack(alpha)).float() / 255, rig.c2w, rig.fxfycxcy)
    shown = _columns(fractions, len(marked))
    strip = Image.new("RGB", (len(shown) * (_CELL + 2), _CELL + 2 * _CAPTION + 4), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((2, 1), caption, fill=_INK if good else _BAD)
    for column, view in enumerate(shown):
        left = column * (_CELL + 2)
        strip.paste(Image.fromarray(marked[view]), (left, _CAPTION))
        said = f"{rig.names[view]} {fractions[view]:.3f}" if fractions else rig.names[view]
        draw.text((left + 2, _CAPTION + _CELL + 1), said, fill=_INK)
    return strip


def _columns(fractions: list[float], views: int) -> list[int]:
    """The views to show: all, or some evenly spread and the worst one."""
    shown = np.linspace(0, views - 1, min(_COLUMNS, views)).round().astype(int).tolist()
    if fractions:
        worst = int(np.argmin(fractions))
        nearest = min(range(len(shown)), key=lambda column: abs(shown[column] - worst))
        shown[nearest] = worst
    return shown


def _cell(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """RGB [_CELL, _CELL, 3] over white, and alpha [_CELL, _CELL], both uint8."""
    rgba = read_rgba(name, path)
    white = Image.new("RGBA", rgba.shape[1::-1], (255, 255, 255, 255))
    white.alpha_composite(Image.fromarray(rgba))
    size = (_CELL, _CELL)
    alpha = Image.fromarray(np.ascontiguousarray(rgba[..., 3]))
    return np.array(white.convert("RGB").resize(size)), np.asarray(alpha.resize(size, Image.Resampling.BOX))


def _mark(cells: list[np.ndarray], alpha: torch.Tensor, c2w: torch.Tensor,
          fxfycxcy: torch.Tensor) -> tuple[list[float], list[np.ndarray]]:
    """The explained fraction of each view, and its picture with the unexplained pixels in red."""
    if len(cells) < 2:
        return [], cells
    views = hull.tested(alpha, c2w, fxfycxcy, rays_at_most=_MARKED)
    for cell, view in zip(cells, views):
        cell.reshape(-1, 3)[view.pixels[~view.explained].numpy()] = _RED
    return [view.fraction for view in views], cells
