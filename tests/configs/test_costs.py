"""What decides how long a step takes, how many there are, and the short run that measures it."""
from __future__ import annotations

from pathlib import Path

import pytest

from configs.costs import Volume, calibration_sets, volume_of
from configs.load import Resolved, list_runs, load_run, load_stage
from configs.pipeline import Member, load_pipeline

HERE = Path(__file__).parents[2]
STAGES = ("phase1", "phase2", "phase3", "reconstruct")


def run_of(stage: str, name: str, *sets: str) -> Resolved:
    return load_run(load_stage(stage, HERE), name, list(sets), HERE)


def volume(stage: str, name: str, *sets: str, works: dict[str, str] | None = None) -> Volume:
    found = volume_of(run_of(stage, name, *sets), works or {})
    assert found
    return found


def pipeline(*sets: str) -> dict[str, Member]:
    return {member.label: member for member in load_pipeline(load_stage("pipeline", HERE), None, list(sets), HERE)}


@pytest.mark.parametrize("change", [
    "training.optimizer.lr=1", "training.schedule.warmup=3", "training.max_steps=7", "training.seed=4",
    "training.dataset.path=/elsewhere.txt", "training.validation.max_samples=3", "checkpoint.every_steps=9",
    "init_from=null", "mode=test"])
def test_what_changes_no_steps_length(change: str) -> None:
    assert volume("phase3", "recommended", change).work == volume("phase3", "recommended").work


@pytest.mark.parametrize("change", ["model.n_layer=3", "training.batch_per_rank=7", "training.input_views=2",
                                    "training.targets=all", "training.precision=fp32", "training.losses.ssim=0"])
def test_what_changes_it(change: str) -> None:
    assert volume("phase3", "recommended", change).work != volume("phase3", "recommended").work


def test_how_much_there_is_to_do() -> None:
    found = volume("phase3", "demo")
    assert (found.steps, found.evaluations, found.checkpoints, found.val_samples) == (600, 5, 4, None)
    assert found.validation == "training.validation.path" and not found.source
    mouse = volume("phase2", "mouse")
    assert (mouse.source, mouse.each_view, mouse.limit, mouse.steps) == ("sources.path", True, None, None)
    short = volume("phase2", "mouse", "mode=test")
    assert short.limit == 600 and short.work != mouse.work  # 25 sampling steps instead of 50
    assert volume("reconstruct", "mouse").steps is None


def test_the_same_generator_costs_the_same_wherever_it_lies() -> None:
    """What another job gives stands for what that job is; a path says which network it is."""
    member = pipeline()["phase2"]
    run = load_run(member.stage, member.config, list(member.sets), HERE)
    small, large = (volume_of(run, {"phase1": work}) for work in ("small", "large"))
    assert small and large and small.work != large.work
    assert small.work["generator.checkpoint"] == "small.checkpoints.best"
    assert volume("phase2", "mouse", "generator.checkpoint=/a").work != volume("phase2", "mouse").work


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in STAGES for name in sorted(list_runs(stage, HERE))])
def test_a_calibration_is_the_same_work_and_short(stage: str, name: str) -> None:
    whole = run_of(stage, name)
    sets = calibration_sets(whole, 2)
    short = run_of(stage, name, *sets)
    before, after = volume_of(whole, {}), volume_of(short, {})
    assert before and after and before.work == after.work
    if stage in ("phase1", "phase3"):
        assert after.steps is not None and 12 <= after.steps <= 24 and after.evaluations == 2 and after.checkpoints == 1
        assert after.val_samples == 2 and short.data["training"]["log_every_steps"] == 1
    elif stage == "phase2":
        assert after.limit in (8, 32) and short.data["quality"]["max_rejected"] == 1


def test_test_mode_reaches_every_stage_that_has_it() -> None:
    """600 samples, 25 sampling steps, 10,000 passes; reconstruct has no such key, and is not refused."""
    found = {label: load_run(member.stage, member.config, list(member.sets), HERE).data
             for label, member in pipeline("mode=test").items()}
    assert [data.get("mode") for data in found.values()] == ["test", "test", "test", None]
    for label in ("phase1", "phase3"):
        training = found[label]["training"]
        assert (training["max_steps"], training["dataset"]["max_samples"]) == (10_000, 600)
    assert found["phase1"]["training"]["validation"]["steps"] == 25
    assert (found["phase2"]["sources"]["limit"], found["phase2"]["generator"]["steps"]) == (600, 25)
    assert [data.get("mode") for data in (load_run(m.stage, m.config, list(m.sets), HERE).data
                                          for m in pipeline().values())] == ["full", "full", "full", None]
