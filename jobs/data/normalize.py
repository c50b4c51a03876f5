"""`python -m jobs.data normalize DATA OUT`: bring a lab rig to |c| = 2.7, the distance that GS-LRM's constants are for.

`scale` scales the whole scene by one number for the whole data set, so that the median distance is the radius:
exact, cameras keep their different distances. `virtual` then moves each camera to the radius and changes its focal
length as much: all distances equal, the pictures off by a fraction of a pixel. Cameras are never moved alone: that
puts every picture off by pixels.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.data.inspection import object_centre, read_alpha
from jobs.data.lists import METADATA, Entry, each, listings
from jobs.data.options import add_report
from jobs.data.rigs import rig_of
from jobs.data.samples import CAMERAS, BadSample, Sample, read_cameras, read_sample
from jobs.data.sheet import sheet_of
from jobs.data.writing import derive, write_cameras
from jobs.runtime import JobError
from models import rigs
from models.cameras import RADIUS, Rig, invert_rigid

CENTRES = ("origin", "axes", "object")
_BODY = 0.34  # world units: half the length of a mouse; where pictures are compared
_POINTS = 2000
_SEEN_PX = 0.05


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("normalize", help=f"bring a lab rig to |c| = {RADIUS}")
    parser.add_argument("data", type=Path, help="a list file, or the folder of a data set")
    parser.add_argument("out", type=Path, help="a directory to make")
    parser.add_argument("--method", choices=("scale", "virtual"), default="scale",
                        help="scale the scene (exact), or virtual cameras all at the radius")
    parser.add_argument("--radius", type=float, default=RADIUS, help=f"world units ({RADIUS})")
    parser.add_argument("--centre", choices=CENTRES, default="origin",
                        help="what becomes the world origin: it stays, where the optical axes meet, or the object")
    parser.add_argument("--copy", action="store_true", help="copy the pictures (default: hard links where possible)")
    add_report(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Plan:
    """How one data set is changed: the same for all its samples but for the centre."""

    method: str
    radius: float
    centre: str
    scale: float
    copy: bool


@dataclass(frozen=True)
class Before:
    """A sample before the change: camera distances from what becomes the origin, and where that is."""

    distances: tuple[float, ...]
    origin: tuple[float, float, float]


@dataclass(frozen=True)
class After:
    distances: tuple[float, ...]
    off_px: float  # median distance of a point of the body in the picture from where its camera now puts it
    alone_px: float  # the same, had the cameras been moved without their focal lengths


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    if given.radius <= 0:
        raise JobError("--radius must be positive")
    lists = listings(given.data)
    entries = [entry for listing in lists for entry in listing.entries]
    before = list(each(partial(measure, given.centre), entries, given.workers, "cameras"))
    scale = given.radius / statistics.median(distance for one in before for distance in one.distances)
    plan = Plan(given.method, given.radius, given.centre, scale, given.copy)
    made = {"made_by": "jobs.data normalize", "from": str(given.data.resolve()), **asdict(plan)}
    after = derive(lists, given.out, made, partial(_write, plan), given.workers)
    if given.sheet:
        sheet_of(given.out, given.sheet)
    report = _report(plan, before, after)
    print(json.dumps(report, indent=1) if given.json else _table(given.out, report))
    return 0


def measure(centre: str, entry: Entry) -> Before:
    """Raises BadSample, JobError."""
    sample = read_sample(entry.name, entry.directory, centred=centre == "origin")
    origin = _origin(centre, sample)
    distances = rigs.distances(rigs.translated(rig_of(sample), origin).c2w)
    return Before(tuple(distances.tolist()), tuple(origin.tolist()))


def _origin(centre: str, sample: Sample) -> Tensor:
    """What becomes the world origin [3]. Raises BadSample."""
    if centre == "origin":
        return torch.zeros(3, dtype=torch.float64)
    rig = rig_of(sample)
    try:
        found = rigs.looked_at(rig.c2w) if centre == "axes" else object_centre(rig, read_alpha(sample)[0])
    except ValueError:
        found = None
    if found is None:
        raise BadSample(sample.name, CAMERAS, f"--centre {centre}: the lines of its cameras meet nowhere",
                        "choose another --centre")
    return found


def changed(rig: Rig, plan: Plan, origin: Tensor) -> Rig:
    """The rig after the change: scene and cameras together."""
    scaled = rigs.scaled(rigs.translated(rig, origin), plan.scale)
    return rigs.at_radius(scaled, plan.radius) if plan.method == "virtual" else scaled


def _write(plan: Plan, entry: Entry, directory: Path) -> After:
    sample = read_sample(entry.name, entry.directory, centred=plan.centre == "origin")
    origin = _origin(plan.centre, sample)
    rig = changed(rig_of(sample), plan, origin)
    images = _place_images(sample, directory, plan.copy)
    raw = read_cameras(entry.name, entry.directory) if entry.directory else {}
    write_cameras(directory / CAMERAS, directory.name, rig, images, raw)
    read_sample(entry.name, directory)  # what was written must pass the check of every stage
    exact = rigs.scaled(rigs.translated(rig_of(sample), origin), plan.scale)
    return After(tuple(rigs.distances(rig.c2w).tolist()), pictures_off_px(exact, rig),
                 pictures_off_px(exact, cameras_moved_alone(exact, plan.radius)))


def _place_images(sample: Sample, directory: Path, copy: bool) -> list[str]:
    """The pictures of a sample, and its metadata.json, in `directory`; hard links unless `copy`."""
    (directory / "images").mkdir()
    names = [f"images/cam_{view:03d}.png" for view in range(len(sample.frames))]
    for frame, name in zip(sample.frames, names):
        _place(frame.image, directory / name, copy)
    home = sample.frames[0].image.parent
    for place in (home / METADATA, home.parent / METADATA):
        if place.is_file() and (place.parent / CAMERAS).is_file():
            _place(place, directory / METADATA, copy)
    return names


def _place(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def pictures_off_px(exact: Rig, rig: Rig) -> float:
    """Median distance in px between where `exact` and `rig` see points of a ball the size of a mouse, at 512 px."""
    points = torch.randn(_POINTS, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points *= _BODY * torch.linspace(0, 1, _POINTS, dtype=torch.float64)[:, None].pow(1 / 3) / points.norm(
        dim=1, keepdim=True)
    seen = [_pixels(one.resized(512, 512), points) for one in (exact, rig)]
    return (seen[0] - seen[1]).norm(dim=2).median().item()


def _pixels(rig: Rig, points: Tensor) -> Tensor:
    """[V, N, 2] px of world points [N, 3]."""
    pose = invert_rigid(rig.c2w.double())
    inside = points @ pose[:, :3, :3].transpose(1, 2) + pose[:, None, :3, 3]
    k = rig.fxfycxcy.double()[:, None]
    return inside[..., :2] / inside[..., 2:] * k[..., :2] + k[..., 2:]


def cameras_moved_alone(rig: Rig, radius: float) -> Rig:
    """What must never be written: kept to say how far off it would be, and for the tests of `check`."""
    moved = rigs.at_radius(rig, radius)
    return Rig(rig.names, moved.c2w, rig.fxfycxcy, rig.width, rig.height)


def _report(plan: Plan, before: list[Before], after: list[After]) -> dict[str, Any]:
    return {
        "method": plan.method, "scale": plan.scale, "samples": len(after),
        "distances_before": _span(d for one in before for d in one.distances),
        "distances_after": _span(d for one in after for d in one.distances),
        "off_px_at_512": statistics.median(one.off_px for one in after),
        "cameras_alone_would_be_off_px_at_512": statistics.median(one.alone_px for one in after)}


def _span(values: Iterable[float]) -> list[float]:
    known = sorted(values)
    return [known[0], statistics.median(known), known[-1]]


def _table(out: Path, report: dict[str, Any]) -> str:
    def span(key: str) -> str:
        low, middle, high = report[key]
        return f"{low:.4g} to {high:.4g}, median {middle:.4g}"

    off = report["cameras_alone_would_be_off_px_at_512"]
    alone = f"; moving the cameras alone: {off:.2g} px" if off >= _SEEN_PX else ""
    return (f"{out}: {report['samples']} samples, {report['method']}\n"
            f"  scene scaled by    {report['scale']:.6g}\n"
            f"  camera distances   {span('distances_before')}  ->  {span('distances_after')}\n"
            f"  pictures are off   {report['off_px_at_512']:.2g} px at 512 px (median over a mouse){alone}")
