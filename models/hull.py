"""Do silhouettes and cameras belong together? Multi-view consistency by visual hull.

Each silhouette pixel of a view is a ray on which the object lies somewhere. It is *explained* when some point
of it projects into the silhouettes of all other views too. With right cameras all are explained (>= .997);
cameras that were moved without their pictures, and pictures in another order than their cameras, leave many
unexplained.

Source: the shape-from-silhouette argument of Laurentini, "The visual hull concept" (1994), sampled along rays
instead of in voxels, so that a tail one pixel thin is not lost.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from models.cameras import invert_rigid, rays

THRESHOLD = 0.97  # least explained fraction of a sound view
DEPTHS = 128  # points per ray: half a pixel apart in the other views at 128 px
RAYS = 512  # silhouette pixels tested per view, evenly spread: a fraction is then known to .002
_INSIDE = 0.5  # alpha of a pixel that has to be explained
_ALLOWED = 0.01  # alpha of a pixel that may explain: half-covered edges and hair count
_SLACK_PX = 1  # pixels a silhouette is widened by when it explains another one
_BORDER_PX = 2  # a silhouette this close to the edge of its frame may go on beyond it
_REACH = 2 / 3  # of the median camera distance: the object is within this radius (1.8 at |c| = 2.7)


@dataclass(frozen=True)
class Tested:
    """The rays of one view: `pixels` [n] (row * width + column) and whether each is explained, bool [n]."""

    pixels: Tensor
    explained: Tensor

    @property
    def fraction(self) -> float:
        """Of the silhouette, what is explained; 0 for a view without a silhouette."""
        return self.explained.float().mean().item() if len(self.pixels) else 0.0


def explained(alpha: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> Tensor:
    """The explained fraction of each view's silhouette [V].

    Args: alpha [V, H, W] in 0..1; c2w [V, 4, 4] and fxfycxcy [V, 4] px of these pictures, world with the
    object at the origin (any unit). 128 px are enough, and what the constants above were chosen for.
    Raises ValueError for fewer than two views.
    """
    return torch.tensor([view.fraction for view in tested(alpha, c2w, fxfycxcy)])


def tested(alpha: Tensor, c2w: Tensor, fxfycxcy: Tensor, rays_at_most: int = RAYS) -> list[Tested]:
    """Test the silhouette of each view against all others; arguments as in `explained`."""
    if len(alpha) < 2:
        raise ValueError("one view alone has nothing to agree with: a visual hull needs two")
    allowed, beyond = _allowed(alpha), reaches_edge(alpha)
    found = []
    for view, silhouette in enumerate(alpha.flatten(1) > _INSIDE):
        pixels = _spread(silhouette, rays_at_most)
        points, ray = _points(c2w, fxfycxcy, alpha.shape[-2:], view, pixels)
        for other in _most_sideways_first(c2w, view):
            inside, place = _project(points, c2w[other], fxfycxcy[other], alpha.shape[-2:])
            # A point outside the frame is unknown where the object is cut by the frame, else it is background.
            keep = torch.where(inside, allowed[other][place], beyond[other])
            points, ray = points[keep], ray[keep]
        hit = torch.zeros(len(pixels), dtype=torch.bool, device=alpha.device)
        hit[ray] = True
        found.append(Tested(pixels, hit))
    return found


def _allowed(alpha: Tensor) -> Tensor:
    """bool [V, H * W]: the silhouettes, a little wider."""
    wide = max_pool2d((alpha > _ALLOWED).float()[:, None], 2 * _SLACK_PX + 1, 1, _SLACK_PX)
    return wide.flatten(1) > 0


def reaches_edge(alpha: Tensor) -> Tensor:
    """bool [V] for alpha [V, H, W]: whether the silhouette reaches the edge of its frame and may go on beyond it."""
    edge = torch.ones_like(alpha[0], dtype=torch.bool)
    edge[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = False
    return ((alpha > _ALLOWED) & edge).flatten(1).any(1)


def _spread(silhouette: Tensor, at_most: int) -> Tensor:
    """Up to `at_most` indices of the True entries, evenly spread over them in scan order."""
    pixels = silhouette.nonzero()[:, 0]
    if len(pixels) <= at_most:
        return pixels
    return pixels[torch.linspace(0, len(pixels) - 1, at_most, device=pixels.device).round().long()]


def _points(c2w: Tensor, fxfycxcy: Tensor, size: torch.Size, view: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Points [n * DEPTHS, 3] along the rays of `pixels` where the object can be, and the ray of each."""
    origins, directions = rays(c2w[view], fxfycxcy[view], *size)
    origin, direction = (part.flatten(1)[:, pixels].T for part in (origins, directions))  # [n, 3]
    reach = _REACH * c2w[:, :3, 3].norm(dim=1).median()
    nearest = -(origin * direction).sum(1, keepdim=True)
    off_centre = (origin + nearest * direction).norm(dim=1, keepdim=True)
    half = (reach**2 - off_centre**2).clamp(min=0).sqrt()
    depth = nearest + half * torch.linspace(-1, 1, DEPTHS, dtype=c2w.dtype, device=c2w.device)
    points = origin[:, None] + depth[..., None] * direction[:, None]
    return points.reshape(-1, 3), torch.arange(len(pixels), device=c2w.device).repeat_interleave(DEPTHS)


def _most_sideways_first(c2w: Tensor, view: int) -> list[int]:
    """The other views, those first that look across the rays: they rule out most of the points."""
    forward = c2w[:, :3, 2]
    order = (forward @ forward[view]).abs().argsort().tolist()
    return [other for other in order if other != view]


def _project(points: Tensor, c2w: Tensor, fxfycxcy: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """(bool [n]: in front of the camera and inside its frame; [n] the pixel, row * width + column)."""
    height, width = size
    pose = invert_rigid(c2w)
    x, y, z = (points @ pose[:3, :3].T + pose[:3, 3]).unbind(1)
    fx, fy, cx, cy = fxfycxcy.unbind()
    column, row = (fx * x / z + cx).floor(), (fy * y / z + cy).floor()
    inside = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return inside, place.nan_to_num(0).long()
