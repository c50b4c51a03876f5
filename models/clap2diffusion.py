"""CLAP2Diffusion: an image from a sound, by audio tokens inside Stable Diffusion's UNet.

    embedding [B, 512] of CLAP's audio tower --AudioProjector--> tokens [B, 8, 768] --AudioAttention--> UNet

`Conditioning` is the one way from a sound to tokens and from a prompt and tokens to the UNet's arguments; training,
validation and generation all go through it, and its record stands in every checkpoint.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from models.audio_attention import SCALE, TOKENS, TrainedParts, add_audio_attention

LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


class AudioProjector(nn.Module):
    """An audio embedding to tokens for cross-attention: 7,885,056 parameters at 512 -> 8 x 768."""

    def __init__(self, width_in: int = 512, hidden: int = 1024, tokens: int = 8, width: int = 768,
                 dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.layers = nn.Sequential(
            nn.Linear(width_in, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden, tokens * width))
        self.norm = nn.LayerNorm(width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.kind = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, width_in] -> tokens [B, T, width], in the order of their positions."""
        return self.norm(self.layers(embedding).unflatten(1, (self.tokens, self.width))) + self.position + self.kind

    def train(self, mode: bool = True) -> AudioProjector:
        """A projector that is not trained keeps its dropout off."""
        return super().train(mode and self.position.requires_grad)


