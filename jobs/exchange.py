"""One collective per update: gradients, flags and scalars in a single flat buffer.

Why not DistributedDataParallel: after its first backward it re-orders its buckets by the order in which
gradients became ready, so a resumed process sums in another order than the one that had lived longer. With 2
ranks that cannot be seen (a+b = b+a), with 3 the losses differ in the last bits. Here the layout is the
parameter order, from the first update on, and a sum does not depend on the age of the process. Stop and error
flags travel along for free.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jobs.world import World


@dataclass(frozen=True)
class Totals:
    """What the ranks agreed on in one update."""

    stop: bool  # some rank was asked to stop
    failed: bool  # some rank could not read its batch
    norm: float  # of the mean gradient, before clipping
    rows: list[list[float]]  # per pass: the scalars, averaged over the ranks


class Exchange:
    """The gradients of `parameters` as views into the buffer, so that nothing is copied around the
    collective.

    fp32; `passes` rows of `scalars` numbers each follow the gradients, then the two flags.
    """

    def __init__(self, parameters: list[nn.Parameter], passes: int, scalars: int, world: World) -> None:
        self._world, self._passes = world, passes
        self._size = sum(parameter.numel() for parameter in parameters)
        self._buffer = torch.zeros(self._size + passes * scalars + 2, device=world.device)
        self._gradients = self._buffer[:self._size]
        self._rows = self._buffer[self._size:-2].view(passes, scalars)
        self._parameters = parameters

    def clear(self) -> None:
        """Before the first pass of an update; gradients then add up in place."""
        self._buffer.zero_()
        offset = 0
        for parameter in self._parameters:
            end = offset + parameter.numel()
            parameter.grad = self._buffer[offset:end].view_as(parameter)
            offset = end

    def put(self, row: int, values: list[Tensor]) -> None:
        """The scalars of one pass."""
        self._rows[row] = torch.stack([value.detach().float() for value in values])

    def total(self, stop: bool, failed: bool, passes: int | None = None) -> Totals:
        """Sum over the ranks; afterwards the gradients are the mean over ranks and the `passes` that were made (None:
        all)."""
        self._buffer[-2], self._buffer[-1] = float(stop), float(failed)
        self._world.sum(self._buffer)
        self._gradients /= self._world.size * (passes or self._passes)
        self._rows /= self._world.size
        norm = torch.linalg.vector_norm(self._gradients)
        numbers = torch.cat([norm[None], self._buffer[self._size:]]).tolist()  # the only wait for the device
        width = self._rows.shape[1]
        rows = [numbers[1 + row * width:1 + (row + 1) * width] for row in range(self._passes)]
        return Totals(stop=numbers[-2] > 0, failed=numbers[-1] > 0, norm=numbers[0], rows=rows)

    def clip(self, norm: float, limit: float) -> None:
        """Scale the gradients so that their norm, `norm` now, is at most `limit`."""
        if norm > limit:
            self._gradients *= limit / (norm + 1e-6)
