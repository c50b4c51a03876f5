"""A differentiable tile rasteriser for 3D Gaussians in plain PyTorch: the CPU twin of gsplat's CUDA kernels.

Semantics are gsplat 1.5's (classic mode): EWA projection with 0.3 px^2 added to the 2D covariance, pixel
centres at +.5, alpha = min(.999, opacity e^-sigma), alphas below 1/255 skipped, a pixel closed before the
Gaussian that would bring its transmittance to 1e-4 or less, near plane .01.

Method: project all Gaussians of all views, list (tile, Gaussian) pairs from exact ellipse bounds, order them
by depth and then stably by tile, and composite 64 Gaussians at a time, front to back, over groups of tiles
small enough for the cache. The backward pass walks the same blocks again instead of keeping them, so memory
grows with Gaussians and pairs, never with Gaussians x pixels.

The conic of a Gaussian is carried as its Cholesky factor: sigma = (s dx + t dy)^2 + (r dy)^2, which cannot
turn negative by rounding the way a dx^2 + 2 b dx dy + c dy^2 does for long thin splats.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

BLUR = 0.3  # px^2 added to both variances of a splat (gsplat's eps2d)
NEAR = 0.01  # world units
ALPHA_MIN = 1 / 255
ALPHA_MAX = 0.999
STOP = 1e-4  # transmittance
TILE = 8  # px
BLOCK = 64  # Gaussians composited at once
LOG_NOTHING = -10.0  # below the log of ALPHA_MIN, above where exp gives slow denormals
CACHED = 2**17  # elements of one temporary: half a megabyte in float32


@dataclass(frozen=True)
class Splats:
    """Gaussians projected into every view."""

    means: Tensor  # [B, V, N, 2] px
    depths: Tensor  # [B, V, N] camera z; not above NEAR for what is to be culled
    variances: Tensor  # [B, V, N, 2] px^2 along x and y
    factors: Tensor  # [B, V, N, 3] s, t, r: sigma = (s dx + t dy)^2 + (r dy)^2, in 1/px


@dataclass(frozen=True)
class Bins:
    """Which splats each tile composites, front to back. Tiles without splats do not appear."""

    members: Tensor  # [P] rows of the flat splat table
    tiles: Tensor  # [T] (view * rows + row) * columns + column
    starts: Tensor  # [T] first member of each tile
    counts: Tensor  # [T]
    columns: int
    rows: int
    views: int


def rotation_matrices(quats: Tensor) -> Tensor:
    """Rotations [..., 3, 3] of quaternions [..., 4] (wxyz, normalised here)."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def project(means: Tensor, quats: Tensor, scales: Tensor, c2w: Tensor, fxfycxcy: Tensor,
            width: int, height: int) -> Splats:
    """EWA projection of Gaussians [B, N, ...] (world) into cameras [B, V, ...] (px); differentiable."""
    fx, fy, cx, cy = fxfycxcy[..., None].unbind(-2)  # [B, V, 1]
    x, y, depths = ((means[:, None] - c2w[:, :, None, :3, 3]) @ c2w[..., :3, :3]).unbind(-1)  # [B, V, N]
    z = torch.where(depths > NEAR, depths, 1.0)  # the others are culled; 1 keeps their gradients finite
    x, y = x / z, y / z
    tan_x, tan_y = _clamped_slopes(x, y, fx, fy, cx, cy, width, height)
    axis_x, axis_y, axis_z = _camera_axes(quats, scales, c2w)
    along_x = (fx / z)[..., None] * (axis_x - tan_x[..., None] * axis_z)  # [B, V, N, 3] px
    along_y = (fy / z)[..., None] * (axis_y - tan_y[..., None] * axis_z)
    raw_xx, raw_yy = along_x.square().sum(-1), along_y.square().sum(-1)
    xx, yy, xy = raw_xx + BLUR, raw_yy + BLUR, (along_x * along_y).sum(-1)
    # Cauchy-Binet: a sum of squares, where xx * yy - xy^2 would cancel for long thin splats
    raw_det = torch.linalg.cross(along_x, along_y).square().sum(-1)
    det = raw_det + BLUR * (raw_xx + raw_yy) + BLUR * BLUR
    s = (yy / (2 * det)).sqrt()
    factors = torch.stack([s, -s * xy / yy, (2 * yy).rsqrt()], -1)
    return Splats(torch.stack([fx * x + cx, fy * y + cy], -1), depths, torch.stack([xx, yy], -1), factors)