@dataclass(frozen=True)
class Recipe:
    """How a sound becomes tokens. A checkpoint that was trained by another recipe means something else by them."""

    clap: str  # fingerprint of the audio tower's weights
    rate: int  # Hz, mono
    seconds: float  # a longer clip is cropped (at its middle, but for training), a shorter one repeated
    tokens: int = 8
    scaling: str = "l2, times the square root of the width"
    order: str = "text in cross-attention; audio tokens beside it, in the order of their positions"
    version: int = 1

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Conditioning:
    """Sounds and prompts to what the UNet is called with. The audio tower and the text encoder are frozen."""

    def __init__(self, recipe: Recipe, clap: nn.Module, features: Any, text_encoder: nn.Module, tokenizer: Any,
                 projector: AudioProjector) -> None:
        self.recipe, self.clap, self.features = recipe, clap, features
        self.text_encoder, self.tokenizer, self.projector = text_encoder, tokenizer, projector
        self._known: dict[str, Tensor] = {}  # prompt -> [L, D]

    @property
    def device(self) -> torch.device:
        return self.projector.position.device

    def mel(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Log-mel features [B, 1, frames, bands] of mono float32 clips at `recipe.rate`, none longer than
        `recipe.seconds`. Each clip alone: what stands beside it changes nothing."""
        return torch.cat([self.features(clip, sampling_rate=self.recipe.rate, truncation="rand_trunc",
                                        padding="repeatpad", return_tensors="pt")["input_features"] for clip in clips])

    @torch.no_grad()
    def embed(self, mel: Tensor) -> Tensor:
        """[B, 1, frames, bands] -> L2-normalised audio embeddings [B, E], one per clip, fp32."""
        with torch.autocast(self.device.type, enabled=False):
            longer = torch.zeros(len(mel), 1, dtype=torch.bool)
            found = self.clap(input_features=mel.to(self.device), is_longer=longer.to(self.device)).audio_embeds
        return F.normalize(found.float(), dim=-1)

    def tokens(self, embedding: Tensor) -> Tensor:
        """Embeddings [B, E] -> tokens [B, T, D]; with a gradient where the projector has one."""
        return self.projector(embedding * embedding.shape[-1] ** 0.5)

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> Tensor:
        """[B, L, D] of the frozen text encoder; each text is encoded once."""
        for text in texts:
            if text not in self._known:
                ids = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt",
                                     max_length=self.tokenizer.model_max_length).input_ids
                with torch.autocast(self.device.type, enabled=False):
                    found = self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state[0]
                self._known[text] = found.float().cpu()
        return torch.stack([self._known[text] for text in texts]).to(self.device)

    @staticmethod
    def arguments(prompts: Tensor, tokens: Tensor | None, scale: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of the UNet; tokens None: it hears nothing. `scale` [B]: how strongly each hears."""
        if tokens is None:
            return {"encoder_hidden_states": prompts}
        return {"encoder_hidden_states": prompts, "cross_attention_kwargs": {TOKENS: tokens, SCALE: scale}}


class Codec:
    """Pictures to latents and back; without an autoencoder the UNet works on the pixels themselves."""

    def __init__(self, vae: AutoencoderKL | None) -> None:
        self.vae = vae

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> what latents are drawn from: mean and log variance [B, 2c, h, w], or the pixels in
        -1..1. fp32."""
        pictures = pixels.float() / 127.5 - 1
        if self.vae is None:
            return pictures
        with torch.autocast(self.vae.device.type, enabled=False):
            return self.vae.encode(pictures.to(self.vae.dtype).contiguous()).latent_dist.parameters.float()

    def draw(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled latents [B, c, h, w]; noise None: the mode."""
        if self.vae is None:
            return moments
        mean, log_variance = moments.chunk(2, 1)
        spread = 0 if noise is None else (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return (mean + spread) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in 0..1."""
        if self.vae is not None:
            with torch.autocast(self.vae.device.type, enabled=False):
                scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
                latents = self.vae.decode(scaled.contiguous(), return_dict=False)[0]
        return (latents.float() / 2 + 0.5).clamp(0, 1)


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float, dropout: float) -> None:
    """A LoRA on every attention projection of `unet`, fp32, doing nothing yet (its B is 0)."""
    from peft import LoraConfig  # seconds; only stages 2 and 3 need it

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(LORA_TARGETS)))


def build_trained(unet: UNet2DConditionModel, gate: float, lora: tuple[int, float, float] | None) -> TrainedParts:
    """Freeze `unet`, add audio attention and, given (rank, alpha, dropout), a LoRA. Raises ValueError."""
    unet.requires_grad_(False)
    add_audio_attention(unet, gate)
    if lora:
        add_lora(unet, *lora)
    parts = TrainedParts(unet)
    for parameter in dict(parts.named_parameters()).values():
        parameter.data = parameter.data.float()
    return parts


@torch.no_grad()
def generate(unet: UNet2DConditionModel, scheduler: Any, conditioning: Conditioning, embedding: Tensor,
             prompt: str, negative_prompt: str, steps: int, guidance: float, strength: float, shape: tuple[int, ...],
             seeds: Sequence[int]) -> Tensor:
    """Scaled latents [B, *shape] for audio embeddings [B, E] and a seed each, by `scheduler` without noise of its own.

    Guidance leads away from the negative prompt *without* audio towards the prompt with it; a picture's random numbers
    come from its own seed alone.
    """
    count, device = len(embedding), conditioning.device
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(device) * scheduler.init_noise_sigma
    prompts = conditioning.prompts([prompt] * count)
    tokens, scale = conditioning.tokens(embedding), torch.full((count,), float(strength), device=device)
    guided = guidance != 1
    if guided:
        prompts = torch.cat([conditioning.prompts([negative_prompt] * count), prompts])
        tokens, scale = torch.cat([tokens, tokens]), torch.cat([torch.zeros_like(scale), scale])
    arguments = conditioning.arguments(prompts, tokens, scale)
    scheduler.set_timesteps(steps, device=device)
    for t in scheduler.timesteps:
        double = torch.cat([latents, latents]) if guided else latents
        predicted = unet(scheduler.scale_model_input(double, t), t, **arguments).sample.float()
        if guided:
            free, told = predicted.chunk(2)
            predicted = free + guidance * (told - free)
        # Guidance overshoots and is clipped: noise that was computed from the unclipped picture would be its opposite.
        latents = scheduler.step(predicted, t, latents, use_clipped_model_output=True).prev_sample
    return latents
