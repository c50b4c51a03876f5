"""GS-LRM: posed images of an object in, pixel-aligned 3D Gaussians out, in one forward pass.

Every 8 x 8 patch of every view becomes a token (rgb, ray direction, the ray's point nearest the origin); a
plain pre-norm transformer mixes all tokens; each image token then gives one Gaussian per pixel on that
pixel's ray, and two learned global tokens give one free Gaussian each. There is no positional or view
embedding: the network is permutation-equivariant over views. Parameter names are those of the public
checkpoints, one to one.

Source: Zhang et al., GS-LRM (2024), as trained in FaceLift (Lyu et al., 2025).
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from models.cameras import rays
from models.gaussians import Gaussians
from models.weights import WeightsError, read_weights

GLOBAL_TOKENS = 2
INPUT_CHANNELS = 9  # rgb 3, ray direction 3, the ray's point nearest the origin 3
GAUSSIAN_CHANNELS = 14  # xyz 3, SH 3, scale 3, rotation 4, opacity 1
FOREIGN_PREFIX = "loss_calculator."  # the frozen VGG that public checkpoints carry along
INIT_STD = 0.02
_KEPT_OPS = [torch.ops.aten._scaled_dot_product_flash_attention.default,
             torch.ops.aten._scaled_dot_product_efficient_attention.default,
             torch.ops.aten._scaled_dot_product_cudnn_attention.default,
             torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]
Recompute = bool | Literal["selective"]


class CheckpointMismatch(WeightsError):
    """Weights of another model, or of the same one in another size."""


@dataclass(frozen=True)
class GSLRMConfig:
    """Sizes and output constants; the defaults are those of the public checkpoint (512 px images)."""

    d: int = 1024
    d_head: int = 64
    n_layer: int = 24
    patch_size: int = 8  # px
    scale_bias: float = -2.3  # added to raw log scales
    scale_max: float = -1.2  # upper limit of log scales
    opacity_bias: float = -2.0  # added to raw opacity logits
    depth_half: float = 1.8  # world units either side of the ray's point nearest the origin
    clip_xyz: bool = False  # clip means to [-1, 1]

    def __post_init__(self) -> None:
        if self.d % self.d_head:
            raise ValueError(f"GS-LRM: d = {self.d} is not a multiple of d_head = {self.d_head}")
        if min(self.d, self.d_head, self.n_layer, self.patch_size) < 1:
            raise ValueError(f"GS-LRM: sizes must be positive: {self}")


class Attention(nn.Module):
    """Multi-head self-attention without biases."""

    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        self.d_head = d_head
        self.to_qkv = nn.Linear(d, 3 * d, bias=False)
        self.fc = nn.Linear(d, d, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, L, d] -> [B, L, d]
        heads = self.to_qkv(tokens).unflatten(-1, (3, -1, self.d_head))  # [B, L, 3, heads, d_head]
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.fc(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """d -> 4d -> d with exact GELU."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(tokens)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d, bias=False)
        self.attn = Attention(d, d_head)
        self.norm2 = nn.LayerNorm(d, bias=False)
        self.mlp = Mlp(d)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Patchify(nn.Module):
    """[B, V, C, H, W] -> [B, V * rows * columns, p * p * C], channel fastest within a patch."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        patches = images.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # [B, V, C, rows, p, columns, p]
        return patches.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(1, 3)


class GaussianUpsampler(nn.Module):
    """The head of the global tokens: one Gaussian each."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(d, bias=False)
        self.linear = nn.Linear(d, GAUSSIAN_CHANNELS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, 2, d] -> [B, 2, 14]
        return self.linear(self.layernorm(tokens))


