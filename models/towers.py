"""The two towers before the heads: a picture of a face to a vector, a recording of a voice to a vector.

ViT and wav2vec2, WavLM are those of transformers. The tiny ones learn the procedural identities on a CPU in a minute.
A frozen part of a tower stays in eval mode, whatever its owner is set to.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Freeze = Literal["all", "none", "top_k"]
_WINDOW_S, _HOP_S, _MELS = 0.032, 0.012, 40


class Tower(nn.Module, ABC):
    """`width`: of the vectors. Subclasses say which blocks lie above each other."""

    width: int

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """What `top_k` counts from its end."""

    def freeze(self, how: Freeze, top_k: int) -> None:
        """Leave a gradient to all parameters, to none, or to those of the last `top_k` blocks. Raises ValueError."""
        blocks = self.blocks()
        if how == "top_k" and top_k > len(blocks):
            raise ValueError(f"top_k: {top_k}, but the tower has {len(blocks)} blocks")
        self.requires_grad_(how == "none")
        if how == "top_k":
            for block in blocks[-top_k:]:
                block.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Tower:
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.training = False
                for below in module.modules():
                    below.training = False
        return self


class ViTTower(Tower):
    """transformers' ViTModel: the CLS vector."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.width = net, net.config.hidden_size

    def blocks(self) -> list[nn.Module]:
        *below, last = self.net.layers
        return [*below, nn.ModuleList([last, self.net.layernorm])]

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised [B, 3, S, S] -> [B, width]."""
        return self.net(pixel_values=pixels).last_hidden_state[:, 0]


class SpeechTower(Tower):
    """transformers' Wav2Vec2Model or WavLMModel: the mean over the frames that are sound, not padding."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.width = net, net.config.hidden_size
        first = net.feature_extractor.conv_layers[0]
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            first.layer_norm = _MaskedGroupNorm(first.layer_norm)
            self._norm, self._first = first.layer_norm, (net.config.conv_kernel[0], net.config.conv_stride[0])
        else:
            self._norm = None

    def blocks(self) -> list[nn.Module]:
        return list(self.net.encoder.layers)

    def frames(self, lengths: Tensor) -> Tensor:
        """How many frames so many samples give."""
        for kernel, stride in zip(self.net.config.conv_kernel, self.net.config.conv_stride):
            lengths = (lengths - kernel) // stride + 1
        return lengths

    def forward(self, sound: Tensor, lengths: Tensor) -> Tensor:
        """Normalised [B, T], padded with 0 behind `lengths` [B] -> [B, width]."""
        if self._norm is not None:
            kernel, stride = self._first
            self._norm.lengths = (lengths - kernel) // stride + 1
        attention = _inside(lengths, sound.shape[1])
        hidden = self.net(input_values=sound, attention_mask=attention.long()).last_hidden_state
        return masked_mean(hidden, self.frames(lengths))


class _MaskedGroupNorm(nn.Module):
    """A GroupNorm of one channel per group over time, whose statistics leave padding out: over all of a padded clip
    they are other numbers, and so are the features of the sound."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.lengths: Tensor  # [B], set before each forward

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, T]; 0 in the padding."""
        with torch.autocast(hidden.device.type, enabled=False):
            values = hidden.float()
            inside = _inside(self.lengths, hidden.shape[2])[:, None]
            count = self.lengths[:, None, None]
            mean = (values * inside).sum(2, keepdim=True) / count
            centred = (values - mean) * inside
            scaled = centred * (centred.square().sum(2, keepdim=True) / count + self.eps).rsqrt()
            return ((scaled * self.weight[:, None] + self.bias[:, None]) * inside).to(hidden.dtype)


class TinyFace(Tower):
    """Four convolutions, each of half the size before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [3, width // 4, width // 2, width, width]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(1, after), nn.GELU())
            for before, after in zip(sizes, sizes[1:]))
        self.width = width

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised [B, 3, S, S] -> [B, width]."""
        for layer in self.layers:
            pixels = layer(pixels)
        return pixels.mean((2, 3))


class TinyVoice(Tower):
    """A logarithmic mel spectrogram and three convolutions over time; the mean over the frames that are sound."""

    mels: Tensor

    def __init__(self, width: int, rate: int) -> None:
        super().__init__()
        self.window, self.hop = round(_WINDOW_S * rate), round(_HOP_S * rate)
        bins = self.window // 2 + 1
        self.register_buffer("mels", mel_filters(_MELS, bins, rate), persistent=False)
        sizes = [_MELS, width, width, width]
        self.layers = nn.ModuleList(nn.Conv1d(before, after, 3, stride, 1)
                                    for before, after, stride in zip(sizes, sizes[1:], (2, 1, 1)))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.layers)
        self.width = width

    def blocks(self) -> list[nn.Module]:
        return [nn.ModuleList(pair) for pair in zip(self.layers, self.norms)]

    def frames(self, lengths: Tensor) -> Tensor:
        """Frames of the spectrogram."""
        return (lengths - self.window) // self.hop + 1

    def forward(self, sound: Tensor, lengths: Tensor) -> Tensor:
        """Normalised [B, T], padded with 0 behind `lengths` [B] -> [B, width]."""
        frames = self.frames(lengths)
        hidden = self._spectrogram(sound) * _inside(frames, (sound.shape[1] - self.window) // self.hop + 1)[:, None]
        for layer, norm in zip(self.layers, self.norms):
            frames = (frames - 1) // layer.stride[0] + 1
            hidden = functional.gelu(norm(layer(hidden).transpose(1, 2)).transpose(1, 2))
            hidden = hidden * _inside(frames, hidden.shape[2])[:, None]
        return masked_mean(hidden.transpose(1, 2), frames)

    def _spectrogram(self, sound: Tensor) -> Tensor:
        """[B, mels, frames]."""
        with torch.autocast(sound.device.type, enabled=False):
            window = torch.hann_window(self.window, device=sound.device)
            pieces = sound.float().unfold(1, self.window, self.hop) * window
            power = torch.fft.rfft(pieces).abs().square() / self.window
            return (power @ self.mels + 1e-5).log().transpose(1, 2) / 4


def mel_filters(count: int, bins: int, rate: int) -> Tensor:
    """Triangles [bins, count], evenly spaced in mel (HTK) from 0 to rate/2."""
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, device="cpu")).item()
    edges = 700 * (10 ** (torch.linspace(0, top, count + 2) / 2595) - 1)
    hertz = torch.linspace(0, rate / 2, bins)[:, None]
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((hertz - low) / (mid - low), (high - hertz) / (high - mid)).clamp(min=0)


def masked_mean(hidden: Tensor, frames: Tensor) -> Tensor:
    """The mean [B, C] over the first `frames` [B] of [B, T, C]."""
    inside = _inside(frames, hidden.shape[1])[..., None]
    return torch.where(inside, hidden, 0.0).sum(1) / frames[:, None]


def _inside(lengths: Tensor, size: int) -> Tensor:
    """Bool [B, size]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def without_chance(config: Any) -> Any:
    """A configuration of transformers without what draws from generators that no seed of ours reaches (masked spans of
    the spectrum, from numpy) or drops layers."""
    for name, value in (("apply_spec_augment", False), ("layerdrop", 0.0)):
        if hasattr(config, name):
            setattr(config, name, value)
    return config
