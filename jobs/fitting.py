"""A person's picture as the generator wants it: on its background, square, of its size."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from configs.reconstruct import Fit
from jobs.runtime import JobError

_MASK = 12  # of 255: a fainter alpha, or distance from the background, is no object
_PLAIN = 0.06  # mean distance of the border from the background, 0..1, up to which a picture without alpha is cut out


def fitted(path: Path, size: int, background: tuple[float, float, float], fit: Fit) -> tuple[Tensor, str]:
    """RGB [3, size, size] in 0..1 of the picture at `path`, and what was done with it in words.

    With alpha the object is put on `background` before anything is resized. A crop is centred on the object, which
    then fills `fit.fill` of it; beyond the picture's edge there is background. Raises JobError.
    """
    rgba = _read(path)
    behind = np.asarray(background, dtype=np.float32)
    alpha = rgba[..., 3:]
    rgb = rgba[..., :3] * alpha + behind * (1 - alpha)
    mask, how = alpha[..., 0], "its alpha is the object"
    if alpha.min() == 1:
        mask, how = np.abs(rgb - behind).max(2), "no alpha: what is not background is the object"
        _check_plain(path, mask, fit)
    if not (mask > _MASK / 255).any():
        raise JobError(f"{path}: there is nothing in it but background", "is it the right picture?")
    rgb = np.round(rgb * 255).astype(np.uint8)
    height, width = mask.shape
    if fit.crop == "always" or fit.crop == "auto" and height != width:
        rgb = _cropped(rgb, mask > _MASK / 255, fit.fill, np.round(behind * 255).astype(np.uint8))
        how += f"; cut to {len(rgb)} px around it"
    elif height != width:
        raise JobError(f"{path} is {width} x {height} px, not square", "make it square, or set fit.crop: auto")
    bands = [Image.fromarray(np.ascontiguousarray(rgb[..., band])) for band in range(3)]
    if len(rgb) != size:
        bands = [band.resize((size, size), Image.Resampling.BICUBIC) for band in bands]
    pixels = torch.from_numpy(np.stack([np.asarray(band) for band in bands]))
    return pixels.float() / 255, f"{width} x {height} px, {how}; resized to {size}"


def _read(path: Path) -> np.ndarray:
    """float32 [H, W, 4] in 0..1, straight alpha, the way up that its camera says."""
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            return np.asarray(turned.convert("RGBA"), dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise JobError(f"input_image: {path} cannot be read: {error}", "name a PNG or JPEG picture") from None


def _check_plain(path: Path, distance: np.ndarray, fit: Fit) -> None:
    border = np.concatenate([distance[0], distance[-1], distance[:, 0], distance[:, -1]])
    if border.mean() > _PLAIN and not fit.keep_background:
        raise JobError(f"{path} has no alpha, and what is behind the object is not plain: it would be taken for a part "
                       "of it", "cut the object out (RGBA PNG), or set fit.keep_background: true")


def _cropped(rgb: np.ndarray, mask: np.ndarray, fill: float, behind: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    side = math.ceil(max(box[2] - box[0], box[3] - box[1]) / fill)
    left, top = round((box[0] + box[2] - side) / 2), round((box[1] + box[3] - side) / 2)
    canvas = np.broadcast_to(behind, (side, side, 3)).copy()
    height, width = mask.shape
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, width), min(top + side, height)
    canvas[y0 - top:y1 - top, x0 - left:x1 - left] = rgb[y0:y1, x0:x1]
    return canvas
