"""One batch out of the parts of all ranks, with its gradients."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.world import World


def gathered(part: Tensor, world: World) -> Tensor:
    """The parts [B, …] of all ranks as one [ranks * B, …], in rank order.

    Every rank must make the same loss of the result: its gradient is then known on every rank, so that backward needs
    no collective. It is scaled by the ranks, because the trainer takes the mean of their gradients.
    """
    return part if world.size == 1 else _Gathered.apply(part, world)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, part: Tensor, world: World) -> Tensor:
        ctx.rows, ctx.ranks = slice(world.rank * len(part), (world.rank + 1) * len(part)), world.size
        parts = [torch.empty_like(part) for _ in range(world.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.rows] * ctx.ranks, None
