"""Objects with all their views, in the order of the UNet's slots: slot 0 is the view that is put in."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.phase1 import Views
from jobs.data.multiview import MultiView
from jobs.loader import Draw
from jobs.runtime import JobError
from jobs.world import mixed_seed


@dataclass(frozen=True)
class ObjectBatch:
    """pixels uint8 [B, V, 4, S, S] in the rig's order; order [B, V]: the view in each slot; indices in the data set."""

    pixels: Tensor
    order: Tensor
    indices: list[int]
    names: list[str]

    def pin_memory(self) -> ObjectBatch:
        return ObjectBatch(self.pixels.pin_memory(), self.order, self.indices, self.names)


class Objects:
    """A `jobs.loader.Source` over `views`; which view is the reference is a function of (seed, step, sample)."""

    def __init__(self, views: MultiView, reference: Views, seed: int) -> None:
        self.views, self._seed = views, seed
        count = len(views.samples[0].frames)
        self._references = reference_views(reference, count)

    def __len__(self) -> int:
        return len(self.views)

    def batch(self, draws: list[Draw]) -> ObjectBatch:
        """Raises BadSample."""
        pixels = torch.stack([self.views.views(draw.index).pixels for draw in draws])
        order = torch.stack([slots(self._reference(draw), pixels.shape[1]) for draw in draws])
        return ObjectBatch(pixels, order, [draw.index for draw in draws],
                           [self.views.samples[draw.index].name for draw in draws])

    def _reference(self, draw: Draw) -> int:
        return self._references[mixed_seed("reference", self._seed, draw.step, draw.index) % len(self._references)]


def reference_views(reference: Views, views: int) -> list[int]:
    """The views that may be put in. Raises JobError for one that the rig does not have."""
    found = list(range(views)) if reference == "random" else [reference] if isinstance(reference, int) else [*reference]
    wrong = [view for view in found if not isinstance(view, int) or view >= views]
    if wrong:
        raise JobError(f"training.reference_view_idx: there is no view {wrong[0]}: the rig has {views} views, 0 to "
                       f"{views - 1}")
    return found


def slots(reference: int, views: int) -> Tensor:
    """[V] the view in each slot: the reference, then the others in the rig's order. Prompts are taken in the same
    order, so a view keeps its own prompt wherever it stands."""
    return torch.tensor([reference, *(view for view in range(views) if view != reference)])
