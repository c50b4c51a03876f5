"""How runs fall sick: data that are broken, a wrong config, a broken piece of a stage or of the loop."""
from __future__ import annotations

import math
import time
from typing import Any

import torch

from cluster.node.findings import Finding
from jobs.optimizer import make_optimizer
from tests.jobs import spoiled
from tests.jobs.sick import Bed, Fast, clap1, face_voice, phase1, phase3, small
from tests.jobs.small_stage import SmallStage

SHORTER = {"training.max_steps": 160}


# --- in the trainer's loop ----------------------------------------------------------------------------

def spoil_one(batch: dict[str, Any], draws: list[Any]) -> None:
    for row, draw in enumerate(draws):
        if draw.index == 5:
            batch["y"][row] = math.nan


def spoil_late(batch: dict[str, Any], draws: list[Any]) -> None:
    if draws[0].step > 30:
        batch["x"][:] = math.inf


def spoil_scale(batch: dict[str, Any], draws: list[Any]) -> None:
    for row, draw in enumerate(draws):
        batch["y"][row] *= 1e5 if draw.index % 2 else 1


def read_slowly(batch: dict[str, Any], draws: list[Any]) -> None:
    time.sleep(0.1 if draws[0].step >= 70 else 0.002)


class Swallows(SmallStage):
    """Targets of another shape from step 20 on, and an `except` that goes on with a loss of 0."""

    def loss(self, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        try:
            return super().loss(batch if step < 20 else {**batch, "y": batch["y"][:, :3]}, step)
        except RuntimeError:
            return torch.zeros((), requires_grad=True), {"size": torch.zeros(())}


class Spare(SmallStage):
    """A layer that the forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.modules["spare"] = torch.nn.Linear(4, 4)


def slow_disk(bed: Bed) -> list[Finding]:
    bed.patch.setattr("jobs.metrics.time", Fast(50))
    return bed.small(small(read_slowly), total=115, warmup=10)


def coarse_weights(bed: Bed) -> list[Finding]:
    """What is kept after a step is what bf16 can hold."""
    def made(*given: Any) -> torch.optim.Optimizer:
        def rounded(*_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data.copy_(parameter.data.bfloat16())

        optimizer = make_optimizer(*given)
        rounded()
        optimizer.register_step_post_hook(rounded)
        return optimizer

    bed.patch.setattr("jobs.trainer.make_optimizer", made)
    return bed.small(SmallStage(), total=60, lr=1e-5, lr_decay="constant")


# --- a stage ------------------------------------------------------------------------------------------

def flat(bed: Bed) -> list[Finding]:
    return bed.stage("phase3", phase3(bed.mice, 0, **{
        "training.targets": "all", "training.input_views": 1, "training.validation.every_steps": 40}), fault="compares inputs")


def copied(bed: Bed) -> list[Finding]:
    return bed.stage("phase1", phase1(spoiled.of_one_camera(bed.mice, bed.place / "data", 0), 0, **SHORTER))


def alike(bed: Bed) -> list[Finding]:
    return bed.stage("phase1", phase1(spoiled.of_one_camera(bed.mice, bed.place / "data", 3, 0), 0, **SHORTER))


def unrelated(bed: Bed) -> list[Finding]:
    return bed.stage("phase1", phase1(spoiled.inputs_of_others(bed.mice, bed.place / "data"), 0))


def deaf(bed: Bed) -> list[Finding]:
    data = str(spoiled.sounds_of_others(bed.place / "data"))
    return bed.stage("clap1", clap1(bed.mice, 0, **{"data": data, "training.max_steps": 220}))


def gates_shut(bed: Bed) -> list[Finding]:
    return bed.stage("clap1", clap1(bed.mice, 0), fault="gates shut", code=2)


def mixed_up(bed: Bed) -> list[Finding]:
    people = spoiled.voices_of_others(bed.place / "people", 60, 4, 16, 8000)
    data = {"voxceleb": str(people), "split": {"val": 0.2, "test": 0.2}}
    return bed.stage("face_voice", face_voice(bed.mice, 0, data=data))


def one_point(bed: Bed) -> list[Finding]:
    return bed.stage("face_voice", face_voice(bed.mice, 0, **{"training.optimizer": {"lr": 0.5, "towers_lr": 0.5}}))


def at_chance(bed: Bed) -> list[Finding]:
    return bed.stage("face_voice", face_voice(bed.mice, 0, **{
        "model.first_scale": 1.0, "training.optimizer": {"lr": 1e-9, "towers_lr": 1e-9}}))


def white(bed: Bed) -> list[Finding]:
    return bed.stage("phase3", phase3(bed.mice, 0, **{
        "model.opacity_bias": -30.0, "training.max_steps": 120, "training.validation.every_steps": 30}))


def hardly_moves(bed: Bed) -> list[Finding]:
    return bed.stage("phase3", phase3(bed.mice, 0, **{
        "training.optimizer": {"lr": 1e-6}, "training.max_steps": 520, "training.batch_per_rank": 1,
        "training.validation.every_steps": 130}))


def by_heart(bed: Bed) -> list[Finding]:
    return bed.stage("phase1", phase1(bed.mice, 0, **{"training.dataset.max_samples": 1}))


def other_preparation(bed: Bed) -> list[Finding]:
    data = spoiled.black_to_validate_on(bed.mice, bed.place / "data")
    return bed.stage("phase3", phase3(data, 0, **{"training.optimizer.lr": 3e-3}))