def _clamped_slopes(x: Tensor, y: Tensor, fx: Tensor, fy: Tensor, cx: Tensor, cy: Tensor,
                    width: int, height: int) -> tuple[Tensor, Tensor]:
    # far outside the frame the linearised projection explodes: gsplat evaluates it at most .15 frames outside
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    return (torch.clamp(x, -cx / fx - margin_x, (width - cx) / fx + margin_x),
            torch.clamp(y, -cy / fy - margin_y, (height - cy) / fy + margin_y))


def _camera_axes(quats: Tensor, scales: Tensor, c2w: Tensor) -> tuple[Tensor, ...]:
    """The three scaled axes of each Gaussian, as camera x, y, z components [B, V, N, 3] each."""
    axes = rotation_matrices(quats) * scales[..., None, :]  # [B, N, 3 world, 3]
    batch, count = axes.shape[:2]
    world_to_camera = c2w[..., :3, :3].transpose(-1, -2).flatten(1, 2)  # [B, V * 3, 3]
    in_camera = world_to_camera @ axes.transpose(1, 2).flatten(2)  # one product for all Gaussians
    return in_camera.view(batch, -1, 3, count, 3).unbind(2)


@torch.no_grad()
def bin_splats(splats: Splats, log_opacities: Tensor, width: int, height: int) -> Bins:
    """Cull what cannot reach 1/255 on any pixel centre and sort the rest into tiles.

    `log_opacities` is [B, V, N], like the fields of `splats`.
    """
    columns, rows = math.ceil(width / TILE), math.ceil(height / TILE)
    reach = 2 * (log_opacities - math.log(ALPHA_MIN))  # squared Mahalanobis radius where alpha is 1/255
    half = (reach.clamp(min=0)[..., None] * splats.variances).sqrt()
    size = splats.means.new_tensor([width, height])
    first = (splats.means - half - 0.5).ceil().clamp(min=0)  # pixel indices, inclusive
    last = torch.minimum((splats.means + half - 0.5).floor(), size - 1)
    seen = (splats.depths > NEAR) & (reach >= 0) & (first <= last).all(-1)
    members = seen.flatten().nonzero()[:, 0]
    # positive floats order like their bits, and integers are radix sorted
    bits = splats.depths.flatten()[members].float().view(torch.int32)
    members = members[bits.sort(stable=True).indices]
    low = first.view(-1, 2)[members].long() // TILE
    high = last.view(-1, 2)[members].long() // TILE
    view = members // splats.depths.shape[-1]
    origin = (view * rows + low[:, 1]) * columns + low[:, 0]
    owner, tile = _pairs(origin, high - low + 1, columns)
    tile, order = tile.int().sort(stable=True)
    tiles, counts = torch.unique_consecutive(tile, return_counts=True)
    views = splats.depths[..., 0].numel()
    return Bins(members[owner[order]], tiles.long(), counts.cumsum(0) - counts, counts, columns, rows, views)


