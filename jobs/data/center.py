"""`python -m jobs.data center DATA OUT`: crop all views around the object, at one scale, intrinsics updated.

The window has one side in all views of a sample (a mouse near a camera stays larger there), lies inside the frame
(nothing is invented beyond it) and moves cx, cy; the resize scales fx, fy, cx, cy. By default every sample has its
own windows and so its own rig; `--one-window` takes one window per view for the whole data set and keeps one rig.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jobs.data.lists import METADATA, Entry, each, listings
from jobs.data.multiview import read_rgba
from jobs.data.options import add_report
from jobs.data.rigs import rig_of
from jobs.data.samples import CAMERAS, BadSample, Sample, read_cameras, read_sample
from jobs.data.sheet import sheet_of
from jobs.data.writing import derive, write_cameras
from jobs.runtime import JobError
from models.cameras import Rig

_MASK = 12  # alpha of 255: fainter is the noise of a segmentation
Box = tuple[int, int, int, int]  # left, top, right, bottom px; right and bottom excluded


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("center", help="crop all views around the object at one scale")
    parser.add_argument("data", type=Path, help="a list file, or the folder of a data set")
    parser.add_argument("out", type=Path, help="a directory to make")
    parser.add_argument("--size", type=int, help="px of the new pictures (default: as they are)")
    parser.add_argument("--margin", type=float, default=0.1, help="room around the object, of its size (0.1)")
    parser.add_argument("--one-window", action="store_true", help="the same windows for all samples: one rig")
    add_report(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Plan:
    size: int | None
    margin: float
    boxes: tuple[Box, ...] | None  # of each view, for all samples; None: each sample has its own


@dataclass(frozen=True)
class Cropped:
    """One sample: the side of its windows before the resize and the size after it, px."""

    side: int
    size: int
    rig: str


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    if not 0 <= given.margin <= 2 or (given.size is not None and given.size < 8):
        raise JobError("--margin must be between 0 and 2 and --size at least 8 px")
    lists = listings(given.data)
    boxes = None
    if given.one_window:
        entries = [entry for listing in lists for entry in listing.entries]
        boxes = _union(each(boxes_of, entries, given.workers, "silhouettes"))
    plan = Plan(given.size, given.margin, boxes)
    made = {"made_by": "jobs.data center", "from": str(given.data.resolve()),
            **json.loads(json.dumps(asdict(plan)))}  # tuples become lists, as they will be read
    found = derive(lists, given.out, made, partial(_write, plan), given.workers)
    if given.sheet:
        sheet_of(given.out, given.sheet)
    sides = sorted(one.side for one in found)
    report = {"samples": len(found), "side_px": [sides[0], statistics.median(sides), sides[-1]],
              "size_px": found[0].size, "rigs": len({one.rig for one in found})}
    print(json.dumps(report, indent=1) if given.json else
          f"{given.out}: {len(found)} samples; windows of {sides[0]} to {sides[-1]} px became {found[0].size} px; "
          f"{report['rigs']} rigs")
    return 0


def boxes_of(entry: Entry) -> tuple[int, tuple[Box, ...]]:
    """(px of the pictures, the box of the silhouette in each view). Raises BadSample."""
    sample = read_sample(entry.name, entry.directory)
    sizes = {frame.size for frame in sample.frames}
    if len(sizes) > 1:
        raise BadSample(sample.name, CAMERAS, f"its pictures have different sizes: {sorted(sizes)} px",
                        "resize them to one size first: one scale for all views needs it")
    return sizes.pop(), tuple(_box(read_rgba(sample.name, frame.image)) for frame in sample.frames)


def _box(rgba: np.ndarray) -> Box:
    mask = rgba[..., 3] > min(_MASK, int(rgba[..., 3].max()) - 1)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _union(found: Iterable[tuple[int, tuple[Box, ...]]]) -> tuple[Box, ...]:
    """The boxes of each view that hold those of all samples. Raises JobError when sizes or views differ."""
    union: np.ndarray | None = None
    first: tuple[int, int] | None = None
    for size, boxes in found:
        first = first or (size, len(boxes))
        if (size, len(boxes)) != first:
            raise JobError(f"--one-window: pictures of {first[0]} and of {size} px, {first[1]} and {len(boxes)} views",
                           "one window for all needs one size and the same views")
        table = np.array(boxes)
        union = table if union is None else np.concatenate(
            [np.minimum(union[:, :2], table[:, :2]), np.maximum(union[:, 2:], table[:, 2:])], 1)
    return tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in (union if union is not None else []))


def windows(boxes: tuple[Box, ...], size: int, margin: float) -> tuple[int, list[tuple[int, int]]]:
    """(side px, the left and top px of each view's window): one side for all, around the boxes, inside the frame."""
    largest = max(max(right - left, bottom - top) for left, top, right, bottom in boxes)
    side = min(size, math.ceil(largest * (1 + 2 * margin)))
    corners = []
    for left, top, right, bottom in boxes:
        middle = (left + right - side) / 2, (top + bottom - side) / 2
        corners.append(tuple(min(max(round(value), 0), size - side) for value in middle))
    return side, [(x, y) for x, y in corners]


def cropped(rig: Rig, side: int, corners: list[tuple[int, int]], size: int) -> Rig:
    """The rig of pictures cut to side x side px at `corners` and resized to size x size."""
    fxfycxcy = rig.fxfycxcy.double().clone()
    fxfycxcy[:, 2:] -= torch.tensor(corners, dtype=torch.float64)
    cut = replace(rig, fxfycxcy=fxfycxcy.float(), width=side, height=side)
    return cut.resized(size, size)


def crop(rgba: np.ndarray, corner: tuple[int, int], side: int, size: int) -> Image.Image:
    """RGBA, straight alpha. Resized with colours times alpha: RGB is 0 where alpha is 0, and would leak in."""
    part = rgba[corner[1]:corner[1] + side, corner[0]:corner[0] + side]
    if side == size:
        return Image.fromarray(np.ascontiguousarray(part))
    alpha = part[..., 3:].astype(np.float32) / 255
    bands = np.concatenate([part[..., :3] * alpha, part[..., 3:].astype(np.float32)], 2)
    resized = np.stack([np.asarray(Image.fromarray(bands[..., band]).resize((size, size), Image.Resampling.BICUBIC))
                        for band in range(4)], 2)
    out_alpha = np.clip(np.round(resized[..., 3:]), 0, 255)
    colour = np.where(out_alpha > 0, resized[..., :3] * 255 / np.maximum(resized[..., 3:], 1e-3), 0)
    return Image.fromarray(np.concatenate([np.clip(np.round(colour), 0, 255), out_alpha], 2).astype(np.uint8))


def _write(plan: Plan, entry: Entry, directory: Path) -> Cropped:
    full, own = boxes_of(entry)
    sample = read_sample(entry.name, entry.directory)
    side, corners = windows(plan.boxes or own, full, plan.margin)
    size = plan.size or full
    rig = cropped(rig_of(sample), side, corners, size)
    images = _write_images(sample, directory, corners, side, size)
    raw = read_cameras(entry.name, entry.directory) if entry.directory else {}
    write_cameras(directory / CAMERAS, directory.name, rig, images, raw)
    if entry.directory and (entry.directory / METADATA).is_file():
        (directory / METADATA).write_bytes((entry.directory / METADATA).read_bytes())
    try:
        read_sample(entry.name, directory)
    except BadSample as bad:
        raise BadSample(entry.name, str(entry.directory), f"cropped around the object, {bad.defect}",
                        "put the object at the world origin first: `normalize --centre object`") from None
    return Cropped(side, size, rig.fingerprint)


def _write_images(sample: Sample, directory: Path, corners: list[tuple[int, int]], side: int, size: int) -> list[str]:
    (directory / "images").mkdir()
    names = [f"images/cam_{view:03d}.png" for view in range(len(sample.frames))]
    for frame, name, corner in zip(sample.frames, names, corners):
        crop(read_rgba(sample.name, frame.image), corner, side, size).save(directory / name)
    return names
