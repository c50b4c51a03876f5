"""AdamW over groups of parameters that learn alike, with its state made at the start."""
from __future__ import annotations

import torch
from torch import nn

from jobs.runtime import JobError
from jobs.schedule import Plan
from jobs.stage import Stage


def make_optimizer(stage: Stage, named: dict[str, nn.Parameter], plan: Plan) -> torch.optim.AdamW:
    """One group per distinct answer of `stage.learning`; its state is made now, so that a checkpoint always has the
    same tensors. Raises JobError when a parameter is not fp32: small updates of a bf16 weight are rounded away.
    """
    coarse = [name for name, parameter in named.items() if parameter.dtype != torch.float32]
    if coarse:
        raise JobError(f"{len(coarse)} trained tensors are not fp32: {some(coarse)}",
                       "load what is trained in fp32; training.precision: bf16 computes in bf16 all the same")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        learning = stage.learning(name, parameter)
        times = 1.0 if learning.lr is None else learning.lr / plan.lr
        decay = plan.weight_decay if learning.weight_decay is None else learning.weight_decay
        groups.setdefault((times, decay), []).append(parameter)
    made = [{"params": parameters, "weight_decay": decay, "times": times}
            for (times, decay), parameters in groups.items()]
    optimizer = torch.optim.AdamW(made, lr=plan.lr, betas=plan.betas, fused=True)
    for parameter in named.values():
        optimizer.state[parameter] = fresh_moments(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """`lr` is that of a group without a rate of its own; the others move in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["times"]


def some(names: list[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def fresh_moments(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What AdamW keeps of a parameter, before its first update."""
    return {"step": torch.zeros((), device=parameter.device), "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter)}
