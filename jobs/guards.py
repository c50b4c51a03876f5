"""Does what is meant to train get gradients, and nothing else? Asked in the first applied updates of a process."""
from __future__ import annotations

import torch
from torch import nn

from jobs.optimizer import some
from jobs.runtime import JobError

# Update 0 has the learning rate 0, a LoRA's A gets a gradient once its B is not 0 any more.
WITHIN = 5


class GradientWatch:
    """`see` after every applied update, while the gradients are still there."""

    def __init__(self, trained: dict[str, nn.Parameter], frozen: dict[str, nn.Parameter]) -> None:
        self._trained, self._frozen = trained, frozen
        self._updates = 0
        self._seen: torch.Tensor | None = None  # [tensors] bool, on the device: asked for once

    def see(self) -> None:
        """Raises JobError, the same on every rank, when a frozen tensor has a gradient; at the last update, when a
        trained one never had any."""
        if self._updates >= WITHIN:
            return
        self._updates += 1
        wrong = [name for name, parameter in self._frozen.items() if parameter.grad is not None]
        if wrong:
            raise JobError(f"{len(wrong)} frozen tensors have a gradient: {some(wrong)}",
                           "they would be trained, or cost memory for nothing: set requires_grad_(False) on them")
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in self._trained.values()]))
        now = norms.isfinite() & (norms > 0)
        self._seen = now if self._seen is None else self._seen | now
        if self._updates == WITHIN:
            self._judge()

    def _judge(self) -> None:
        assert self._seen is not None
        dead = [name for name, seen in zip(self._trained, self._seen.tolist()) if not seen]
        if dead:
            raise JobError(f"{len(dead)} of {len(self._trained)} trained tensors had no gradient in the first {WITHIN} "
                           f"updates: {some(dead)}",
                           "they learn nothing: does the forward pass use them, and is every gate before them above 0?")
