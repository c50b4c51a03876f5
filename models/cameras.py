"""Cameras and rigs: OpenCV axes (x right, y down, z forward), world Z-up, object at the origin, unitless.

A camera is `c2w` [4, 4] (columns right, down, forward, centre) and `fxfycxcy` [4] in pixels of its image,
pixel (column i, row j) having its centre at (i + .5, j + .5). A `Rig` is an ordered set of them with names
and a fingerprint, which data sets, checkpoints and generated samples of that rig carry.
"""
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RADIUS = 2.7  # distance of every camera of the standard rigs from the origin
FOV_DEG = 50.0
MV6_VIEWS = {"front": -90.0, "front_right": -135.0, "right": 180.0, "back": 90.0, "left": 0.0,
             "front_left": -45.0}  # azimuth in degrees; the order is the order of the prompts

FINGERPRINT_DIGITS = 3  # coarser than what a JSON file or a resize costs, finer than any real difference
ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Rig:
    """The ordered views of one capture or rendering set-up, all of one image size."""

    names: tuple[str, ...]
    c2w: Tensor  # [V, 4, 4] camera -> world, OpenCV axes
    fxfycxcy: Tensor  # [V, 4] pixels of a width x height image
    width: int
    height: int

    def __post_init__(self) -> None:
        views = len(self.names)
        if self.c2w.shape != (views, 4, 4) or self.fxfycxcy.shape != (views, 4):
            raise ValueError(f"a rig of {views} names needs c2w [{views}, 4, 4] and fxfycxcy [{views}, 4], "
                             f"not {list(self.c2w.shape)} and {list(self.fxfycxcy.shape)}")

    @classmethod
    def from_w2c(cls, names: Sequence[str], w2c: Tensor, fxfycxcy: Tensor, width: int, height: int) -> Rig:
        """A rig from world -> camera matrices [V, 4, 4], as `opencv_cameras.json` holds them."""
        return cls(tuple(names), invert_rigid(w2c.double()).float(), fxfycxcy.float(), width, height)

    @property
    def fingerprint(self) -> str:
        """sha256 over names and rounded cameras. Intrinsics are taken relative to the image size, so the same
        rig at another resolution has the same fingerprint."""
        rows = torch.cat([self.c2w[:, :3].flatten(1).double(), self._relative_intrinsics()], 1)
        rounded = (torch.round(rows, decimals=FINGERPRINT_DIGITS) + 0.0).tolist()  # + 0.0: no negative zeros
        canonical = [[f"{value:.{FINGERPRINT_DIGITS}f}" for value in row] for row in rounded]
        return hashlib.sha256(json.dumps([list(self.names), canonical]).encode()).hexdigest()

    def difference(self, other: Rig, tolerance: float = 2e-3) -> str:
        """What tells `other` from this rig, in words; empty when they are the same within `tolerance`
        (world units, and fractions of the image size)."""
        if self.names != other.names:
            return f"views {', '.join(self.names)} against {', '.join(other.names)}"
        intrinsics = (self._relative_intrinsics() - other._relative_intrinsics()).abs().amax(1)
        poses = (self.c2w - other.c2w).abs().amax((1, 2))
        for name, pose, intrinsic in zip(self.names, poses.tolist(), intrinsics.tolist()):
            if not pose <= tolerance:
                return f"view {name}: camera poses differ by {pose:.3g}"
            if not intrinsic <= tolerance:
                return f"view {name}: focal length or principal point differ by {intrinsic:.3g} image sizes"
        return ""

    def resized(self, width: int, height: int) -> Rig:
        """The same rig for images resized to width x height."""
        scale = self.fxfycxcy.new_tensor([width / self.width, height / self.height])
        return Rig(self.names, self.c2w, self.fxfycxcy * scale.repeat(2), width, height)

    def _relative_intrinsics(self) -> Tensor:
        size = torch.tensor([self.width, self.height], dtype=torch.float64)
        return self.fxfycxcy.double() / size.repeat(2)  # [V, 4] fractions of the image size


