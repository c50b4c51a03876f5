"""The exponential moving average of a network's weights, with a ramp counted in applied updates."""
from __future__ import annotations

import copy

import torch
from torch import nn


def ema_decay(update: int, max_decay: float) -> float:
    """How much of the average stays at the `update`-th applied update (from 1).

    A constant .9999 would still be 97 % initial weights after 300 updates and make every short run look untrained.
    """
    return min(max_decay, (1 + update) / (10 + update))


class Ema:
    """`module` is the average: a frozen copy of the network, on its device. It belongs into `Stage.modules`."""

    def __init__(self, source: nn.Module, max_decay: float) -> None:
        self.module = copy.deepcopy(source).requires_grad_(False).eval()
        self._source, self._max_decay = source, max_decay

    @torch.no_grad()
    def update(self, applied: int) -> None:
        """After the `applied`-th applied update."""
        weight = 1 - ema_decay(applied, self._max_decay)
        average, now = list(self.module.parameters()), list(self._source.parameters())
        torch._foreach_lerp_(average, now, weight)
        for mean, buffer in zip(self.module.buffers(), self._source.buffers()):
            mean.copy_(buffer)
