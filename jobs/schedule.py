"""Which steps train, and how fast: passes, updates and the learning rate."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Plan:
    """How a stage is trained; the same for every stage. A step is one attempted forward-backward pass of all
    ranks; `accumulation` of them make one update."""

    total: int  # steps
    accumulation: int
    batch_per_rank: int
    seed: int
    precision: Literal["fp32", "bf16"]
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: int  # applied updates
    grad_clip: float  # norm
    allowed_gradnorm_factor: float
    max_consecutive_skips: int
    checkpoint_every: int  # steps
    keep_last: int
    evaluate_every: int  # steps
    log_every: int  # steps
    loader_workers: int
    lr_decay: Literal["cosine", "constant", "plateau"] = "cosine"  # after the warm-up
    partial_update: bool = False  # what remains of `total` makes a last update of fewer passes
    patience: int | None = None  # evaluations without a better best_metric, then the run is done
    plateau_patience: int = 2  # the same, then the rate falls (lr_decay: plateau)
    plateau_factor: float = 0.5
    max_skip_ratio: float = 1.0  # of all updates: beyond it the run ends as non-finite

    @property
    def updates(self) -> int:
        """Planned updates; without `partial_update` what remains of `total` after them trains nothing."""
        return -(-self.total // self.accumulation) if self.partial_update else self.total // self.accumulation

    @property
    def decided_by_validation(self) -> bool:
        """Whether the course of the run depends on its evaluations: then each has a checkpoint, and a resume
        catches up on the one it was killed in."""
        return self.patience is not None or self.lr_decay == "plateau"

    def lr_of(self, update: int, drops: int = 0) -> float:
        """Of the `update`-th applied update (from 0), after `drops` falls on a plateau."""
        if self.lr_decay != "cosine" and update >= self.warmup:
            return self.lr * self.plateau_factor ** drops
        return cosine_lr(update, self.updates, self.warmup, self.lr)

    def due(self, every: int, before: int, now: int) -> bool:
        """Whether a multiple of `every` was reached on the way from step `before` to step `now`."""
        return now // every > before // every


def cosine_lr(update: int, updates: int, warmup: int, base: float) -> float:
    """The learning rate of the `update`-th *applied* update (from 0): linear warm-up from 0, then half a
    cosine.

    A skipped update must not consume the schedule, so this is never asked with a count of attempts.
    """
    if update < warmup:
        return base * update / warmup
    return base / 2 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))
