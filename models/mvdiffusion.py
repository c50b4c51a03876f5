"""MVDiffusion: one picture of an object to its six views (unCLIP latent diffusion over a multi-view UNet).

    unet = build_unet(config)                      # a diffusers UNet2DConditionModel with our attention rule
    pipeline = MVDiffusionPipeline.from_pretrained("checkpoints/step-00030000-a000")
    views = pipeline(image, prompt_embeds, steps=50, guidance=3.0, eta=1.0, seed=0)

Nothing here asks a hub: all weights come from folders that the user names.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from models.mv_conditioning import class_labels
from models.mv_unet import MultiViewAttention, MultiViewUNet, UNetError, as_multiview, build_unet, load_unet
from models.weights import from_folder

__all__ = ["EMA", "UNET", "MVDiffusionPipeline", "MultiViewUNet", "PipelineError", "UNetError", "build_unet",
           "load_frozen", "load_unet", "to_rgb", "without_progress_bars"]

UNET, EMA = "unet", "unet_ema"  # folders of a checkpoint
Output = Literal["latent", "pil", "pt"]


class PipelineError(ValueError):
    """A pipeline folder, or an input of the pipeline, that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class _Noise:
    """The random numbers of several objects: one generator each, so that what an object gets does not depend on what
    is drawn beside it. Drawn on the CPU: the same on every device."""

    generators: tuple[torch.Generator, ...]
    device: torch.device

    def draw(self, *shape: int) -> Tensor:
        """[B * shape[0], *shape[1:]]: one block per object."""
        blocks = [torch.randn(shape, generator=generator) for generator in self.generators]
        return torch.cat(blocks).to(self.device)


