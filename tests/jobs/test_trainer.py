from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.contract import RunDir, merged_metrics, read_json_lines
from jobs.metrics import Metrics
from jobs.runtime import AgreedError, Job, NonFinite, StopFlag
from jobs.schedule import cosine_lr
from jobs.trainer import Trainer
from jobs.world import World
from tests.jobs.conftest import job_in
from tests.jobs.small_stage import SmallStage, small_plan


def train(job: Job, world: World, fault: Callable[[int], float] = lambda step: 1.0, stop: StopFlag | None = None,
          width: int = 32, rig: str = "a rig", **plan: Any) -> tuple[bool, list[dict]]:
    """Train the small stage -> (whether to the end, its metrics)."""
    chosen = small_plan(**{"accumulation": 1, "total": 20, **plan})
    metrics = Metrics(chosen.total)
    metrics.open(job.attempt.metrics)
    stage = SmallStage(fault, width)
    stage.identity = {"rig": rig}
    done = Trainer(stage, chosen, world, job, metrics, stop or StopFlag()).run()
    return done, list(read_json_lines(job.attempt.metrics))


def events(lines: list[dict], event: str) -> list[dict]:
    return [line for line in lines if line.get("event") == event]


def steps(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "event" not in line]


def newest(job: Job) -> Path:
    return max(path for path in job.checkpoints.iterdir() if path.name.startswith("step-"))


