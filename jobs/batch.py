"""What the batches of several data sets have in common."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

B = TypeVar("B", bound="TensorBatch")


@dataclass(frozen=True)
class TensorBatch:
    """Its fields that are tensors travel together."""

    def pin_memory(self: B) -> B:
        return self._map(Tensor.pin_memory)

    def to(self: B, device: torch.device) -> B:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self: B, change: Callable[[Tensor], Tensor]) -> B:
        return replace(self, **{name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)})
