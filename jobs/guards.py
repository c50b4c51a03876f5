"""Does what is meant to train get gradients and move, and nothing else? Asked once in the life of a process."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from jobs.optimizer import some
from jobs.runtime import JobError

# Update 0 has the learning rate 0, a LoRA's A gets a gradient once its B is not 0 any more.
WITHIN = 5
MOVES_WITHIN = 10  # updates; what is used now and then has had its turn
_SAMPLED = 2048  # elements of a tensor

Tell = Callable[..., None]  # writes its keywords as a line of the metrics


class GradientWatch:
    """`see` after every applied update, while the gradients are still there."""

    def __init__(self, trained: dict[str, nn.Parameter], frozen: dict[str, nn.Parameter], tell: Tell) -> None:
        self._trained, self._frozen, self._tell = trained, frozen, tell
        self._updates = 0
        self._seen: Tensor | None = None  # [tensors] bool, on the device: asked for once

    def see(self) -> None:
        """Raises JobError, the same on every rank, when a frozen tensor has a gradient; at the last update, when a
        trained one never had any. What it raises is told before."""
        if self._updates >= WITHIN:
            return
        self._updates += 1
        wrong = [name for name, parameter in self._frozen.items() if parameter.grad is not None]
        if wrong:
            self._tell(frozen=len(wrong), named=some(wrong))
            raise JobError(f"{len(wrong)} frozen tensors have a gradient: {some(wrong)}",
                           "they would be trained, or cost memory for nothing: set requires_grad_(False) on them")
        now = _have_gradients(self._trained.values())
        self._seen = now if self._seen is None else self._seen | now
        if self._updates == WITHIN:
            self._judge()

    def _judge(self) -> None:
        assert self._seen is not None
        dead = [name for name, seen in zip(self._trained, self._seen.tolist()) if not seen]
        if dead:
            self._tell(missing=len(dead), of=len(self._trained), named=some(dead))
            raise JobError(f"{len(dead)} of {len(self._trained)} trained tensors had no gradient in the first {WITHIN} "
                           f"updates: {some(dead)}",
                           "they learn nothing: does the forward pass use them, and is every gate before them above 0?")


class WeightWatch:
    """Do the weights that get a gradient move? `see` after every applied update, while the gradients are still there.

    One look in a process, over MOVES_WITHIN updates from the first one whose learning rate is at least half of `peak`:
    a tensor that nobody steps, or whose steps are rounded away, stays what it was. Elements without a gradient (rows of
    an embedding that were not met) may. It only reads, so what is trained is the same to the bit.
    """

    def __init__(self, trained: dict[str, nn.Parameter], peak: float, tell: Tell) -> None:
        self._trained = {name: parameter for name, parameter in trained.items() if parameter.numel()}
        self._strides = [_stride(parameter.numel()) for parameter in self._trained.values()]
        self._peak, self._tell = peak, tell
        self._left = MOVES_WITHIN
        self._before: Tensor | None = None  # the sampled weights
        self._pulled: Tensor | None = None  # bool, of these: had a gradient
        self._seen: Tensor | None = None  # [tensors] bool: any of its elements had one

    def see(self, lr: float) -> None:
        """`lr`: of the update that was just applied. Tells at the last one."""
        if not self._left:
            return
        if self._before is None:
            self._before = self._sample(self._trained.values()) if lr >= self._peak / 2 else None
            return
        pulled = self._sample(parameter.grad for parameter in self._trained.values()) != 0
        seen = _have_gradients(self._trained.values())
        self._pulled = pulled if self._pulled is None else self._pulled | pulled
        self._seen = seen if self._seen is None else self._seen | seen
        self._left -= 1
        if not self._left:
            self._judge()
            self._before = self._pulled = self._seen = None

    def _judge(self) -> None:
        assert self._before is not None and self._pulled is not None and self._seen is not None
        changed = self._sample(self._trained.values()) != self._before
        marks = torch.cat([changed + 2 * self._pulled, 2 * self._seen]).to(torch.uint8).cpu()  # the only wait
        sizes = [-(-parameter.numel() // stride) for parameter, stride in zip(self._trained.values(), self._strides)]
        *samples, seen = marks.split([*sizes, len(sizes)])
        counts = [(int((mark >= 2).sum()), int((mark == 3).sum())) for mark in samples]
        still = [name for name, (pulled, moved) in zip(self._trained, counts) if pulled and not moved]
        idle = [name for name, had in zip(self._trained, seen.tolist()) if not had]
        pulled = sum(count for count, _ in counts)
        share = {"moved": round(sum(moved for _, moved in counts) / pulled, 4)} if pulled else {}
        named = {key: some(names) for key, names in (("still_named", still), ("idle_named", idle)) if names}
        self._tell(**share, still=len(still), idle=len(idle), of=len(sizes), updates=MOVES_WITHIN, **named)

    def _sample(self, tensors: Iterable[Tensor]) -> Tensor:
        """Elements of each, one after the other; a contiguous tensor is not copied for it."""
        return torch.cat([tensor.detach().reshape(-1)[::stride] for tensor, stride in zip(tensors, self._strides)])


def _stride(count: int) -> int:
    """From one sampled element to the next; no divisor of any length, or one column alone would be looked at."""
    stride = -(-count // _SAMPLED)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def _have_gradients(parameters: Iterable[nn.Parameter]) -> Tensor:
    """[tensors] bool, on their device."""
    norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
    return norms.isfinite() & (norms > 0)