def test_a_skipped_update_does_not_consume_the_schedule(alone: World, job: Job,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    plan = small_plan(total=20, accumulation=1)
    done, lines = train(job, alone, lambda step: math.nan if step in (5, 6, 12) else 1.0)
    assert done
    applied = 0
    for line in steps(lines):
        if line["step"] not in (6, 7, 13):
            assert line["lr"] == cosine_lr(applied, plan.updates, plan.warmup, plan.lr)
            applied += 1
        assert line["applied"] == applied
    assert [line["step"] for line in events(lines, "skipped")] == [6, 7, 13]
    assert "number-" in events(lines, "skipped")[0]["samples_named"]
    assert steps(lines)[5]["loss"] == "nan"
    out = capsys.readouterr().out
    assert "17 of 20 updates applied, lr ended at" in out
    report = json.loads((job.run.artifacts / "report.json").read_bytes())
    assert (report["applied"], report["skipped"], report["step"]) == (17, 3, 20)


def test_an_exploding_update_is_skipped_and_leaves_the_weights_alone(alone: World, tmp_path: Path) -> None:
    done, lines = train(job_in(tmp_path / "a"), alone, lambda step: 1e9 if step == 19 else 1.0)
    _, calm = train(job_in(tmp_path / "b"), alone, total=19)
    assert done and "gradient norm" in events(lines, "skipped")[0]["reason"]
    score = events(lines, "eval")[-1]["val/score"]
    assert math.isfinite(score) and events(calm, "eval")[-1]["val/score"] != events(calm, "eval")[0]["val/score"]


def test_too_many_skips_in_a_row_end_the_run_with_their_own_exit_code(alone: World, job: Job) -> None:
    with pytest.raises(AgreedError) as caught:
        train(job, alone, lambda step: math.inf if step >= 8 else 1.0)
    assert isinstance(caught.value.error, NonFinite) and caught.value.error.exit_code == 3
    assert "5 updates in a row were skipped, the last at step 13" in str(caught.value)
    assert "number-" in str(caught.value)


def test_the_run_ends_at_exactly_max_steps(alone: World, job: Job) -> None:
    done, lines = train(job, alone, total=21, accumulation=4, checkpoint_every=8)
    assert done and steps(lines)[-1]["step"] == 21
    assert steps(lines)[-1]["applied"] == 5
    assert [line["step"] for line in events(lines, "checkpoint")] == [8, 16, 21]
    assert lines[0]["event"] == "resumed" and lines[0]["step"] == 0
    assert (lines[-1]["event"], lines[-1]["step"]) == ("done", 21)
    assert [line["step"] for line in events(lines, "eval")] == [0, 20, 21]


def test_a_stop_asked_before_the_start_saves_step_0(alone: World, job: Job) -> None:
    flag = StopFlag()
    flag.asked = True
    done, lines = train(job, alone, stop=flag)
    assert not done and lines[-1]["event"] == "stopped"
    assert newest(job).name == "step-00000000-a000"


def test_metrics_of_attempts_merge_without_a_step_twice(alone: World, tmp_path: Path) -> None:
    flag = StopFlag()

    def stop_at_15(step: int) -> float:
        flag.asked = flag.asked or step == 14
        return 1.0

    first = job_in(tmp_path / "run")
    train(first, alone, stop_at_15, flag)
    checkpoint = first.checkpoints / "step-00000010-a000"
    train(job_in(first.run.path, 1, checkpoint), alone)
    merged = [line["step"] for line in merged_metrics(RunDir(first.run.path)) if "event" not in line]
    assert merged == list(range(1, 21))


@pytest.mark.parametrize("how", [{}, {"patience": 9}], ids=["watched", "decides"])
@pytest.mark.parametrize("lost", [False, True])
def test_an_evaluation_is_neither_lost_nor_doubled_by_a_kill(alone: World, tmp_path: Path, lost: bool, how: dict) -> None:
    """kill -9 after the checkpoint of a step that is evaluated too: before that evaluation, or after it."""
    first = job_in(tmp_path / "run")
    train(first, alone, evaluate_every=10, checkpoint_every=10, **how)
    lines = first.attempt.metrics.read_text().splitlines(keepends=True)
    evaluated = next(at for at, line in enumerate(lines) if '"step": 10,' in line and '"eval"' in line)
    first.attempt.metrics.write_text("".join(lines[:evaluated + (not lost)]))
    train(job_in(first.run.path, 1, first.checkpoints / "step-00000010-a000"), alone, evaluate_every=10,
          checkpoint_every=10, **how)
    assert [line["step"] for line in merged_metrics(first.run) if line.get("event") == "eval"] == [0, 10, 20]


@pytest.mark.parametrize(("change", "said"), [
    ({}, "is at step 20 already and the run ends at step 20: there is nothing left to train"),
    ({"total": 15}, "is at step 20 already and the run ends at step 15"),
    ({"total": 30, "width": 48}, "model.width is 48 here and 32 in the weights: --set model.width=32\n  the "),
    ({"total": 30, "rig": "another"}, "its rig is a rig, this run's is another"),
])
def test_a_checkpoint_that_cannot_be_resumed_is_refused(alone: World, tmp_path: Path, change: dict,
                                                        said: str) -> None:
    first = job_in(tmp_path / "run")
    train(first, alone)
    again = job_in(first.run.path, 1, newest(first))
    for job, width in ((first, 32), (again, change.get("width", 32))):
        job.attempt.config.write_text(f"model: {{width: {width}}}\n")
    with pytest.raises(AgreedError) as caught:
        train(again, alone, **change)
    assert said in str(caught.value) and caught.value.error.exit_code == 2


def test_a_run_killed_during_its_last_evaluation_is_only_finished(alone: World, tmp_path: Path) -> None:
    first = job_in(tmp_path / "run")
    train(first, alone)
    for made in first.run.artifacts.iterdir():
        made.unlink()
    done, lines = train(job_in(first.run.path, 1, newest(first)), alone)
    assert done and not steps(lines)
    assert (first.run.artifacts / "artifact").exists() and (first.run.artifacts / "report.json").exists()


def test_a_resume_says_what_makes_it_inexact(alone: World, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    first = job_in(tmp_path / "run")
    train(first, alone)
    train(job_in(first.run.path, 1, newest(first)), alone, total=25, batch_per_rank=3)
    assert "note: not bit-exact with the run before: batch per rank 2 -> 3" in capsys.readouterr().out


def test_bf16_keeps_fp32_weights_and_trains(alone: World, job: Job) -> None:
    _, lines = train(job, alone, precision="bf16")
    found = events(lines, "eval")
    assert found[-1]["val/score"] > found[0]["val/score"]
    from safetensors.torch import load_file
    assert all(tensor.dtype == torch.float32 for tensor in load_file(newest(job) / "model.safetensors").values())