def _pairs(origin: Tensor, extent: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Every tile of rectangles given by first tile [M] and extent [M, 2]: (rectangle, tile) of each pair."""
    counts = extent.prod(-1)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    nth = torch.arange(len(owner), device=counts.device) - (counts.cumsum(0) - counts)[owner]
    wide = extent[:, 0][owner]
    return owner, origin[owner] + nth + torch.div(nth, wide, rounding_mode="floor") * (columns - wide)


@dataclass
class _Block:
    """Up to 64 Gaussians of a group of tiles, in cache: A tiles, P = TILE^2 pixels, K Gaussians."""

    group: Tensor  # [A] position of the tile in the group
    members: Tensor  # [A, K] rows of the table; the last row is padding
    splats: Tensor  # [A, K, 9] mx, my, s, t, r, log opacity, rgb
    dx: Tensor  # [A, TILE, K] px, from the mean to each column of pixels
    dy: Tensor  # [A, TILE, K]
    slant: Tensor  # [A, TILE (y), TILE (x), K] s dx + t dy
    alpha: Tensor  # [A, P, K] 0 where skipped or behind the stop
    weight: Tensor  # [A, P, K] alpha * transmittance in front
    after: Tensor  # [A, P, 1] transmittance behind the block; at or below the stop once closed
    left: Tensor  # [A, P, 1] the same up to the stop; 1 where closed before this block


def _groups(bins: Bins) -> Iterator[Tensor]:
    """Positions of tiles, in groups of like length whose temporaries stay in cache."""
    by_length = bins.counts.argsort(descending=True, stable=True)
    size = CACHED // (TILE * TILE * BLOCK)
    for begin in range(0, len(by_length), size):
        yield by_length[begin : begin + size]


def _blocks(table: Tensor, bins: Bins, group: Tensor, stop: float) -> Iterator[_Block]:
    """Walk the tiles of a group front to back until every pixel is closed."""
    starts, counts = bins.starts[group], bins.counts[group]
    tiles = bins.tiles[group]
    corner = torch.stack([tiles % bins.columns, tiles // bins.columns % bins.rows], -1) * TILE  # [A, 2] px
    front = table.new_ones(len(group), TILE * TILE, 1)
    live = torch.arange(len(group), device=table.device)
    for begin in range(0, int(counts.max()), BLOCK):
        live = live[(counts[live] > begin) & (front.index_select(0, live).amax((1, 2)) > stop)]
        if not len(live):
            return
        nth = begin + torch.arange(BLOCK, device=table.device)
        inside = nth < counts[live, None]
        position = torch.where(inside, starts[live, None] + nth, 0)
        members = torch.where(inside, bins.members[position], len(table) - 1)  # [A, K]
        block = _shade(table, live, members, corner[live], front.index_select(0, live), stop)
        front.index_copy_(0, live, block.after)
        yield block


def _shade(table: Tensor, live: Tensor, members: Tensor, corner: Tensor, front: Tensor,
           stop: float) -> _Block:
    splats = table.index_select(0, members.flatten()).view(*members.shape, -1)
    mx, my, s, t, r, log_opacity = (column[:, None] for column in splats[..., :6].unbind(-1))  # [A, 1, K]
    centres = torch.arange(TILE, dtype=table.dtype, device=table.device)[:, None] + 0.5
    dx, dy = (corner[:, axis, None, None] + centres - mean for axis, mean in enumerate((mx, my)))
    slant = (s * dx)[:, None] + (t * dy)[:, :, None]
    power = torch.addcmul((log_opacity - (r * dy).square())[:, :, None], slant, slant, value=-1)
    power.clamp_(LOG_NOTHING, math.log(ALPHA_MAX))
    alpha = F.threshold_(power.exp_(), ALPHA_MIN, 0).flatten(1, 2)
    after = (1 - alpha).cumprod_(-1).mul_(front)
    left = after[..., -1:]
    if bool((left <= stop).any()):
        closed = after <= stop
        alpha.masked_fill_(closed, 0)
        left = after.masked_fill(closed, 1).amin(-1, keepdim=True)
    weight = torch.cat([front, after[..., :-1]], -1).mul_(alpha)
    return _Block(live, members, splats, dx, dy, slant, alpha, weight, after[..., -1:], left)


class _Composite(torch.autograd.Function):
    """Flat splats and colours -> tiles of colour and transmittance; nothing per pair is kept for backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, geometry: Tensor, colors: Tensor, bins: Bins,
                stop: float) -> tuple[Tensor, Tensor]:
        """geometry [M, 6] (mx, my, s, t, r, log opacity), colors [M, 3] -> colour [tiles, P, 3] and
        transmittance [tiles, P, 1] of every tile of every view."""
        tiles = bins.views * bins.rows * bins.columns
        color = geometry.new_zeros(tiles, TILE * TILE, 3)
        clear = geometry.new_ones(tiles, TILE * TILE, 1)
        table = _padded(geometry, colors)
        for group in _groups(bins):
            for block in _blocks(table, bins, group, stop):
                tile = bins.tiles[group[block.group]]
                color.index_add_(0, tile, block.weight @ block.splats[..., 6:])
                clear.index_copy_(0, tile, torch.minimum(clear.index_select(0, tile), block.left))
        ctx.save_for_backward(geometry, colors, color, clear)
        ctx.bins, ctx.stop = bins, stop
        return color, clear

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_color: Tensor, grad_clear: Tensor) -> tuple[Tensor | None, ...]:
        geometry, colors, color, clear = ctx.saved_tensors
        bins: Bins = ctx.bins
        table = _padded(geometry, colors)
        grad = torch.zeros_like(table)
        with torch.autocast(table.device.type, enabled=False):
            behind = (color * grad_color).sum(-1, keepdim=True) + clear * grad_clear  # [tiles, P, 1]
            for group in _groups(bins):
                for block in _blocks(table, bins, group, ctx.stop):
                    tile = bins.tiles[group[block.group]]
                    rest = behind.index_select(0, tile)
                    splat_grad, rest = _block_gradient(block, grad_color.index_select(0, tile), rest)
                    behind.index_copy_(0, tile, rest)
                    grad.index_add_(0, block.members.flatten(), splat_grad.flatten(0, 1))
        return grad[:-1, :6], grad[:-1, 6:], None, None