class GSLRM(nn.Module):
    """The reconstructor. `checkpoint_activations`: each block is computed again in backward instead of kept;
    selective: all of it but attention, four fifths of the work at full size, whose outputs are kept."""

    def __init__(self, config: GSLRMConfig, checkpoint_activations: Recompute = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        d, pixels = config.d, config.patch_size**2
        self.gaussian_position_embeddings = nn.Parameter(torch.empty(GLOBAL_TOKENS, d))
        self.patch_embedder = nn.Sequential(Patchify(config.patch_size),
                                            nn.Linear(INPUT_CHANNELS * pixels, d, bias=False))
        self.input_layer_norm = nn.LayerNorm(d, bias=False)
        self.transformer_layers = nn.ModuleList(Block(d, config.d_head) for _ in range(config.n_layer))
        self.gaussian_upsampler = GaussianUpsampler(d)
        self.pixel_gaussian_decoder = nn.Sequential(nn.LayerNorm(d, bias=False),
                                                    nn.Linear(d, GAUSSIAN_CHANNELS * pixels, bias=False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """normal(0, .02) for every matrix, ones for every LayerNorm."""
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, images: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> Gaussians:
        """Reconstruct.

        Args: images [B, V, 3, H, W] RGB in 0..1; c2w [B, V, 4, 4] OpenCV; fxfycxcy [B, V, 4] px.
        Returns: 2 + V * H * W Gaussians per object: the two global ones, then (view, patch row, patch column,
            row, column); see `pixel_grid`.
        Raises: ValueError when H or W is no multiple of the patch size or the shapes disagree.
        """
        self._check_shapes(images, c2w, fxfycxcy)
        height, width = images.shape[-2:]
        # bf16 would move means by hundredths of a unit: rays and heads stay in float32 under autocast
        with torch.autocast(images.device.type, enabled=False):
            origins, directions = rays(c2w.float(), fxfycxcy.float(), height, width)
            posed = posed_images(images.float(), origins, directions)
        tokens = self._trunk(posed.contiguous())
        with torch.autocast(images.device.type, enabled=False):
            return self._decode(tokens.float(), origins, directions)

    def pixel_grid(self, field: Tensor, views: int, height: int, width: int) -> Tensor:
        """The pixel-aligned part of a Gaussian field [B, 2 + V * H * W, C] as images [B, V, C, H, W]."""
        p = self.config.patch_size
        patches = field[:, GLOBAL_TOKENS:].unflatten(1, (views, height // p, width // p, p, p))
        return patches.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def load_upstream(self, path: str | os.PathLike[str]) -> GSLRM:
        """Load a public checkpoint (or a bare state dict), strictly; returns the model itself.

        A `module.` prefix is stripped and the perceptual loss's own weights are dropped.
        Raises WeightsError; its kind CheckpointMismatch names missing, unexpected and wrongly shaped tensors.
        """
        weights = {name: tensor for name, tensor in read_weights(path).items()
                   if not name.startswith(FOREIGN_PREFIX)}
        own = self.state_dict()
        wrong = [f"{name} is {list(weights[name].shape)}, the model has {list(own[name].shape)}"
                 for name in own if name in weights and weights[name].shape != own[name].shape]
        _refuse(path, {"missing": [name for name in own if name not in weights],
                       "unexpected": [name for name in weights if name not in own], "wrong shape": wrong})
        self.load_state_dict(weights)
        return self

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile make each block's kernels at its first call; names in the state dict stay."""
        for layer in self.transformer_layers:
            layer.compile(backend=backend)

    def _check_shapes(self, images: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> None:
        if images.dim() != 5 or images.shape[2] != 3:
            raise ValueError(f"GS-LRM takes images [B, V, 3, H, W], not {list(images.shape)}")
        leading = images.shape[:2]
        if c2w.shape != (*leading, 4, 4) or fxfycxcy.shape != (*leading, 4):
            raise ValueError(f"images are {list(images.shape)}, so c2w must be {[*leading, 4, 4]} and "
                             f"fxfycxcy {[*leading, 4]}, not {list(c2w.shape)} and {list(fxfycxcy.shape)}")
        if any(size % self.config.patch_size for size in images.shape[-2:]):
            raise ValueError(f"images of {images.shape[-1]} x {images.shape[-2]} px cannot be cut into "
                             f"patches of {self.config.patch_size} px: resize them to a multiple of it")

    def _trunk(self, posed: Tensor) -> Tensor:
        """Posed images [B, V, 9, H, W] -> all tokens [B, 2 + L, d]."""
        patches = self.patch_embedder(posed)
        learned = self.gaussian_position_embeddings.to(patches.dtype).expand(len(patches), -1, -1)
        tokens = self.input_layer_norm(torch.cat([learned, patches], 1))
        for layer in self.transformer_layers:
            tokens = self._run(layer, tokens)
        return tokens

    def _run(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return layer(tokens)
        if self.checkpoint_activations == "selective":
            kept = partial(create_selective_checkpoint_contexts, _KEPT_OPS)
            return checkpoint(layer, tokens, use_reentrant=False, context_fn=kept)
        return checkpoint(layer, tokens, use_reentrant=False)

    def _decode(self, tokens: Tensor, origins: Tensor, directions: Tensor) -> Gaussians:
        config = self.config
        views, _, height, width = origins.shape[1:]
        free = self.gaussian_upsampler(tokens[:, :GLOBAL_TOKENS])
        pixels = self.pixel_gaussian_decoder(tokens[:, GLOBAL_TOKENS:])
        raw = torch.cat([free, pixels.unflatten(-1, (-1, GAUSSIAN_CHANNELS)).flatten(1, 2)], 1)  # [B, N, 14]
        xyz, sh, scale, quats, opacity = raw.split([3, 3, 3, 4, 1], -1)
        on_rays = self._along_rays(self.pixel_grid(xyz, views, height, width), origins, directions)
        means = torch.cat([xyz[:, :GLOBAL_TOKENS], self._sequence(on_rays)], 1)
        return Gaussians(means=means.clamp(-1, 1) if config.clip_xyz else means, sh=sh[..., None, :],
                         log_scales=(scale + config.scale_bias).clamp(max=config.scale_max), quats=quats,
                         opacity_logits=opacity + config.opacity_bias)

    def _along_rays(self, raw: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
        """Raw xyz, origins, directions [B, V, 3, H, W] -> a point on each pixel's ray, world."""
        share = raw.mean(2, keepdim=True).sigmoid()
        middle = -(origins * directions).sum(2, keepdim=True)  # depth of the point nearest the origin
        return origins + ((2 * share - 1) * self.config.depth_half + middle) * directions

    def _sequence(self, images: Tensor) -> Tensor:
        """[B, V, C, H, W] -> [B, V * H * W, C] in output order: the inverse of `pixel_grid`."""
        channels = images.shape[2]
        return self.patch_embedder[0](images).unflatten(-1, (-1, channels)).flatten(1, 2)


def activation_gb(config: GSLRMConfig, tokens: int, bytes_each: int) -> dict[Recompute, float]:
    """What backward needs of `tokens` tokens (all objects of a batch), GB, for each way to keep activations.

    A block keeps sixteen tensors of that size: its input, what attention puts out, q, k, v, the input of the MLP, both
    norms' outputs, and the hidden layer (4 d wide) before and after its GELU.
    """
    one = tokens * config.d * config.n_layer * bytes_each / 1e9
    return {False: 16 * one, "selective": 2 * one, True: one}


def posed_images(images: Tensor, origins: Tensor, directions: Tensor) -> Tensor:
    """The network's input [B, V, 9, H, W]: RGB in -1..1, ray direction, the ray's point nearest 0."""
    nearest = origins - (origins * directions).sum(2, keepdim=True) * directions
    return torch.cat([images * 2 - 1, directions, nearest], 2)


def _refuse(path: str | os.PathLike[str], problems: dict[str, list[str]]) -> None:
    found = [f"{len(names)} {kind}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
             for kind, names in problems.items() if names]
    if found:
        raise CheckpointMismatch(f"weights {path} do not fit GS-LRM (is it another d, n_layer or "
                                 "patch_size?)\n  " + "\n  ".join(found))
