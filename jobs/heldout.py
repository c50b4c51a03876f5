"""Fixed validation of a reconstructor: every leave-one-out view of every validation sample, each time the
same.

Beside the model stand two pictures that need no model: the white image and, per view of the rig, the mean
training image. A run that turns white gains 8 dB over its first step; only what beats these two has learned
something.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jobs.data.multiview import MultiView, Views
from jobs.world import World
from models.gaussians import Gaussians, render
from models.gslrm import GSLRM
from models.losses import image_psnr, image_ssim

_MEAN_OF = 256  # training samples that the mean image is made of, evenly spaced
_SHOWN_VIEWS = 6
_SHOWN_PX = 192  # least width of a view in the picture for people


@dataclass(frozen=True)
class Item:
    """One validation image: `heldout` is predicted from `inputs`."""

    sample: int
    heldout: int
    inputs: tuple[int, ...]


def items_of(val: MultiView, input_views: int) -> list[Item]:
    """Every view of every sample held out once; the inputs are spread evenly over the other views."""
    found = []
    for sample in range(len(val)):
        views = len(val.samples[sample].frames)
        for heldout in range(views):
            rest = [(heldout + offset) % views for offset in range(1, views)]
            count = min(input_views, len(rest))
            inputs = sorted(rest[i * len(rest) // count] for i in range(count))
            found.append(Item(sample, heldout, tuple(inputs)))
    return found


class Heldout:
    """The validation of one run; the items are divided over the ranks and the results summed in a fixed
    order."""

    def __init__(self, val: MultiView, train: MultiView, input_views: int,
                 background: tuple[float, float, float], world: World, bf16: bool = False) -> None:
        self._val, self._background, self._world, self._bf16 = val, background, world, bf16
        self.items = items_of(val, input_views)
        means = mean_images(train, world)
        self._baselines = self._over_items(lambda item, target: torch.stack([
            image_psnr(torch.ones_like(target), target), image_psnr(means[item.heldout], target)]), None)

    def evaluate(self, model: GSLRM, stop_asked: Callable[[], bool] | None) -> dict[str, float] | None:
        """Means over images, of the held-out views (val/psnr, val/ssim) and, apart, of the views that were put in
        (val/psnr_input, val/ssim_input); None when the ranks were asked to stop meanwhile."""
        def score(item: Item, target: Tensor) -> Tensor:
            shown = [item.heldout, *item.inputs]
            predicted, truth = self._predict(model, item, shown), self._truth(item, shown)
            psnr, ssim = image_psnr(predicted, truth), image_ssim(predicted, truth)
            return torch.stack([psnr[0], ssim[0], psnr[1:].mean(), ssim[1:].mean()])

        found = self._over_items(score, stop_asked)
        if found is None or self._baselines is None:
            return None
        return {"val/psnr": found[0], "val/ssim": found[1], "val/psnr_input": found[2], "val/ssim_input": found[3],
                "val/psnr_white": self._baselines[0], "val/psnr_mean": self._baselines[1],
                "val/images": len(self.items)}

    def predict(self, model: GSLRM, item: Item) -> Tensor:
        """The held-out view [3, S, S], not clamped."""
        return self._predict(model, item, [item.heldout])[0]

    def _predict(self, model: GSLRM, item: Item, shown: list[int]) -> Tensor:
        """Views of the reconstruction [n, 3, S, S], not clamped."""
        views, device, size = self._val.views(item.sample), self._world.device, self._val.size
        rendering = render(self.reconstruct(model, views, item), views.c2w[None, shown].to(device),
                           views.fxfycxcy[None, shown].to(device), size, size, self._background)
        return rendering.image[0]

    def reconstruct(self, model: GSLRM, views: Views, item: Item) -> Gaussians:
        device, inputs = self._world.device, list(item.inputs)
        images = views.pixels[None, inputs, :3].to(device).float() / 255
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            return model(images, views.c2w[None, inputs].to(device), views.fxfycxcy[None, inputs].to(device))

    def ground_truth(self, item: Item) -> Tensor:
        """[3, S, S] in 0..1."""
        return self._truth(item, [item.heldout])[0]

    def _truth(self, item: Item, shown: list[int]) -> Tensor:
        return self._val.views(item.sample).pixels[shown, :3].to(self._world.device).float() / 255

    def example(self, model: GSLRM) -> Gaussians:
        """The first validation sample, reconstructed without its first view."""
        return self.reconstruct(model, self._val.views(0), self.items[0])

    def picture(self, models: list[GSLRM]) -> np.ndarray:
        """uint8 [H, W, 3]: the held-out views of the first sample side by side, a row per model, then the
        truth."""
        shown = [item for item in self.items if item.sample == 0][:_SHOWN_VIEWS]
        rows = [torch.cat([self.predict(model, item) for item in shown], 2) for model in models]
        rows.append(torch.cat([self.ground_truth(item) for item in shown], 2))
        whole = torch.cat(rows, 1).clamp(0, 1).cpu()
        scale = -(-_SHOWN_PX // self._val.size)
        return (whole * 255).round().byte().permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)

    def _over_items(self, score: Callable[[Item, Tensor], Tensor],
                    stop_asked: Callable[[], bool] | None) -> list[float] | None:
        """The means of `score(item, target)` [at most 4] over all items, the same bits on every rank."""
        world = self._world
        table = torch.zeros(len(self.items), 4, dtype=torch.float64, device=world.device)
        for start in range(0, len(self.items), world.size):
            if stop_asked and stop_asked():
                return None
            if start + world.rank < len(self.items):
                item = self.items[start + world.rank]
                found = score(item, self.ground_truth(item)).double()
                table[start + world.rank, :len(found)] = found
        return world.sum(table).mean(0).tolist()


def mean_images(train: MultiView, world: World) -> Tensor:
    """The mean training image of each view [V, 3, S, S] in 0..1, of at most `_MEAN_OF` samples."""
    count = min(len(train), _MEAN_OF)
    chosen = [i * len(train) // count for i in range(count)]
    views = len(train.samples[0].frames)
    total = torch.zeros(views, 3, train.size, train.size, dtype=torch.float64, device=world.device)
    for index in chosen[world.rank::world.size]:
        total += train.views(index).pixels[:, :3].to(world.device).double()
    return (world.sum(total) / (255 * count)).float()
