"""Losses through frozen VGG networks, with weights from files the user has; nothing is downloaded.

`PerceptualLoss` is the VGG-19 loss of GS-LRM, whose weights every public GS-LRM checkpoint carries; `Lpips`
is the VGG-16 distance of Zhang et al. (2018). Both take RGB in 0..1, [..., 3, H, W], rendering first.
`random:SEED` in place of a path gives random weights: for tests of the plumbing, meaningless as a measure.
"""
from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.weights import WeightsError, read_weights

VGG19_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 256, *(512,) * 8)
VGG19_POOL_AFTER = (2, 4, 8, 12)  # convolutions, counted from 1
VGG19_TAPS = {2: 1 / 2.6, 4: 1 / 4.8, 6: 1 / 3.7, 10: 1 / 5.6, 14: 10 / 1.5}  # after convolution n: weight
VGG19_MEAN = (123.68, 116.779, 103.939)
GSLRM_PREFIX = "loss_calculator.perceptual_loss_module.net."

VGG16_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's layer numbers
VGG16_WIDTHS = (64, 128, 256, 512, 512)
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)


class PerceptualLoss(nn.Module):
    """VGG-19 feature distance with average pooling. `weights`: a file with conv{1..16}.{weight,bias}, alone
    or inside a public GS-LRM checkpoint; raises WeightsError."""

    def __init__(self, weights: str | os.PathLike[str]) -> None:
        super().__init__()
        last = max(VGG19_TAPS)
        shapes = _conv_shapes([f"conv{n}" for n in range(1, 17)], VGG19_WIDTHS)
        loaded = _load(weights, shapes, GSLRM_PREFIX)
        for n in range(1, last + 1):
            self.register_buffer(f"conv{n}_weight", loaded[f"conv{n}.weight"], persistent=False)
            self.register_buffer(f"conv{n}_bias", loaded[f"conv{n}.bias"], persistent=False)
        self.register_buffer("mean", torch.tensor(VGG19_MEAN).view(3, 1, 1), persistent=False)

    def forward(self, rendering: Tensor, target: Tensor) -> Tensor:
        x, y = (images.reshape(-1, *images.shape[-3:]) * 255 - self.mean for images in (rendering, target))
        loss = (x - y).abs().mean()
        for n in range(1, max(VGG19_TAPS) + 1):
            weight, bias = getattr(self, f"conv{n}_weight"), getattr(self, f"conv{n}_bias")
            x, y = (F.relu(F.conv2d(images, weight, bias, padding=1)) for images in (x, y))
            if n in VGG19_TAPS:
                loss = loss + VGG19_TAPS[n] * (x - y).abs().mean()
            if n in VGG19_POOL_AFTER:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return loss / 255


class Lpips(nn.Module):
    """LPIPS (VGG-16). `vgg`: torchvision's `features.N.{weight,bias}`; `heads`: `linN.model.1.weight`,
    N = 0..4; raises WeightsError."""

    def __init__(self, vgg: str | os.PathLike[str], heads: str | os.PathLike[str]) -> None:
        super().__init__()
        layers = [n for stage in VGG16_STAGES for n in stage]
        widths = [width for stage, width in zip(VGG16_STAGES, VGG16_WIDTHS) for _ in stage]
        trunk = _load(vgg, _conv_shapes([f"features.{n}" for n in layers], widths))
        for name, tensor in trunk.items():
            self.register_buffer(name.replace(".", "_"), tensor, persistent=False)
        lins = _load(heads, {f"lin{n}.model.1.weight": (1, w, 1, 1) for n, w in enumerate(VGG16_WIDTHS)})
        for n in range(len(VGG16_WIDTHS)):
            self.register_buffer(f"lin{n}", lins[f"lin{n}.model.1.weight"], persistent=False)
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE).view(3, 1, 1), persistent=False)

    def forward(self, rendering: Tensor, target: Tensor) -> Tensor:
        """The mean over images."""
        return self.per_image(rendering, target).mean()

    def per_image(self, rendering: Tensor, target: Tensor) -> Tensor:
        """The distance of each pair [...]."""
        x, y = (((images.reshape(-1, *images.shape[-3:]) * 2 - 1) - self.shift) / self.scale
                for images in (rendering, target))
        distance = x.new_zeros(len(x))
        for n, stage in enumerate(VGG16_STAGES):
            x, y = (self._stage(images, stage, pool=n > 0) for images in (x, y))
            apart = (_unit(x) - _unit(y)).square()
            distance = distance + F.conv2d(apart, getattr(self, f"lin{n}")).mean((1, 2, 3))
        return distance.view(rendering.shape[:-3])

    def _stage(self, images: Tensor, layers: tuple[int, ...], pool: bool) -> Tensor:
        images = F.max_pool2d(images, 2) if pool else images
        for n in layers:
            weight, bias = getattr(self, f"features_{n}_weight"), getattr(self, f"features_{n}_bias")
            images = F.relu(F.conv2d(images, weight, bias, padding=1))
        return images


def _unit(features: Tensor) -> Tensor:
    # the square root's gradient at 0 is infinite: features that are all 0 are common after a ReLU
    length = features.square().sum(1, keepdim=True)
    return features / (torch.where(length > 0, length, 1.0).sqrt() + 1e-10)


def _conv_shapes(names: list[str], widths: list[int] | tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs in zip(names, (3, *widths), widths):
        shapes[f"{name}.weight"] = (outputs, inputs, 3, 3)
        shapes[f"{name}.bias"] = (outputs,)
    return shapes


def _load(source: str | os.PathLike[str], shapes: dict[str, tuple[int, ...]],
          prefix: str = "") -> dict[str, Tensor]:
    """The named tensors of a file, with or without `prefix`, checked against `shapes`."""
    if str(source).startswith("random:"):
        return _random(str(source), shapes)
    plain = {name.removeprefix(prefix): tensor for name, tensor in read_weights(source).items()}
    wrong = [name for name, shape in shapes.items() if name not in plain or plain[name].shape != shape]
    if wrong:
        raise WeightsError(f"weights {source}: {len(wrong)} of {len(shapes)} tensors are missing or of "
                           f"another shape, the first is {wrong[0]} {list(shapes[wrong[0]])}; name another")
    return {name: plain[name].float() for name in shapes}


def _random(source: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    seed = source.removeprefix("random:")
    if not seed.isdigit():
        raise WeightsError(f"weights {source}: write random:SEED with a whole number, for example random:0")
    generator = torch.Generator().manual_seed(int(seed))
    weights = {}
    for name, shape in shapes.items():
        fan_in = max(1, torch.Size(shape[1:]).numel())
        noise = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        weights[name] = noise.abs() if name.startswith("lin") else noise if len(shape) > 1 else noise * 0
    return weights
