"""Pictures from sounds: what generation and evaluation share."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.clap_components import Loaded, load_checkpoint
from jobs.data.audio import read_audio
from jobs.data.clips import cropped
from jobs.world import mixed_seed
from models.clap2diffusion import generate


class Painter:
    """A checkpoint in eval mode. A picture depends on its sound, prompt and seed, not on its batch."""

    def __init__(self, checkpoint: Path, base_model: str | None, clap_model: str | None, precision: str,
                 say: object = print) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._bf16 = precision == "bf16"
        self.loaded: Loaded = load_checkpoint(checkpoint, base_model, clap_model, say)
        self.loaded.to(self.device, self._bf16)
        self.loaded.parts.eval()
        self.loaded.projector.eval()

    def hear(self, path: Path) -> Tensor:
        """The embedding [1, E] of a sound file, its middle if it is too long. Raises AudioError."""
        recipe, conditioning = self.loaded.about.recipe, self.loaded.conditioning
        sound = cropped(read_audio(path, recipe.rate), recipe.rate, recipe.seconds)
        return conditioning.embed(conditioning.mel([sound]))

    def paint(self, embeddings: Tensor, prompt: str, negative_prompt: str, steps: int, guidance: float,
              strength: float, seeds: Sequence[int]) -> Tensor:
        """RGB [B, 3, H, W] in 0..1 of embeddings [B, E]."""
        loaded = self.loaded
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            latents = generate(loaded.frozen.unet, loaded.frozen.scheduler, loaded.conditioning, embeddings, prompt,
                               negative_prompt, steps, guidance, strength, loaded.latent_shape, seeds)
        return loaded.codec.decode(latents).cpu()


def seeds_of(seed: int, count: int) -> list[int]:
    """One for each of `count` pictures; the same for every strength of guidance and for the shuffled control."""
    return [mixed_seed("picture", seed, number) for number in range(count)]


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def save_rows(path: Path, rows: Sequence[Tensor], least: int = 64) -> None:
    """Pictures [n, 3, H, W] in 0..1 in rows, each at least `least` px wide."""
    whole = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    pixels = (whole * 255).round().byte().permute(1, 2, 0).numpy()
    times = -(-least // rows[0].shape[-1])
    Image.fromarray(np.ascontiguousarray(pixels.repeat(times, 0).repeat(times, 1))).save(path)
