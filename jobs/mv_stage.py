"""MVDiffusion as a stage: its loss on cached latents, its averaged weights, its validation and what it leaves."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from configs.phase1 import Phase1Run
from jobs import bars
from jobs.ema import Ema
from jobs.memory import Memory
from jobs.metrics import Metrics
from jobs.mv_components import WEIGHTS_FILE, Components
from jobs.mv_data import ObjectBatch, Objects
from jobs.mv_validation import FixedViews, verdict
from jobs.stage import Stage
from jobs.world import World
from models.mv_conditioning import class_labels, drop_conditions, snr_weights, training_target
from models.mvdiffusion import EMA, UNET, MVDiffusionPipeline

VIEWS_PICTURE = "input_generated_truth.png"


class MVStage(Stage):
    """One view in, all views of the rig out."""

    name = "phase1"
    scalars = ("mse",)
    shown = ("loss", "mse")
    best_metric = "val/psnr"
    files = {UNET: f"{UNET}/{WEIGHTS_FILE}", EMA: f"{EMA}/{WEIGHTS_FILE}"}

    def __init__(self, config: Phase1Run, components: Components, train: Objects, metrics: Metrics, world: World,
                 identity: dict[str, str], provenance: dict[str, str], attachments: Path, pictures: Path) -> None:
        self.source, self.identity, self.provenance, self.attachments = train, identity, provenance, attachments
        self._config, self._metrics, self._device, self._pictures = config, metrics, world.device, pictures
        frozen = components.frozen
        self._unet = components.unet.to(world.device).train()
        self._ema = Ema(self._unet, config.training.ema_max_decay)
        if config.training.gradient_checkpointing:
            self._unet.enable_gradient_checkpointing()
        self.modules = {UNET: self._unet, EMA: self._ema.module}
        self._sampler = MVDiffusionPipeline(self._ema.module, **frozen).to(world.device)
        self._encoder = ViewEncoder(self._sampler, world)
        self._scheduler = type(frozen["scheduler"]).from_config(frozen["scheduler"].config)
        self._prompts = components.prompts.to(world.device)
        self._is_main = world.is_main
        self._found: dict[str, float] = {}

    def prepare_validation(self, fixed: FixedViews) -> None:
        self._fixed = fixed

    @property
    def sampler(self) -> MVDiffusionPipeline:
        """The pipeline around the averaged weights."""
        return self._sampler

    def names(self, batch: ObjectBatch) -> list[str]:
        return batch.names

    def loss(self, batch: ObjectBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        training = self._config.training
        with torch.autocast(self._device.type, enabled=False):
            latents, condition, embeds = self._encoder.conditions(batch)
            objects, views = latents.shape[:2]
            label_noise = torch.randn(objects * views, embeds.shape[-1], device=self._device)
            labels = class_labels(embeds.repeat_interleave(views, 0), label_noise, self._sampler.image_normalizer,
                                  self._sampler.image_noising_scheduler).unflatten(0, (objects, views))
            chance = torch.rand(objects, device=self._device)
            front = condition[:, None].expand(-1, views, -1, -1, -1)
            labels, front = drop_conditions(labels, front, chance, training.condition_dropout)
            t = torch.randint(self._scheduler.config.num_train_timesteps, (objects,), device=self._device)
            t = t.repeat_interleave(views)  # one for all views of an object
            latents = latents.flatten(0, 1)
            noise = torch.randn_like(latents)
            noisy = self._scheduler.add_noise(latents, noise, t)
            target = training_target(self._scheduler, latents, noise, t)
        prompts = self._prompts[batch.order].flatten(0, 1)
        predicted = self._unet(torch.cat([noisy, front.flatten(0, 1)], 1), t, prompts, labels.flatten(0, 1))
        errors = (predicted.float() - target).square().mean((1, 2, 3))
        weights = snr_weights(self._scheduler.alphas_cumprod, t, training.snr_weighting, training.snr_gamma,
                              self._scheduler.config.prediction_type)
        return (weights * errors).mean(), {"mse": errors.mean()}

    def after_update(self, applied: int) -> None:
        self._ema.update(applied)

    def evaluate(self, step: int, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.training.precision == "bf16"):
            found = self._fixed.evaluate(stop_asked)
        if found is None:
            return None
        self._found = found
        if self._is_main:
            picture = self._fixed.picture()
            self._pictures.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(self._pictures / f"step-{step:08d}.png")
            if self._metrics.takes_images:
                self._metrics.image(step, "val/picture", picture)
        return found

    def artifacts(self, directory: Path) -> None:
        """The last validation: its picture, and validation.json with what it is held against."""
        Image.fromarray(self._fixed.picture()).save(directory / VIEWS_PICTURE)
        found = verdict(self._found)
        bars.write(directory, self._found, found)
        for line in bars.told(found):
            self._metrics.say(line)
        self._metrics.say(f"beside it, {bars.MEAN}: {self._found['val/psnr_mean']:.2f} dB")


class ViewEncoder:
    """What the frozen networks say about an object, kept while it fits into memory: the posterior of each view's
    latents, of which the reference's mode is the condition too, and the CLIP embedding of a reference.

    Each object is encoded alone, so that the numbers do not depend on what stands beside it or on what is kept.
    """

    def __init__(self, pipeline: MVDiffusionPipeline, world: World) -> None:
        self._pipeline, self._device = pipeline, world.device
        self._memory = Memory.of_machine(world.size)

    def conditions(self, batch: ObjectBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Latents sampled anew [B, V, 4, h, w] in the order of the slots, condition latents [B, 4, h, w], and CLIP
        embeddings [B, E] of the reference."""
        scale = self._pipeline.vae.config.scaling_factor
        moments = torch.stack([self._posterior(index, pixels)[order] for index, pixels, order
                               in zip(batch.indices, batch.pixels, batch.order)]).to(self._device)
        mean, log_variance = moments.chunk(2, 2)
        spread = (0.5 * log_variance.clamp(-30, 20)).exp()
        latents = (mean + spread * torch.randn_like(mean)) * scale
        embeds = torch.stack([self._embedding(index, int(order[0]), pixels) for index, pixels, order
                              in zip(batch.indices, batch.pixels, batch.order)]).to(self._device)
        return latents, mean[:, 0] * scale, embeds

    @torch.no_grad()
    def _posterior(self, index: int, pixels: Tensor) -> Tensor:
        """Mean and log variance [V, 8, h, w] of all views, in the rig's order."""
        def encode() -> Tensor:
            pictures = pixels[:, :3].to(self._device).float() / 127.5 - 1
            return self._pipeline.vae.encode(pictures.contiguous()).latent_dist.parameters.float().cpu()

        return self._memory.get_or_make(("views", index), encode)

    @torch.no_grad()
    def _embedding(self, index: int, view: int, pixels: Tensor) -> Tensor:
        return self._memory.get_or_make(("reference", index, view), lambda: self._pipeline.embed(
            pixels[None, view, :3].float() / 255)[0].float().cpu())
