"""The trainer's rarer abilities: groups with their own rate, validation that ends a run, gradients that must be there."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.contract import read_json_lines
from cluster.node import rules
from cluster.node.findings import Case
from jobs.metrics import Metrics
from jobs.runtime import AgreedError, Job, JobError, StopFlag
from jobs.stage import Learning
from jobs.trainer import Trainer
from jobs.world import World
from tests.jobs.conftest import job_in
from tests.jobs.small_stage import SmallStage, small_plan


class Scripted(SmallStage):
    """Its evaluations give the scores it is told; its first layer has a rate of its own."""

    watches_gradients = True

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def learning(self, name: str, parameter: nn.Parameter) -> Learning:
        return Learning(lr=1e-1, weight_decay=0.0) if name.startswith("net.0.") else super().learning(name, parameter)

    def evaluate(self, step: int, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        return {"val/score": self.scores[step // 5]}


def train(job: Job, world: World, stage: SmallStage, **plan: object) -> tuple[Trainer, list[dict]]:
    chosen = small_plan(**{"total": 30, "accumulation": 1, "evaluate_every": 5, "checkpoint_every": 7, **plan})
    metrics = Metrics(chosen.total)
    metrics.open(job.attempt.metrics)
    trainer = Trainer(stage, chosen, world, job, metrics, StopFlag())
    assert trainer.run()
    return trainer, list(read_json_lines(job.attempt.metrics))


def evaluations(lines: list[dict]) -> list[tuple[int, float]]:
    return [(line["step"], line["val/score"]) for line in lines if line.get("event") == "eval"]


def test_a_group_has_its_own_rate_and_follows_the_schedule(alone: World, job: Job) -> None:
    trainer, lines = train(job, alone, Scripted([0] * 7))
    rates = {group["times"]: (group["lr"], group["weight_decay"]) for group in trainer._optimizer.param_groups}
    assert set(rates) == {1.0, 10.0} and rates[10.0][1] == 0
    assert rates[10.0][0] == pytest.approx(10 * [line["lr"] for line in lines if "lr" in line][-1])


def test_validation_without_progress_ends_the_run_and_the_best_is_kept(alone: World, job: Job) -> None:
    _, lines = train(job, alone, Scripted([1, 2, 3, 2, 2.5, 9, 9]), patience=2)
    assert [step for step, _ in evaluations(lines)] == [0, 5, 10, 15, 20]
    assert (lines[-1]["event"], lines[-1]["step"]) == ("done", 20)
    best = json.loads((job.checkpoints / "best.json").read_bytes())
    assert best["checkpoint"] == "step-00000010-a000"
    report = json.loads((job.run.artifacts / "report.json").read_bytes())
    assert "val/score was no better in 2 evaluations" in report["ended"] and report["step"] == 20


def test_a_resume_counts_the_evaluation_that_its_checkpoint_had_still_to_come(alone: World, tmp_path: Path) -> None:
    first = job_in(tmp_path / "run")
    scores = [1, 2, 3, 2, 2.5, 9, 9]
    _, whole = train(first, alone, Scripted(scores), patience=2, keep_last=9)
    for step in (10, 15, 20):
        again = job_in(tmp_path / f"again-{step}", 1, first.checkpoints / f"step-000000{step}-a000")
        _, lines = train(again, alone, Scripted(scores), patience=2)
        assert lines[-1]["step"] == 20
        assert evaluations(lines) == [found for found in evaluations(whole) if found[0] >= step]


def test_on_a_plateau_the_rate_falls(alone: World, job: Job) -> None:
    trainer, lines = train(job, alone, Scripted([3, 1, 1, 1, 1, 4, 1]), lr_decay="plateau", plateau_patience=2, warmup=0)
    rates = [line["lr"] for line in lines if "event" not in line]
    assert rates[:10] == [1e-2] * 10 and rates[10:20] == [5e-3] * 10 and rates[20:] == [2.5e-3] * 10


def test_a_remainder_of_passes_makes_an_update_when_it_is_wanted(alone: World, tmp_path: Path) -> None:
    for partial, updates in ((False, 7), (True, 8)):
        run = job_in(tmp_path / str(partial))
        trainer, lines = train(run, alone, Scripted([0] * 7), accumulation=4, partial_update=partial)
        assert trainer.plan.updates == updates and trainer.progress.applied == updates
    assert "grad_norm" in [line for line in lines if "event" not in line][-1]


class Unused(SmallStage):
    watches_gradients = True

    def __init__(self) -> None:
        super().__init__()
        self.modules["spare"] = nn.Linear(2, 2)


class Leaking(SmallStage):
    watches_gradients = True

    def __init__(self) -> None:
        super().__init__()
        self.frozen = {"base": nn.Linear(4, 4)}

    def loss(self, batch: dict, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, scalars = super().loss(batch, step)
        return loss + self.frozen["base"](batch["y"]).mean(), scalars


class Coarse(SmallStage):
    def __init__(self) -> None:
        super().__init__()
        self.modules["net"].to(torch.bfloat16)


@pytest.mark.parametrize(("stage", "said"), [
    (Unused, "2 of 10 trained tensors had no gradient in the first 5 updates: spare.weight, spare.bias"),
    (Leaking, "2 frozen tensors have a gradient: base.weight, base.bias"),
    (Coarse, "8 trained tensors are not fp32: net.0.weight")])
def test_tensors_that_could_not_learn_end_the_run_by_name(alone: World, job: Job, stage: type[SmallStage], said: str) -> None:
    with pytest.raises(AgreedError) as caught:
        train(job, alone, stage())
    assert said in str(caught.value) and isinstance(caught.value.error, JobError)
    if stage is not Coarse:  # that one has no step to speak of
        [found] = rules.judge(Case("small-1", list(read_json_lines(job.attempt.metrics)), "RUNNING"))
        assert (found.rule, found.severity) == ("no-gradient", "error") and said.rpartition(": ")[2] in found.what
