"""A small procedural data set: `python -m jobs.data toy OUT [--samples 40 --val 8 --size 64 --seed 0]`.

Parametric mice made of Gaussians (body, head, ears, feet, tail; pose, size and fur vary), rendered on the
mv6 rig in the format of jobs.data.samples. A few seconds; the same arguments give the same mice.
"""
from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.data.samples import CAMERAS
from jobs.data.writing import new_data_set, write_cameras
from jobs.runtime import JobError
from jobs.world import mixed_seed
from models.cameras import Rig, mv6
from models.gaussians import SH_C0, Gaussians, render

_OPACITY = 0.95
_FUR = 0.04  # standard deviation of a splat's brightness


@dataclass(frozen=True)
class _Blob:
    """An ellipsoid filled with splats: centre and half axes in body space (x right, -y ahead, z up), RGB."""

    centre: tuple[float, float, float]
    axes: tuple[float, float, float]
    colour: Tensor
    splats: int


def make_mouse(generator: torch.Generator) -> Gaussians:
    """One mouse in world space, its head towards -y give or take; a batch of one."""
    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    size, length, head_turn, head_up = draw(0.85, 1.1), draw(0.42, 0.55), draw(-0.16, 0.16), draw(-0.05, 0.12)
    fur = torch.tensor([draw(0.25, 0.75)] * 3) * torch.tensor([1.0, draw(0.75, 0.95), draw(0.55, 0.9)])
    pink, dark = torch.tensor([0.85, 0.55, 0.5]), torch.tensor([0.05, 0.04, 0.04])
    head_y, head_z = -length - 0.12, 0.02 + head_up
    blobs = [
        _Blob((0, 0, -0.05), (0.27, length, 0.25), fur, 900),
        _Blob((0, length * 0.3, -0.06), (0.3, length * 0.6, 0.28), fur, 500),  # haunches
        _Blob((head_turn, head_y, head_z), (0.17, 0.24, 0.16), fur, 400),
        _Blob((head_turn * 1.4, head_y - 0.22, head_z - 0.03), (0.06, 0.07, 0.05), pink, 60),  # nose
    ]
    for side in (-1, 1):
        blobs += [
            _Blob((head_turn + side * 0.15, head_y + 0.08, head_z + 0.16), (0.1, 0.03, 0.1), pink, 90),
            _Blob((head_turn + side * 0.12, head_y - 0.12, head_z + 0.05), (0.03, 0.03, 0.03), dark, 20),
            _Blob((side * 0.18, -length * draw(0.5, 0.9), -0.3), (0.06, 0.09, 0.05), pink, 50),
            _Blob((side * 0.22, length * draw(0.4, 0.8), -0.3), (0.07, 0.12, 0.05), pink, 50),
        ]
    blobs += _tail(length, draw(-0.5, 0.5), draw(-0.1, 0.25), pink)
    turn = math.radians(draw(-50, 50))
    return _fill(blobs, size, turn, generator)


def _tail(length: float, bend: float, lift: float, colour: Tensor) -> list[_Blob]:
    return [_Blob((bend * t * t, length + 0.45 * t, -0.12 + lift * t), (0.035 * (1.2 - t),) * 3, colour, 12)
            for t in torch.linspace(0, 1, 14).tolist()]


def _fill(blobs: list[_Blob], size: float, turn: float, generator: torch.Generator) -> Gaussians:
    means, scales, colours = [], [], []
    for blob in blobs:
        axes = torch.tensor(blob.axes)
        direction = torch.nn.functional.normalize(torch.randn(blob.splats, 3, generator=generator), dim=1)
        radius = torch.rand(blob.splats, 1, generator=generator).pow(1 / 3)
        means.append(torch.tensor(blob.centre) + direction * radius * axes)
        spread = axes.min() * 2.2 / blob.splats ** (1 / 3)
        scales.append(spread.clamp(min=0.008).expand(blob.splats, 3))
        brightness = 1 + _FUR * torch.randn(blob.splats, 1, generator=generator) + 0.25 * direction[:, 2:]
        colours.append((blob.colour * brightness).clamp(0.02, 1))
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    points = torch.cat(means) @ rotation.T * size
    points = points - (points.amin(0) + points.amax(0)) / 2  # the object is at the origin
    count = len(points)
    return Gaussians(
        means=points[None],
        sh=((torch.cat(colours) - 0.5) / SH_C0)[None, :, None],
        log_scales=(torch.cat(scales) * size).log()[None],
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, count, 4),
        opacity_logits=torch.full((1, count, 1), math.log(_OPACITY / (1 - _OPACITY))),
    )


def render_rgba(mouse: Gaussians, rig: Rig) -> np.ndarray:
    """uint8 [V, H, W, 4], straight alpha, RGB 0 where alpha is 0."""
    with torch.no_grad():
        image, alpha = render(mouse, rig.c2w[None], rig.fxfycxcy[None], rig.width, rig.height,
                              background=(0.0, 0.0, 0.0))
    straight = torch.where(alpha > 0.5 / 255, image / alpha.clamp(min=1e-6), 0.0)
    rgba = torch.cat([straight, alpha], 2)[0].clamp(0, 1)
    return (rgba * 255).round().byte().permute(0, 2, 3, 1).numpy()


def write_sample(directory: Path, mouse: Gaussians, rig: Rig) -> None:
    (directory / "images").mkdir(parents=True)
    files = [f"images/cam_{view:03d}.png" for view in range(len(rig.names))]
    for file, picture in zip(files, render_rgba(mouse, rig)):
        Image.fromarray(picture, "RGBA").save(directory / file)
    write_cameras(directory / CAMERAS, directory.name, rig, files)


def make(out: Path, samples: int, val: int, size: int, seed: int) -> bool:
    """Write the data set; False when exactly this one is there already. Raises JobError."""
    wanted = {"made_by": "jobs.data.toy", "version": 3, "samples": samples, "val": val, "size": size,
              "seed": seed, "rig": mv6(size).fingerprint}
    with new_data_set(out, wanted) as directory:
        if directory is not None:
            _write(directory, samples, val, size, seed)
    return directory is not None


def _write(out: Path, samples: int, val: int, size: int, seed: int) -> None:
    names = [f"sample_{index:06d}" for index in range(samples + val)]
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(mixed_seed("toy", seed, index))
        write_sample(out / name, make_mouse(generator), mv6(size))
    (out / "data_train.txt").write_text("".join(f"{name}\n" for name in names[:samples]))
    (out / "data_val.txt").write_text("".join(f"{name}\n" for name in names[samples:]))


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("toy", help="make a small procedural six-view data set of mice")
    parser.add_argument("out", type=Path, help="a directory to make")
    parser.add_argument("--samples", type=int, default=40, help="training samples (40)")
    parser.add_argument("--val", type=int, default=8, help="validation samples (8)")
    parser.add_argument("--size", type=int, default=64, help="px (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    if min(given.samples, given.val, given.size) < 1:
        raise JobError("--samples, --val and --size must be at least 1")
    new = make(given.out, given.samples, given.val, given.size, given.seed)
    print(f"{given.samples} + {given.val} samples of 6 views at {given.size} px in {given.out}"
          + ("" if new else " (there already)"))
    return 0