def _block_gradient(block: _Block, grad_color: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [A, K, 9] to the splats of a block, and what of the pixels' value [A, P, 1] lies behind it."""
    shine = (grad_color @ block.splats[..., 6:].transpose(1, 2)).mul_(block.weight)  # [A, P, K]
    behind = rest - shine.cumsum(-1)
    occlusion = behind.mul(block.alpha).div_(1 - block.alpha)
    pull = shine.sub_(occlusion).view_as(block.slant)  # gradient to log alpha
    if bool((block.splats[..., 5] > math.log(ALPHA_MAX)).any()):
        pull.masked_fill_((block.alpha > ALPHA_MAX - 1e-6).view_as(pull), 0)  # held at the maximum
    lean = pull * block.slant
    lean_x, lean_y, pull_y = lean.sum(1), lean.sum(2), pull.sum(2)  # [A, TILE, K]
    s, t, r = block.splats[..., 2:5].unbind(-1)  # [A, K]
    total, tilt = lean_x.sum(1), (block.dy * pull_y).sum(1)
    columns = [2 * s * total, 2 * t * total + 2 * r * r * tilt,
               -2 * (block.dx * lean_x).sum(1), -2 * (block.dy * lean_y).sum(1),
               -2 * r * (block.dy.square() * pull_y).sum(1), pull_y.sum(1)]
    to_colors = block.weight.transpose(1, 2) @ grad_color  # [A, K, 3]
    return torch.cat([torch.stack(columns, -1), to_colors], -1), behind[..., -1:]


def _padded(geometry: Tensor, colors: Tensor) -> Tensor:
    """[M + 1, 9]: one table for all, its last row an invisible splat that fills short blocks."""
    table = geometry.new_zeros(len(geometry) + 1, 9)
    table[:-1, :6], table[:-1, 6:], table[-1, 5] = geometry, colors, -math.inf
    return table


def rasterize(means: Tensor, quats: Tensor, scales: Tensor, log_opacities: Tensor, colors: Tensor,
              c2w: Tensor, fxfycxcy: Tensor, width: int, height: int,
              stop: float = STOP) -> tuple[Tensor, Tensor]:
    """Render activated Gaussians; differentiable in all five of their fields.

    Args:
        means [B, N, 3] world; quats [B, N, 4] wxyz, any length; scales [B, N, 3] world; log_opacities [B, N];
        colors [B, N, 3]; c2w [B, V, 4, 4]; fxfycxcy [B, V, 4] px; stop: transmittance at which a pixel is
        closed, 0 to composite everything.
    Returns:
        Colour [B, V, 3, H, W] on black and transmittance [B, V, 1, H, W].
    """
    batch, views = c2w.shape[:2]
    splats = project(means, quats, scales, c2w, fxfycxcy, width, height)
    log_opacities = log_opacities[:, None].expand(splats.depths.shape)
    bins = bin_splats(splats, log_opacities, width, height)
    geometry = torch.cat([splats.means, splats.factors, log_opacities[..., None]], -1).flatten(0, 2)
    per_view = colors[:, None].expand(batch, views, -1, 3).flatten(0, 2)
    color, clear = _Composite.apply(geometry, per_view, bins, stop)
    return tuple(_untile(tiles, bins, width, height).unflatten(0, (batch, views)) for tiles in (color, clear))


def _untile(tiles: Tensor, bins: Bins, width: int, height: int) -> Tensor:
    """[views * rows * columns, P, C] -> [views, C, height, width]."""
    grid = tiles.view(bins.views, bins.rows, bins.columns, TILE, TILE, -1)
    image = grid.permute(0, 5, 1, 3, 2, 4).reshape(bins.views, -1, bins.rows * TILE, bins.columns * TILE)
    return image[..., :height, :width].contiguous()