def invert_rigid(pose: Tensor) -> Tensor:
    """The inverse of rigid transforms [..., 4, 4] (w2c <-> c2w) without a general matrix inverse."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    inverse = torch.zeros_like(pose)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3:] = -rotation @ pose[..., :3, 3:]
    inverse[..., 3, 3] = 1
    return inverse


def look_at(centres: Tensor, target: Tensor | None = None) -> Tensor:
    """c2w [..., 4, 4] of cameras at `centres` [..., 3] looking at `target` (default: the origin), world z up.

    Raises ValueError for a camera straight above or below its target, where "up" says nothing.
    """
    forward = (0 if target is None else target) - centres
    forward = forward / forward.norm(dim=-1, keepdim=True)
    right = torch.linalg.cross(forward, forward.new_tensor([0.0, 0.0, 1.0]).expand_as(forward))
    length = right.norm(dim=-1, keepdim=True)
    if not bool((length > 1e-6).all()):
        raise ValueError("a camera straight above, below or at its target has no 'up': move it sideways")
    right = right / length
    down = torch.linalg.cross(forward, right)
    c2w = torch.zeros(*centres.shape[:-1], 4, 4, dtype=centres.dtype, device=centres.device)
    c2w[..., :3, :] = torch.stack([right, down, forward, centres], -1)
    c2w[..., 3, 3] = 1
    return c2w


def orbit(azimuths_deg: Sequence[float] | Tensor, elevation_deg: float, radius: float = RADIUS) -> Tensor:
    """c2w [n, 4, 4] (float64) of cameras on a circle around the origin; azimuth 0 is +x, 90 is +y."""
    azimuth = torch.deg2rad(torch.as_tensor(azimuths_deg, dtype=torch.float64))
    elevation = math.radians(elevation_deg)
    height = torch.full_like(azimuth, math.sin(elevation))
    flat = math.cos(elevation)
    return look_at(radius * torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), height], -1))


def intrinsics(width: int, height: int, fov_deg: float = FOV_DEG) -> Tensor:
    """fxfycxcy [4] (float64, px) of a horizontal field of view; the same focal length on both axes."""
    focal = width / 2 / math.tan(math.radians(fov_deg) / 2)
    return torch.tensor([focal, focal, width / 2, height / 2], dtype=torch.float64)


def mv6(size: int) -> Rig:
    """The FaceLift rig of phases 1 and 2: six views at elevation 0."""
    return _orbit_rig(tuple(MV6_VIEWS), list(MV6_VIEWS.values()), 0.0, size)


def orbit32(size: int) -> Rig:
    """The GS-LRM training orbit: 32 views 11.25 degrees apart at elevation 20."""
    return _orbit_rig(tuple(f"orbit_{i:02d}" for i in range(32)), [11.25 * i for i in range(32)], 20.0, size)


def _orbit_rig(names: tuple[str, ...], azimuths_deg: list[float], elevation_deg: float, size: int) -> Rig:
    pinhole = intrinsics(size, size).float().repeat(len(names), 1)
    return Rig(names, orbit(azimuths_deg, elevation_deg).float(), pinhole, size, size)


def turntable(n: int, width: int, height: int, elevation_deg: float = 0, fov_deg: float = FOV_DEG,
              radius: float = RADIUS) -> tuple[Tensor, Tensor]:
    """A full turn, counter-clockwise seen from above, starting at the front (azimuth 270), end excluded.

    Returns c2w [n, 4, 4] and fxfycxcy [n, 4] in pixels, float32.
    """
    azimuths = [270 + 360 * i / n for i in range(n)]
    pinhole = intrinsics(width, height, fov_deg).float().repeat(n, 1)
    return orbit(azimuths, elevation_deg, radius).float(), pinhole


def rays(c2w: Tensor, fxfycxcy: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rays through the pixel centres.

    Args: c2w [..., 4, 4], fxfycxcy [..., 4] px of a width x height image.
    Returns: origins and unit directions, both [..., 3, height, width], world.
    """
    x = torch.arange(width, dtype=c2w.dtype, device=c2w.device) + 0.5
    y = torch.arange(height, dtype=c2w.dtype, device=c2w.device) + 0.5
    fx, fy, cx, cy = fxfycxcy.to(c2w.dtype)[..., None, None].unbind(-3)  # [..., 1, 1] each
    u, v = torch.broadcast_tensors((x - cx) / fx, (y[:, None] - cy) / fy)
    directions = torch.stack([u, v, torch.ones_like(u)], -3)  # [..., 3, H, W] camera
    directions = directions / directions.norm(dim=-3, keepdim=True)
    directions = (c2w[..., :3, :3] @ directions.flatten(-2)).unflatten(-1, (height, width))
    directions = directions / directions.norm(dim=-3, keepdim=True)
    return c2w[..., :3, 3, None, None].expand_as(directions), directions


def camera_defects(w2c: Tensor | Sequence[Sequence[float]], fx: float, fy: float, cx: float, cy: float,
                   w: int, h: int) -> list[str]:
    """What makes a camera unusable for an object at the world origin: "name: explanation" each, [] if sound.

    Names: `shape`, `non-finite`, `intrinsics`, `not-rigid`, `mirrored`, `behind-camera`, `misses-object`.
    """
    pose = torch.as_tensor(w2c, dtype=torch.float64)
    if pose.shape != (4, 4):
        return [f"shape: w2c is {list(pose.shape)}, not a 4 x 4 matrix"]
    if not bool(torch.isfinite(pose).all()) or not all(map(math.isfinite, (fx, fy, cx, cy))):
        return ["non-finite: w2c, fx, fy, cx or cy holds NaN or infinity"]
    if min(fx, fy) <= 0 or min(w, h) <= 0:
        return [f"intrinsics: focal length ({fx:g}, {fy:g}) and image size ({w}, {h}) must be positive"]
    return _rotation_defects(pose) or _aim_defects(pose[:3, 3], fx, fy, cx, cy, w, h)


def _rotation_defects(w2c: Tensor) -> list[str]:
    rotation = w2c[:3, :3]
    off_unit = (rotation @ rotation.T - torch.eye(3, dtype=w2c.dtype)).abs().max().item()
    determinant = torch.linalg.det(rotation).item()
    if off_unit > ROTATION_TOLERANCE or w2c[3].tolist() != [0, 0, 0, 1]:
        return [f"not-rigid: det(R) = {determinant:.4f}, R R^T is off the identity by {off_unit:.2g}, last "
                f"row {w2c[3].tolist()}; w2c must be a rotation and a translation"]
    if determinant < 0:
        return ["mirrored: det(R) = -1, not +1; one axis is flipped (OpenCV: x right, y down, z forward)"]
    return []


def _aim_defects(origin: Tensor, fx: float, fy: float, cx: float, cy: float, w: int, h: int) -> list[str]:
    x, y, z = origin.tolist()  # the world origin, where the object is, in camera axes
    if z <= 0:
        return [f"behind-camera: the object (world origin) is at depth {z:.3f}; w2c may be a c2w, or its z "
                "may point backward"]
    column, row = fx * x / z + cx, fy * y / z + cy
    if not (0 <= column <= w and 0 <= row <= h):
        return [f"misses-object: the object (world origin) projects to pixel ({column:.1f}, {row:.1f}), "
                f"outside the {w} x {h} image"]
    return []
