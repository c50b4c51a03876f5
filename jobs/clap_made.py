"""The tiny components of a run without a base model: an audio tower, a text encoder, and a text-to-image UNet that is
pre-trained here on the data's pictures with their captions, half of them empty.
"""
from __future__ import annotations

import time
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import (
    ClapAudioConfig, ClapAudioModelWithProjection, ClapFeatureExtractor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer,
)

from configs.clap import Clap1Run, TinyBase, TinyClap
from jobs.clap_components import Frozen
from jobs.data.clips import Clips
from jobs.loader import Draw
from jobs.metrics import duration
from jobs.pretraining import pretrain
from jobs.runtime import StopFlag
from jobs.world import World, mixed_seed
from models.clap2diffusion import Codec, Conditioning
from models.mv_conditioning import training_target

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,_-"  # what the tokenizer knows
_PROMPT_TOKENS = 12
_HOP_S, _WINDOW, _BANDS = 0.016, 512, 16
_CENTRED_ON = 128  # clips


def make_frozen(config: Clap1Run) -> Frozen:
    """Small and random: a function of the seed after `random:`."""
    tiny, size = config.model.tiny, config.model.image_size
    torch.manual_seed(mixed_seed("clap components", config.base_model))
    clap, features = _clap(tiny.clap)
    text_encoder, tokenizer = _text(tiny.base.cross_attention_dim)
    unet = _unet(tiny.base, size)
    for network in (clap, text_encoder, unet):
        network.eval().requires_grad_(False)
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction",
                              clip_sample=True, set_alpha_to_one=True)
    return Frozen(unet, None, text_encoder, tokenizer, scheduler, clap, features, None, None)


def _unet(tiny: TinyBase, size: int) -> UNet2DConditionModel:
    levels = len(tiny.channels)
    return UNet2DConditionModel(
        sample_size=size, in_channels=3, out_channels=3, layers_per_block=tiny.layers_per_block,
        block_out_channels=tiny.channels, cross_attention_dim=tiny.cross_attention_dim, norm_num_groups=8,
        attention_head_dim=2, down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",))


def _clap(tiny: TinyClap) -> tuple[ClapAudioModelWithProjection, ClapFeatureExtractor]:
    width = tiny.width
    clap = ClapAudioModelWithProjection(ClapAudioConfig(
        spec_size=32, num_mel_bins=_BANDS, patch_size=4, patch_stride=[4, 4], window_size=4, depths=[1, 1],
        num_attention_heads=[2, 4], patch_embeds_hidden_size=width, hidden_size=2 * width, num_hidden_layers=2,
        projection_dim=tiny.projection, enable_fusion=False))
    return clap, ClapFeatureExtractor(
        feature_size=_BANDS, sampling_rate=tiny.rate, hop_length=round(_HOP_S * tiny.rate), fft_window_size=_WINDOW,
        max_length_s=tiny.seconds, frequency_min=50, frequency_max=tiny.rate // 2, truncation="rand_trunc")


def _text(width: int) -> tuple[CLIPTextModel, CLIPTokenizer]:
    words = [letter + end for letter in _LETTERS for end in ("", "</w>")] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[],
                              model_max_length=_PROMPT_TOKENS)
    start, end = len(words) - 2, len(words) - 1
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=1,
        projection_dim=width, max_position_embeddings=_PROMPT_TOKENS, bos_token_id=start, eos_token_id=end,
        pad_token_id=end)), tokenizer


@torch.no_grad()
def centre(conditioning: Conditioning, clips: Clips) -> None:
    """Fit the random audio tower to the data's loudness and remove what all its outputs share: a random tower gives
    nearly the same embedding to every sound otherwise."""
    chosen = range(0, len(clips), max(1, len(clips) // _CENTRED_ON))
    mel = clips.batch([Draw(0, index) for index in chosen]).features
    tower = conditioning.clap.audio_model.audio_encoder
    by_band = mel.flatten(0, 2)
    tower.batch_norm.running_mean.copy_(by_band.mean(0))
    tower.batch_norm.running_var.copy_(by_band.var(0) + 1e-3)
    longer = torch.zeros(len(mel), 1, dtype=torch.bool)
    raw = conditioning.clap(input_features=mel, is_longer=longer).audio_embeds
    conditioning.clap.audio_projection.linear2.bias -= raw.mean(0)


def pretrain_base(unet: UNet2DConditionModel, conditioning: Conditioning, scheduler: DDIMScheduler, clips: Clips,
                  tiny: TinyBase, seed: int, world: World, stop: StopFlag, say: Callable[[str], None]) -> bool:
    """Train `unet` in place from captions to pictures, alike on all ranks; False when they agreed to stop meanwhile."""
    began = time.monotonic()
    if not pretrain("base", unet, lambda: _loss(unet, conditioning, scheduler, clips, tiny.batch, world.device),
                    tiny.steps, tiny.lr, seed, world, stop, say):
        return False
    say(f"base model trained in {duration(time.monotonic() - began)}")
    return True


def _loss(unet: UNet2DConditionModel, conditioning: Conditioning, scheduler: DDIMScheduler, clips: Clips, count: int,
          device: torch.device) -> Tensor:
    chosen = torch.randint(len(clips), (count,)).tolist()
    captions = [clips.clips[index].caption if told else "" for index, told in zip(chosen, torch.rand(count) < 0.5)]
    latents = Codec(None).moments(clips.pictures(chosen).to(device))
    noise = torch.randn_like(latents)
    t = torch.randint(scheduler.config.num_train_timesteps, (count,), device=device)
    noisy = scheduler.add_noise(latents, noise, t)
    predicted = unet(noisy, t, encoder_hidden_states=conditioning.prompts(captions)).sample
    return (predicted - training_target(scheduler, latents, noise, t)).square().mean()