class MVDiffusionPipeline:
    """Sampling with the components of a diffusers folder; `unet` may be a plain UNet2DConditionModel."""

    def __init__(self, unet: nn.Module, vae: Any, image_encoder: Any, image_normalizer: Any,
                 image_noising_scheduler: Any, scheduler: Any, feature_extractor: Any) -> None:
        self.unet: MultiViewUNet = as_multiview(unet)
        self.vae, self.image_encoder, self.image_normalizer = vae, image_encoder, image_normalizer
        self.image_noising_scheduler, self.scheduler = image_noising_scheduler, scheduler
        self.feature_extractor = feature_extractor

    @classmethod
    def from_pretrained(cls, folder: str | Path, weights: Literal["ema", "unet"] | None = None,
                        attention: MultiViewAttention | None = None) -> MVDiffusionPipeline:
        """From a folder in diffusers' format: a checkpoint of phase 1 or a public one. fp32, eval mode, on the CPU.

        `weights`: `ema` is `unet_ema/`, `unet` is `unet/`; None takes the EMA where there is one. Raises
        PipelineError or UNetError, which name the folder and what is missing.
        """
        folder = Path(folder)
        parts = load_frozen(folder)
        chosen = {"ema": EMA, "unet": UNET, None: EMA if (folder / EMA).is_dir() else UNET}[weights]
        return cls(unet=load_unet(folder / chosen, attention).eval(), **parts)

    def to(self, device: torch.device | str) -> MVDiffusionPipeline:
        for module in (self.unet, self.vae, self.image_encoder):
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def __call__(self, image: Any, prompt_embeds: Tensor, steps: int = 50, guidance: float = 3.0, eta: float = 1.0,
                 seed: int = 0, output_type: Output = "pil") -> Any:
        """The views of one object: latents [V, 4, h, w], a list of V pictures, or (`pt`) RGB [V, 3, H, W] in 0..1.

        Args: image: a PIL picture (alpha is put on white), uint8 [H, W, 3|4] or float [3, H, W] in 0..1;
        prompt_embeds [V, L, D]. The same seed gives the same views on every device, up to rounding.
        """
        found = self.generate([image], prompt_embeds, steps, guidance, eta, [seed], output_type)
        return found[0]

    @torch.no_grad()
    def generate(self, images: Sequence[Any], prompt_embeds: Tensor, steps: int, guidance: float, eta: float,
                 seeds: Sequence[int], output_type: Output = "pt") -> Any:
        """The same for B objects of one size at once, a seed for each; the answer has a leading B.

        An object's random numbers come from its own seed alone, whatever stands beside it in the batch.
        """
        pictures = torch.stack([to_rgb(image) for image in images])
        embeds, condition = self.encode(pictures)
        latents = self.sample(embeds, condition, prompt_embeds, steps, guidance, eta, seeds)
        if output_type == "latent":
            return latents
        decoded = self.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        return decoded if output_type == "pt" else [[_to_pil(view) for view in views] for views in decoded]

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP embeddings [B, E] and condition latents [B, 4, h, w] of RGB [B, 3, H, W] in 0..1: once per picture,
        not once per view."""
        with self._full_precision():
            posterior = self.vae.encode((pictures.to(self.device) * 2 - 1).contiguous()).latent_dist
        return self.embed(pictures), posterior.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """CLIP embeddings [B, E] of RGB [B, 3, H, W] in 0..1."""
        arrays = [(picture.cpu() * 255).round().byte().permute(1, 2, 0).numpy() for picture in pictures]
        pixels = self.feature_extractor(images=[Image.fromarray(array) for array in arrays], return_tensors="pt")
        with self._full_precision():
            return self.image_encoder(pixels.pixel_values.to(self.device)).image_embeds

    def _full_precision(self) -> torch.autocast:
        """Autocast is for the UNet: what the others lose is never made good again, and they run once."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """RGB [n, 3, H, W] in 0..1 of scaled latents [n, 4, h, w], a few pictures at a time."""
        with self._full_precision():
            parts = [self.vae.decode(part.contiguous(), return_dict=False)[0]
                     for part in (latents / self.vae.config.scaling_factor).split(self.unet.num_views)]
        return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(self, embeds: Tensor, condition: Tensor, prompt_embeds: Tensor, steps: int, guidance: float,
               eta: float, seeds: Sequence[int]) -> Tensor:
        """Scaled latents [B, V, 4, h, w] of embeds [B, E] and condition latents [B, 4, h, w].

        Random numbers per object, in this order: the noise of the embedding, the initial latents, then (eta > 0) one
        block per step. Raises PipelineError.
        """
        views, objects, device = self.unet.num_views, len(embeds), self.device
        _check(prompt_embeds, views, len(seeds), objects, steps, self.unet.config.cross_attention_dim)
        noise = _Noise(tuple(torch.Generator().manual_seed(seed) for seed in seeds), device)
        labels = class_labels(embeds.repeat_interleave(views, 0), noise.draw(views, embeds.shape[-1]),
                              self.image_normalizer, self.image_noising_scheduler)
        block = (views, self.vae.config.latent_channels, *condition.shape[-2:])
        latents = noise.draw(*block) * self.scheduler.init_noise_sigma
        front = condition.repeat_interleave(views, 0)
        prompts = prompt_embeds.to(latents).repeat(objects, 1, 1)
        guided = guidance != 1
        if guided:  # unconditional first: the whole label and the condition latents are 0, the prompt stays
            labels, front, prompts = (torch.cat([part, part]) if part is prompts else
                                      torch.cat([torch.zeros_like(part), part]) for part in (labels, front, prompts))
        self.scheduler.set_timesteps(steps, device=device)
        for t in self.scheduler.timesteps:
            double = torch.cat([latents, latents]) if guided else latents
            double = self.scheduler.scale_model_input(double, t)
            predicted = self.unet(torch.cat([double, front], 1), t, prompts, labels).float()
            if guided:
                free, told = predicted.chunk(2)
                predicted = free + guidance * (told - free)
            variance = noise.draw(*block) if eta > 0 else None
            latents = self.scheduler.step(predicted, t, latents, eta=eta, variance_noise=variance).prev_sample
        return latents.unflatten(0, (objects, views))


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws one for every file it reads or writes, and leaves a thread behind."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_frozen(folder: Path) -> dict[str, Any]:
    """All components but the UNet, by their folders' names, as MVDiffusionPipeline takes them. Raises
    PipelineError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise PipelineError(f"{folder}: there is no such folder; a diffusers pipeline folder is needed")
    classes = {"vae": AutoencoderKL, "image_encoder": CLIPVisionModelWithProjection,
               "image_normalizer": StableUnCLIPImageNormalizer, "image_noising_scheduler": DDPMScheduler,
               "scheduler": DDIMScheduler, "feature_extractor": CLIPImageProcessorPil}
    found = {}
    for name, kind in classes.items():
        try:
            dtype = {"torch_dtype": torch.float32} if name in ("vae", "image_normalizer") else {}
            dtype |= {"dtype": torch.float32} if name == "image_encoder" else {}
            with without_progress_bars():
                found[name] = from_folder(kind, folder / name, **dtype)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise PipelineError(f"{folder / name}: {kind.__name__} cannot be read there: {error}") from None
        if isinstance(found[name], nn.Module):
            found[name].eval().requires_grad_(False)
    return found


def to_rgb(image: Any) -> Tensor:
    """RGB [3, H, W] in 0..1 of a picture in any of the forms that the pipeline takes. Raises PipelineError."""
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB"))
    pixels = torch.as_tensor(image)
    if pixels.is_floating_point() and pixels.dim() == 3 and pixels.shape[0] == 3:
        return pixels.float()
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[2] not in (3, 4):
        raise PipelineError("a picture is PIL, uint8 [H, W, 3 or 4], or float [3, H, W] in 0..1; this one is "
                            f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}")
    unit = pixels.permute(2, 0, 1).float() / 255
    return unit[:3] * unit[3:] + (1 - unit[3:]) if len(unit) == 4 else unit.contiguous()


def _check(prompt_embeds: Tensor, views: int, seeds: int, objects: int, steps: int, width: int) -> None:
    if prompt_embeds.dim() != 3 or prompt_embeds.shape[0] != views:
        raise PipelineError(f"prompt_embeds must be [{views}, L, D], one row per view, not {list(prompt_embeds.shape)}")
    if prompt_embeds.shape[2] != width:
        raise PipelineError(f"prompt_embeds are {prompt_embeds.shape[2]} wide, the UNet's cross-attention is {width}: "
                            "they were made with another text encoder than this checkpoint's")
    if seeds != objects:
        raise PipelineError(f"{objects} pictures need {objects} seeds, not {seeds}")
    if steps < 1:
        raise PipelineError(f"steps = {steps}: at least one is needed")


def _to_pil(view: Tensor) -> Image.Image:
    return Image.fromarray((view.cpu() * 255).round().byte().permute(1, 2, 0).numpy())
