"""Losses and metrics between renderings and targets, RGB in 0..1.

Images are [..., 3, H, W] with any leading dimensions (batch, views); masks are [..., 1, H, W]. Renderings are
not clamped before a loss: that would kill the gradient where they saturate. Metrics clamp.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW = 11  # px
SSIM_SIGMA = 1.5  # px
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
GREY = 0.5  # what masked SSIM puts where the mask is off


def l2(rendering: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(rendering, target)


def ssim_map(rendering: Tensor, target: Tensor) -> Tensor:
    """Structural similarity [n, C, H - 10, W - 10] at every position whose 11 px window lies in the image.

    Raises ValueError for images smaller than the window.
    """
    if min(rendering.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} px, not {list(rendering.shape[-2:])}")
    x, y = (images.reshape(-1, *images.shape[-3:]) for images in (rendering, target))
    mean_x, mean_y, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y], 1)).chunk(5, 1)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    structure = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    return (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1) * structure


def _blur(images: Tensor) -> Tensor:
    """Gaussian window over [n, C, H, W], valid region only, rows then columns."""
    at = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-(at**2) / (2 * SSIM_SIGMA**2))
    window = (window / window.sum()).expand(images.shape[1], 1, 1, -1)
    images = F.conv2d(images, window, groups=images.shape[1])
    return F.conv2d(images, window.transpose(-1, -2), groups=images.shape[1])


def ssim(rendering: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM, averaged over positions, channels and images."""
    return 1 - ssim_map(rendering, target).mean()


def psnr(mse: Tensor) -> Tensor:
    """dB of a mean squared error of values in 0..1."""
    return -10 * torch.log10(mse)


@torch.no_grad()
def image_psnr(rendering: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of each image [...], the rendering clamped to 0..1: the validation metric."""
    return psnr((rendering.clamp(0, 1) - target).square().mean((-3, -2, -1)))


@torch.no_grad()
def image_ssim(rendering: Tensor, target: Tensor) -> Tensor:
    """SSIM of each image [...], the rendering clamped to 0..1: the validation metric."""
    return ssim_map(rendering.clamp(0, 1), target).mean((1, 2, 3)).view(rendering.shape[:-3])


def masked_l2(rendering: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the pixels whose mask is above .5; 0 when there are none."""
    return _mean_where(mask > 0.5, (rendering - target).square())


def masked_ssim(rendering: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 - SSIM with both images grey where the mask is not above .5."""
    inside = mask > 0.5
    return ssim(torch.where(inside, rendering, GREY), torch.where(inside, target, GREY))


def background_l2(rendering: Tensor, mask: Tensor, background: tuple[float, float, float]) -> Tensor:
    """Mean squared error to the background colour over the pixels whose mask is below .5."""
    behind = rendering.new_tensor(background).view(3, 1, 1)
    return _mean_where(mask < 0.5, (rendering - behind).square())


def _mean_where(chosen: Tensor, errors: Tensor) -> Tensor:
    count = (chosen.sum() * errors.shape[-3]).clamp(min=1)
    return torch.where(chosen, errors, 0.0).sum() / count


def pixelalign(points: Tensor, origins: Tensor, directions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean distance of points from their pixels' rays, world units.

    Args: points, origins, directions [B, V, 3, H, W] world; mask [B, V, 1, H, W] weighs the offsets.
    """
    offset = points - origins
    offset = offset - (offset * directions).sum(2, keepdim=True).detach() * directions
    return (offset if mask is None else offset * mask).norm(dim=2).mean()


def pointsdist(points: Tensor, origins: Tensor) -> Tensor:
    """Pulls each view's depths towards a spread of half a unit around the camera's distance from the origin.

    Args: points, origins [B, V, 3, H, W] world.
    """
    distance = (points - origins).norm(dim=2)  # [B, V, H, W]
    with torch.no_grad():
        pixels = distance.flatten(2)
        mean, std = pixels.mean(-1)[..., None, None], pixels.std(-1)[..., None, None]
        target = (distance - mean) / (std + 1e-8) * 0.5 + origins.norm(dim=2)
    return F.mse_loss(distance, target)
