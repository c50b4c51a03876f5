"""A stage of a few thousand parameters with everything that could break an exact resume: dropout, noise,
loader processes, accumulation. FAULT says what happens to it, at which pass (counted from 0) and on which
rank."""
from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs import checkpoint
from jobs.loader import Draw
from jobs.metrics import Metrics
from jobs.runtime import StopFlag, job_from_environment, run_job
from jobs.schedule import Plan
from jobs.stage import Stage
from jobs.trainer import Trainer
from jobs.world import World, mixed_seed, open_world


class Numbers:
    """Inputs [16] and targets [4] that are a function of the index, with noise that is one of the draw."""

    def __len__(self) -> int:
        return 23

    def batch(self, draws: list[Draw]) -> dict[str, Any]:
        fixed = [torch.randn(20, generator=torch.Generator().manual_seed(draw.index)) for draw in draws]
        noise = [torch.randn(20, generator=torch.Generator().manual_seed(mixed_seed(draw.step, draw.index)))
                 for draw in draws]
        rows = torch.stack(fixed) + 0.1 * torch.stack(noise)
        return {"x": rows[:, :16], "y": rows[:, 16:], "names": [f"number-{draw.index}" for draw in draws]}


class SmallStage(Stage):
    name = "small"
    scalars = ("size",)
    best_metric = "val/score"

    def __init__(self, fault: Callable[[int], float] = lambda step: 1.0, width: int = 32) -> None:
        self.source = Numbers()
        torch.manual_seed(0)
        layers = [nn.Linear(16, width), nn.GELU(), nn.Dropout(0.3), nn.Linear(width, width), nn.LayerNorm(width),
                  nn.Dropout(0.3), nn.Linear(width, 4)]
        self.modules = {"net": nn.Sequential(*layers)}
        self.identity, self.provenance = {"rig": "a rig"}, {"data": "numbers"}
        self._fault = fault

    def loss(self, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        factor = self._fault(step)
        answer = self.modules["net"](batch["x"] + 0.01 * torch.randn_like(batch["x"]))
        return factor * (answer - batch["y"]).square().mean(), {"size": answer.abs().mean()}

    def names(self, batch: dict[str, Any]) -> list[str]:
        return batch["names"]

    def evaluate(self, step: int, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        batch = self.source.batch([Draw(0, index) for index in range(4)])
        score = -(self.modules["net"](batch["x"]) - batch["y"]).square().mean().item()
        return None if stop_asked() else {"val/score": score}

    def artifacts(self, directory: Path) -> None:
        (directory / "artifact").write_text("made")


def small_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = dict(
        total=40, accumulation=2, batch_per_rank=2, seed=7, precision="fp32", lr=1e-2, betas=(0.9, 0.95),
        weight_decay=0.05, warmup=4, grad_clip=1.0, allowed_gradnorm_factor=1e6, max_consecutive_skips=5,
        checkpoint_every=10, keep_last=3, evaluate_every=20, log_every=1, loader_workers=0)
    return Plan(**{**values, **changes})


def planned_fault(world: World) -> Callable[[int], float]:
    """FAULT=TERM:rank:pass, KILL:rank:pass, RAISE:rank:pass, or SAVE:save (killed in the middle of that save, from 1)."""
    kind, *numbers = os.environ.get("FAULT", "NONE").split(":")
    if kind == "SAVE" and world.is_main:
        _die_while_saving(int(numbers[0]))

    def fault(step: int) -> float:
        if kind == "RAISE" and [world.rank, step] == list(map(int, numbers)):
            raise ValueError(f"planned at pass {step}")
        if kind in ("TERM", "KILL") and [world.rank, step] == list(map(int, numbers)):
            os.kill(os.getpid(), signal.SIGTERM if kind == "TERM" else signal.SIGKILL)
        return 1.0

    return fault


def _die_while_saving(which: int) -> None:
    whole, count = checkpoint.write_tensors, 0

    def cut_short(path: Path, tensors: dict[str, Tensor]) -> dict[str, int | str]:
        nonlocal count
        count += path.name == "model.safetensors"
        if count < which:
            return whole(path, tensors)
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    checkpoint.write_tensors = cut_short


def main() -> None:
    stop = StopFlag().install()
    with open_world() as world:
        job = job_from_environment(None)
        assert job is not None
        plan = small_plan(loader_workers=2)
        metrics = Metrics(plan.total)
        if world.is_main:
            job.attempt.path.mkdir(parents=True, exist_ok=True)
            metrics.open(job.attempt.metrics)
        Trainer(SmallStage(planned_fault(world)), plan, world, job, metrics, stop).run()


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
