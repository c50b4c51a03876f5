"""Small parts of a run from random weights that are trained before its first step, and are frozen in it."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jobs.exchange import Exchange
from jobs.runtime import StopFlag
from jobs.schedule import cosine_lr
from jobs.world import World, mixed_seed

_WARMUP = 50
_SAY_EVERY = 100  # steps


def pretrain(what: str, model: nn.Module, loss_of: Callable[[], Tensor], steps: int, lr: float, seed: int,
             world: World, stop: StopFlag, say: Callable[[str], None]) -> bool:
    """Train `model` in place, alike on all ranks, and freeze it; False when they agreed to stop meanwhile.

    `loss_of` draws a batch by torch's global generator. A function of the seed, the ranks and the data: a restart
    makes the same one.
    """
    model.train().requires_grad_(True)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    exchange = Exchange(parameters, 1, 1, world)
    for step in range(steps):
        torch.manual_seed(mixed_seed(what, seed, step, world.rank))
        exchange.clear()
        loss = loss_of()
        loss.backward()
        exchange.put(0, [loss])
        totals = exchange.total(stop.asked, False)
        if totals.stop:
            return False
        exchange.clip(totals.norm, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, steps, _WARMUP, lr)
        optimizer.step()
        if (step + 1) % _SAY_EVERY == 0:
            say(f"{what} {step + 1}/{steps}  loss {totals.rows[0][0]:.4g}")
    model.eval().requires_grad_(False)
    for parameter in parameters:
        parameter.grad = None
    return True
