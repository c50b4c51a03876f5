"""What the rules say of runs of the real trainers and of other people's programs: nothing of healthy ones, the right
thing of sick ones. Nothing here writes a metric by hand: each run falls sick as runs do."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import RunDir, read_json_lines
from cluster.node import rules
from cluster.node.findings import Finding
from cluster.node.thresholds import WHITE_DB
from jobs.data import toy
from tests.jobs import foreign, sick_runs
from tests.jobs.sick import HEALTHY, Bed, case_in, phase3, small
from tests.jobs.small_stage import SmallStage

ROOT = Path(__file__).parents[2]
ELSEWHERE = {  # sicknesses that have their test beside the rule or the mechanism
    "9 % of updates applied, from a log": ("tests/node/test_rules.py", "test_the_public_mouse_run_applied_nine_percent"),
    "46 epochs at ln 16, from a log": ("tests/node/test_rules.py", "test_the_public_face_voice_run_was_at_chance"),
    "a rank that sleeps for ever": ("tests/e2e/test_stall.py", "test_a_hang_in_a_collective_is_reported_with_rank_and_line"),
}


@pytest.fixture(scope="module")
def mice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mice") / "data"
    toy.make(directory, samples=12, val=3, size=16, seed=0)
    return directory


@pytest.fixture
def bed(tmp_path: Path, mice: Path, make_job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Bed:
    return Bed(tmp_path, mice, make_job, monkeypatch)


@pytest.fixture
def whole_bed(bed: Bed, start: Callable[..., list[int]]) -> Bed:
    """With a process from which stages are forked."""
    bed.start = start
    return bed


# --- the table ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sick:
    broken: str
    rule: str
    severity: str
    run: Callable[[Bed], list[Finding]]
    says: str = ""  # a part of what it says or takes for the cause
    quick: bool = False  # part of `make test`


TABLE = {
    "non-finite, one sample": Sick("nan in one file", "non-finite", "warning", lambda bed: bed.small(small(sick_runs.spoil_one), total=60), "number-5"),
    "non-finite, for good": Sick("a shard of inf", "non-finite", "error", lambda bed: bed.small(small(sick_runs.spoil_late), total=60), "to the last one", True),
    "exploding gradients": Sick("targets in another unit", "updates-skipped", "error", lambda bed: bed.small(
        small(sick_runs.spoil_scale), total=60, allowed_gradnorm_factor=50.0, max_consecutive_skips=60), "% of updates applied", True),
    "constant loss": Sick("an error is swallowed", "loss-constant", "error", lambda bed: bed.small(sick_runs.Swallows(), total=60), "to the last bit", True),
    "no update": Sick("accumulation beyond the end", "nothing-trained", "error", lambda bed: bed.small(
        SmallStage(), total=10, accumulation=20), "10 steps and not one update", True),
    "rate still rising": Sick("a warm-up beyond the end", "lr-end", "warning", lambda bed: bed.small(
        SmallStage(), total=60, warmup=90), "still in the warm-up", True),
    "weights in bf16": Sick("steps are rounded away", "weights-still", "error", sick_runs.coarse_weights, quick=True),
    "an unused layer": Sick("the forward pass leaves it out", "no-gradient", "warning", lambda bed: bed.small(sick_runs.Spare(), total=60), "spare.weight", True),
    "starved": Sick("a loader that became slow", "starved", "warning", sick_runs.slow_disk),
    "slower": Sick("a loader that became slow", "slower", "warning", sick_runs.slow_disk, "times as slow"),
    "rate never moves": Sick("the schedule is not stepped", "lr-stuck", "error", lambda bed: bed.program(foreign.NEVER_STEPPED, foreign.WARM)),
    "rate ends half-way": Sick("a schedule for twice the steps", "lr-end", "warning", lambda bed: bed.program(foreign.STEPPED_FOR_TWICE, foreign.WARM)),
    "overfitting, a log": Sick("as many weights as samples", "overfitting", "warning", lambda bed: bed.program(foreign.BY_HEART)),
    "out of memory": Sick("it keeps every batch", "ended-badly", "error", lambda bed: bed.program(foreign.KEEPS_ALL), "memory"),
    "an exception": Sick("a key that is not there", "ended-badly", "error", lambda bed: bed.program(foreign.A_KEY_IS_MISSING), "KeyError"),
    "resumed at the end": Sick("nothing left to train", "nothing-trained", "error", lambda bed: bed.program(foreign.GOES_ON, starts=2)),
    "white": Sick("opacities at 0", "white-renders", "error", sick_runs.white),
    "flat objects": Sick("only views put in are compared", "identity-copy", "warning", sick_runs.flat),
    "below a picture": Sick("a learning rate of 1e-6", "no-better-than-baseline", "warning", sick_runs.hardly_moves, "the mean training picture"),
    "by heart": Sick("one sample", "overfitting", "warning", sick_runs.by_heart),
    "two preparations": Sick("validation on black", "train-val-gap", "warning", sick_runs.other_preparation),
    "the input copied": Sick("targets are the input", "identity-copy", "error", sick_runs.copied),
    "views alike": Sick("one camera for five", "views-collapsed", "error", sick_runs.alike),
    "the input ignored": Sick("inputs of other objects", "input-ignored", "warning", sick_runs.unrelated),
    "deaf": Sick("sounds of other pictures", "input-ignored", "warning", sick_runs.deaf),
    "gates shut": Sick("gates at 0, not trained", "no-gradient", "error", sick_runs.gates_shut),
    "voices mixed up": Sick("a table off by seven rows", "no-better-than-baseline", "warning", sick_runs.mixed_up, "chance is"),
    "one point": Sick("a learning rate of 0.5", "embeddings-collapsed", "error", sick_runs.one_point),
    "at chance": Sick("a learning rate of 1e-9", "at-chance", "error", sick_runs.at_chance, "at chance: ln 32 = 3.466"),
}


@pytest.mark.parametrize("name", [name for name, one in TABLE.items() if one.quick])
def test_a_sick_loop_is_found(name: str, bed: Bed) -> None:
    check(name, bed)


@pytest.mark.campaign
@pytest.mark.parametrize("name", [name for name, one in TABLE.items() if not one.quick])
def test_a_sick_run_is_found(name: str, whole_bed: Bed) -> None:
    check(name, whole_bed)


def check(name: str, bed: Bed) -> None:
    sick, began = TABLE[name], time.monotonic()
    found = sick.run(bed)
    print(*(f"{name} ({sick.broken}) | {one.rule} | {one.severity} | {time.monotonic() - began:.1f} s | {one.what}" for one in found), sep="\n")
    right = [f"{one.what} {one.cause}" for one in found if (one.rule, one.severity) == (sick.rule, sick.severity)]
    assert any(sick.says in words for words in right), found


# --- healthy ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_other_sicknesses_have_their_tests(where: tuple[str, str]) -> None:
    file, name = where
    assert f"def {name}(" in (ROOT / file).read_text()


def test_the_fix_of_a_sick_run_changes_the_keys_of_its_config(bed: Bed) -> None:
    bed.small(small(sick_runs.spoil_late), total=60)
    (bed.run / "config.yaml").write_text('{"training": {"optimizer": {"lr": 0.01}}}')
    started = replace(case_in(bed.run), by_hand=False)
    assert "--set training.optimizer.lr=0.001" in rules.judge(started)[0].fix


def test_a_healthy_training_has_no_findings(bed: Bed) -> None:
    assert bed.small(SmallStage(), total=120, warmup=10) == []


@pytest.mark.campaign
@pytest.mark.parametrize(("stage", "config", "seed"), HEALTHY, ids=[f"{stage}-{seed}" for stage, _, seed in HEALTHY])
def test_ten_healthy_runs_have_no_findings(stage: str, config: Any, seed: int, whole_bed: Bed) -> None:
    assert whole_bed.stage(stage, config(whole_bed.mice, seed)) == []


@pytest.mark.campaign
def test_a_white_beginning_is_no_sickness(whole_bed: Bed) -> None:
    values = {"model.opacity_bias": -5.4, "training.max_steps": 120, "training.validation.every_steps": 10}
    assert "white-renders" not in {one.rule for one in whole_bed.stage("phase3", phase3(whole_bed.mice, 0, **values))}
    evaluations = [line for line in read_json_lines(RunDir(whole_bed.run).attempt(0).metrics) if line.get("event") == "eval"]
    white = [line["step"] for line in evaluations if abs(line["val/psnr"] - line["val/psnr_white"]) <= WHITE_DB]
    assert len(white) >= 2


@pytest.mark.campaign
@pytest.mark.parametrize(("source", "config"), [(foreign.AS_PLANNED, foreign.WARM)], ids=["as planned"])
def test_a_healthy_program_has_no_findings(source: str, config: str, bed: Bed) -> None:
    assert bed.program(source, config) == []
