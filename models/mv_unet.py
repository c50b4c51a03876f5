"""The multi-view UNet: diffusers' UNet2DConditionModel with one rule of our own in every self-attention.

`front_self`: the queries of view v attend to [tokens of view 0 ; tokens of view v]. `dense`: to the tokens of all
views. The batch is laid out (objects views). Cross-attention and all the rest are diffusers', and so are the
names and shapes of all weights. The rule is written into the config, never chosen by what is installed.
"""
from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from models.weights import WeightsError, misfits, read_safetensors, read_weights

MultiViewAttention = Literal["front_self", "dense"]
VIEWS = 6
CONV_IN = "conv_in.weight"
_WEIGHT_FILES = tuple(f"diffusion_pytorch_model.{end}" for end in ("safetensors", "fp16.safetensors", "bin"))
_OURS = {"attention": "front_self", "num_views": VIEWS}  # config keys that plain diffusers ignores


class UNetError(ValueError):
    """A UNet that cannot be built or loaded: the message says which key, file or tensor."""


class MultiViewUNet(UNet2DConditionModel):
    """Plain diffusers weights, the attention rule `attention` over `num_views` views. Made by `build_unet`."""

    attention: MultiViewAttention = "front_self"
    num_views: int = VIEWS

    def forward(self, latents: Tensor, t: Tensor | int, prompt_embeds: Tensor, class_labels: Tensor) -> Tensor:
        """What the scheduler calls the model output, [B*V, 4, h, w].

        Args: latents [B*V, 8, h, w] (noisy, then condition), t [B*V] or one number, prompt_embeds [B*V, L, D],
        class_labels [B*V, 2E]. Raises ValueError when the batch is no whole number of objects.
        """
        if len(latents) % self.num_views:
            raise ValueError(f"a batch of {len(latents)} is no whole number of objects of {self.num_views} views")
        latents = latents.contiguous()  # GroupNorm on the CPU loses digits on channels_last
        return super().forward(latents, t, prompt_embeds, class_labels=class_labels, return_dict=False)[0]


class MultiViewProcessor:
    """Self-attention over [B*V, N, C] with the keys and values that the rule names."""

    def __init__(self, attention: MultiViewAttention, views: int) -> None:
        self.attention, self.views = attention, views

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            raise ValueError("multi-view self-attention takes no attention mask")
        shape = hidden_states.shape
        query, key, value = (project(hidden_states).unflatten(0, (-1, self.views))
                             for project in (attn.to_q, attn.to_k, attn.to_v))  # [B, V, N, C]
        if self.attention == "dense":
            key, value = (every.flatten(1, 2)[:, None].expand(-1, self.views, -1, -1) for every in (key, value))
        else:
            key, value = (torch.cat([own[:, :1].expand_as(own), own], 2) for own in (key, value))
        query, key, value = (part.flatten(0, 1).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                             for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        mixed = mixed.transpose(1, 2).reshape(shape).to(query.dtype)
        mixed = attn.to_out[1](attn.to_out[0](mixed))
        return (mixed + hidden_states if attn.residual_connection else mixed) / attn.rescale_output_factor


def build_unet(config: Mapping[str, Any]) -> MultiViewUNet:
    """A multi-view UNet with fresh weights, from the keys of diffusers' unet/config.json and ours
    (`attention`, default front_self; `num_views`, default 6). Raises UNetError for keys that neither knows."""
    ours = {key: config.get(key, default) for key, default in _OURS.items()}
    if ours["attention"] not in get_args(MultiViewAttention):
        raise UNetError(f"attention: {ours['attention']!r} is none of {', '.join(get_args(MultiViewAttention))}")
    theirs = {key: value for key, value in config.items() if key not in ours and not key.startswith("_")}
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    unknown = sorted(theirs.keys() - known.keys())
    if unknown:
        raise UNetError(f"the UNet's config has keys that UNet2DConditionModel does not know: {', '.join(unknown)}")
    unet = MultiViewUNet(**theirs)
    unet.attention, unet.num_views = ours["attention"], int(ours["num_views"])
    processor = MultiViewProcessor(unet.attention, unet.num_views)
    unet.set_attn_processor({name: processor if ".attn1." in name else there
                             for name, there in unet.attn_processors.items()})
    return unet


def unet_config(unet: MultiViewUNet) -> dict[str, Any]:
    """What belongs into unet/config.json: plain diffusers' keys, and `attention` and `num_views`."""
    theirs = json.loads(unet.to_json_string())
    return {**theirs, "_class_name": "UNet2DConditionModel", "attention": unet.attention, "num_views": unet.num_views}


def with_weights(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> MultiViewUNet:
    """A multi-view UNet around existing weights, which are not copied. Raises UNetError."""
    with torch.device("meta"):
        unet = build_unet(config)
    if problems := misfits(unet.state_dict(), weights):
        raise UNetError(f"the weights do not fit the UNet: {'; '.join(problems)}")
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet


def with_condition_channels(config: Mapping[str, Any], weights: Mapping[str, Tensor],
                            ) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A UNet of plain Stable Diffusion (4 input channels) made ready for condition latents: its 4 channels are
    copied, the other 4 are 0. One that has 8 channels already is left as it is: what they learned stays.

    Raises UNetError for any other number.
    """
    if CONV_IN not in weights:
        raise UNetError(f"there is no {CONV_IN} among the weights: they are not those of a UNet2DConditionModel")
    weight = weights[CONV_IN]
    channels = weight.shape[1]
    if channels not in (4, 8):
        raise UNetError(f"{CONV_IN} has {channels} input channels; 4 (Stable Diffusion) or 8 (multi-view) are known")
    if channels == 8:
        return dict(config), dict(weights)
    wide = torch.cat([weight, torch.zeros_like(weight)], 1)
    return {**config, "in_channels": 8}, {**weights, CONV_IN: wide}


def load_unet(folder: Path, attention: MultiViewAttention | None = None) -> MultiViewUNet:
    """The UNet of a diffusers folder, in fp32. `attention`: instead of what its config.json says (a public folder
    says nothing: front_self). Raises UNetError.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UNetError(f"{folder}: no UNet in diffusers' format can be read there: config.json: {error}") from None
    config, weights = with_condition_channels(config, _read_weights(folder))
    return with_weights({**config, "attention": attention} if attention else config, weights)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """fp32. Raises UNetError."""
    found = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UNetError(f"{folder}: there is none of {', '.join(_WEIGHT_FILES)}")
    try:
        weights = read_weights(found) if found.suffix == ".bin" else read_safetensors(found)
    except (SafetensorError, WeightsError, OSError) as error:
        raise UNetError(f"{found}: cannot be read: {error}") from None
    return {name: tensor.float() for name, tensor in weights.items()}


def as_multiview(unet: torch.nn.Module) -> MultiViewUNet:
    """`unet` itself, or the multi-view UNet around the weights of a plain one. Raises UNetError."""
    if isinstance(unet, MultiViewUNet):
        return unet
    if not isinstance(unet, UNet2DConditionModel):
        raise UNetError(f"a UNet2DConditionModel is needed, not {type(unet).__name__}")
    return with_weights(*with_condition_channels(json.loads(unet.to_json_string()), unet.state_dict()))
