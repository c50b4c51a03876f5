"""Fixed validation of a multi-view generator: the same objects, the same noise, the averaged weights.

Beside the model stand what costs no learning: the picture that was put in, copied to every view; the white picture;
the mean training picture of each view; and the model itself fed another object's picture. A generator that does not
beat the last by far has learned how mice look, not how this one does.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.phase1 import Validation
from jobs.bars import COPY, WHITE, bars
from jobs.data.multiview import MultiView
from jobs.heldout import mean_images
from jobs.mv_data import slots
from jobs.mv_vae import reconstruction_psnr
from jobs.runtime import JobError
from jobs.world import World
from models.losses import SSIM_WINDOW, image_psnr, image_ssim
from models.mvdiffusion import MVDiffusionPipeline
from models.perceptual import Lpips
from models.weights import WeightsError

_SHOWN = 4  # objects in the picture for people
_SHOWN_PX = 96  # least width of a view in it
_SAME_DB = 99.0  # two pictures that are the same to the bit
OTHER_MARGIN = 1.5  # dB above the same model fed another object's picture


class FixedViews:
    """The validation of one run; objects are divided over the ranks, one at a time, and summed in a fixed order."""

    def __init__(self, pipeline: MVDiffusionPipeline, val: MultiView, train: MultiView, config: Validation,
                 prompts: Tensor, reference: int, world: World) -> None:
        self._pipeline, self._val, self._config, self._world = pipeline, val, config, world
        self._order = slots(reference, prompts.shape[0])
        self._prompts = prompts[self._order]
        self._lpips = _lpips(config, world.device)
        self._ssim = val.size >= SSIM_WINDOW
        self._conditions: dict[int, tuple[Tensor, Tensor]] = {}
        self._shown = torch.zeros(0)
        means = mean_images(train, world)[self._order]
        self._fixed = self._over_objects(lambda index: _baselines(self.truth(index), means), 3, None)
        self._ceiling = reconstruction_psnr(pipeline.vae, val, world)

    def truth(self, index: int) -> Tensor:
        """[V, 3, S, S] in 0..1, in the order of the slots."""
        return self._val.views(index).pixels[self._order, :3].to(self._world.device).float() / 255

    def evaluate(self, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        """Means over objects and their views but the reference; None when the ranks were asked to stop meanwhile."""
        count = len(self._val)
        self._shown = torch.zeros(min(count, _SHOWN), len(self._order), 3, self._val.size, self._val.size,
                                  device=self._world.device)
        found = self._over_objects(self._score, 6, stop_asked)
        self._world.sum(self._shown)
        if found is None or self._fixed is None:
            return None
        psnr, ssim, other, diversity, copied, lpips = found
        copy, white, mean = self._fixed
        answer = {"val/psnr": psnr, "val/psnr_copy": copy, "val/psnr_white": white, "val/psnr_other": other,
                  "val/psnr_copied": copied, "val/psnr_mean": mean, "val/psnr_vae": self._ceiling,
                  "val/diversity": diversity, "val/objects": count}
        answer |= {"val/ssim": ssim} if self._ssim else {}
        return answer | ({"val/lpips": lpips} if self._lpips else {})

    def generate(self, index: int) -> Tensor:
        """[V, 3, S, S] in 0..1. The noise is the same for every object: only what is put in differs."""
        if index not in self._conditions:
            self._conditions[index] = self._pipeline.encode(self.truth(index)[:1])
        embeds, condition = self._conditions[index]
        config = self._config
        latents = self._pipeline.sample(embeds, condition, self._prompts, config.steps, config.guidance, config.eta,
                                        [config.seed])
        return self._pipeline.decode(latents[0])

    def picture(self) -> np.ndarray:
        """uint8 [H, W, 3] of the last evaluation: for each object what was put in and the generated views, above the
        true ones."""
        rows = []
        for index, generated in enumerate(self._shown):
            truth = self.truth(index)
            put_in, white = truth[:1], torch.ones_like(truth[:1])
            rows += [torch.cat([*put_in, *generated], 2), torch.cat([*white, *truth], 2)]
        whole = torch.cat(rows, 1).clamp(0, 1).cpu()
        scale = -(-_SHOWN_PX // self._val.size)
        return (whole * 255).round().byte().permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)

    def _score(self, index: int) -> Tensor:
        generated, truth = self.generate(index), self.truth(index)
        if index < len(self._shown):
            self._shown[index] = generated
        views, true_views = generated[1:], truth[1:]
        other = self.truth((index + 1) % len(self._val))[1:]  # what this picture says about another object
        nothing = torch.zeros((), device=truth.device)
        return torch.stack([
            image_psnr(views, true_views).mean(),
            image_ssim(views, true_views).mean() if self._ssim else nothing,
            image_psnr(views, other).mean(),
            _spread(views) / _spread(true_views) if len(views) > 1 else _spread(generated) / _spread(truth),
            image_psnr(views, truth[:1].expand_as(views)).clamp(max=_SAME_DB).mean(),  # is it what was put in?
            self._lpips.per_image(views, true_views).mean() if self._lpips else nothing])

    def _over_objects(self, score: Callable[[int], Tensor], width: int,
                      stop_asked: Callable[[], bool] | None) -> list[float] | None:
        """The means of `score(object)` [width], the same bits on every rank."""
        world = self._world
        table = torch.zeros(len(self._val), width, dtype=torch.float64, device=world.device)
        for start in range(0, len(self._val), world.size):
            if stop_asked and stop_asked():
                return None
            if start + world.rank < len(self._val):
                table[start + world.rank] = score(start + world.rank).double()
        return world.sum(table).mean(0).tolist()


def verdict(found: dict[str, float]) -> list[dict[str, Any]]:
    """What an evaluation is held against: name, dB, and whether it is beaten."""
    return bars(found["val/psnr"], {
        COPY: found["val/psnr_copy"], WHITE: found["val/psnr_white"],
        f"another object's picture put in, + {OTHER_MARGIN:g} dB": found["val/psnr_other"] + OTHER_MARGIN})


def _baselines(truth: Tensor, means: Tensor) -> Tensor:
    """PSNR of the copied, the white and the mean picture over all slots but the first."""
    guesses = [truth[:1].expand_as(truth), torch.ones_like(truth), means]
    return torch.stack([image_psnr(guess[1:], truth[1:]).mean() for guess in guesses])


def _spread(views: Tensor) -> Tensor:
    """Mean distance (RMSE) between two of [V, 3, S, S]: near 0 when all views are alike."""
    flat = views.flatten(1)
    return torch.pdist(flat).mean() / flat.shape[1] ** 0.5


def _lpips(config: Validation, device: torch.device) -> Lpips | None:
    if config.lpips_weights is None:
        return None
    try:
        return Lpips(config.lpips_weights, str(config.lpips_heads)).to(device)
    except WeightsError as error:
        raise JobError(f"training.validation: {error}") from None
