"""Gated audio attention inside a diffusers UNet: beside the text, each cross-attention site attends to audio tokens.

    out + tanh(gate) * scale * attention(q, k_audio(tokens), v_audio(tokens))      before the site's to_out

Keys and values begin as copies of the site's own (as IP-Adapter does), the gate at tanh(gate) = .1: at exactly 0 only
the gates would have a gradient, and a gate that is frozen there would keep everything from learning for ever.
With gate 0, or without tokens, a site computes what diffusers computes.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_GATE = 0.1  # tanh(gate)
TOKENS, SCALE = "audio_tokens", "audio_scale"  # keys of cross_attention_kwargs


class _CallsForward:
    """nn.Module's `__call__` hides the arguments: diffusers looks at its signature, and drops what it does not name
    with one line in the log. So this stands before nn.Module among the bases."""

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None,
                 audio_tokens: Tensor | None = None, audio_scale: Tensor | None = None) -> Tensor:
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, audio_tokens, audio_scale)


class PlainAttention:
    """Self-attention that knows of the extra arguments and leaves them alone; else diffusers warns at every layer of
    every step."""

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None,
                 audio_tokens: Tensor | None = None, audio_scale: Tensor | None = None) -> Tensor:
        query = attn.to_q(hidden_states)
        mixed = _text_attention(attn, query, encoder_hidden_states, hidden_states, attention_mask)
        return _to_out(attn, mixed, hidden_states)


class AudioAttention(_CallsForward, nn.Module):
    """One cross-attention site. Keys and values of the audio, and one gate."""

    def __init__(self, attn: Attention, gate: float = INITIAL_GATE) -> None:
        super().__init__()
        inner, width = attn.to_k.out_features, attn.to_k.in_features
        where = attn.to_k.weight.device
        self.to_k_audio = nn.Linear(width, inner, bias=False, device=where)
        self.to_v_audio = nn.Linear(width, inner, bias=False, device=where)
        self.gate = nn.Parameter(torch.tensor(math.atanh(gate), device=where))
        with torch.no_grad():
            self.to_k_audio.weight.copy_(attn.to_k.weight)
            self.to_v_audio.weight.copy_(attn.to_v.weight)

    def attend(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None,
               attention_mask: Tensor | None, tokens: Tensor | None, scale: Tensor | None) -> Tensor:
        """hidden_states [B, N, C], tokens [B, T, D], scale [B] or None: 1. Without tokens: diffusers' own result."""
        query = attn.to_q(hidden_states)
        mixed = _text_attention(attn, query, encoder_hidden_states, hidden_states, attention_mask)
        if tokens is not None:
            heard = _attention(attn, query, self.to_k_audio(tokens), self.to_v_audio(tokens), None)
            strength = torch.tanh(self.gate) if scale is None else torch.tanh(self.gate) * scale[:, None, None]
            mixed = mixed + (strength * heard).to(mixed.dtype)
        return _to_out(attn, mixed, hidden_states)


def _text_attention(attn: Attention, query: Tensor, text: Tensor | None, hidden: Tensor, mask: Tensor | None) -> Tensor:
    source = hidden if text is None else text
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, source.shape[1], len(source))
        mask = mask.view(len(source), attn.heads, -1, mask.shape[-1])
    return _attention(attn, query, attn.to_k(source), attn.to_v(source), mask)


def _attention(attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
    return mixed.transpose(1, 2).flatten(2).to(query.dtype)


def _to_out(attn: Attention, mixed: Tensor, hidden: Tensor) -> Tensor:
    mixed = attn.to_out[1](attn.to_out[0](mixed))
    return (mixed + hidden if attn.residual_connection else mixed) / attn.rescale_output_factor


def add_audio_attention(unet: UNet2DConditionModel, gate: float = INITIAL_GATE) -> None:
    """Put an AudioAttention into every cross-attention of `unet` (16 in Stable Diffusion 1.5).

    Raises ValueError for a gate of 0 or beyond 1, and for a UNet without cross-attention.
    """
    if not 0 < abs(gate) < 1:
        raise ValueError(f"the initial tanh(gate) is {gate}: it must be between 0 and 1, and not 0, or nothing trains")
    sites = {f"{name}.processor": module for name, module in unet.named_modules() if isinstance(module, Attention)}
    if not any(attn.is_cross_attention for attn in sites.values()):
        raise ValueError("the UNet has no cross-attention to put audio into")
    unet.set_attn_processor({name: AudioAttention(attn, gate) if attn.is_cross_attention else PlainAttention()
                             for name, attn in sites.items()})


def audio_sites(unet: nn.Module) -> dict[str, AudioAttention]:
    """Every site by its name, in the UNet's order."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, AudioAttention)}


def gates(unet: nn.Module) -> list[float]:
    """tanh(gate) of every site."""
    return [math.tanh(site.gate.item()) for site in audio_sites(unet).values()]


class FixedGates:
    """Within `with`, every tanh(gate) of `unet` is `value`."""

    def __init__(self, unet: nn.Module, value: float) -> None:
        self._gates = [site.gate for site in audio_sites(unet).values()]
        self._raw = math.atanh(min(value, 1 - 1e-7))  # tanh is 1 to fp32 there

    def __enter__(self) -> None:
        self._before = [gate.detach().clone() for gate in self._gates]
        with torch.no_grad():
            for gate in self._gates:
                gate.fill_(self._raw)

    def __exit__(self, *_error: object) -> None:
        with torch.no_grad():
            for gate, before in zip(self._gates, self._before):
                gate.copy_(before)


class TrainedParts(nn.Module):
    """What of a UNet is ours: its audio attention and its LoRA, under the UNet's own names. Everything else of it is
    frozen and in no checkpoint of a stage."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def train(self, mode: bool = True) -> TrainedParts:
        """A LoRA that is not trained keeps its dropout off."""
        super().train(mode)
        self.unet.train(mode and any("lora_" in name and parameter.requires_grad
                                     for name, parameter in self.named_parameters()))
        return self

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.unet.named_parameters(prefix, recurse, remove_duplicate)
                if is_ours(name))

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        return {name: tensor if keep_vars else tensor.detach() for name, tensor in self.named_parameters()}


def is_ours(name: str) -> bool:
    """Whether a UNet's parameter of that name is one that was added."""
    return "lora_" in name or ".processor." in name


def set_trained(named: Iterable[tuple[str, nn.Parameter]], words: tuple[str, ...]) -> None:
    """Train the parameters in whose names one of `words` stands; freeze all others."""
    for name, parameter in named:
        parameter.requires_grad_(any(word in name for word in words))
