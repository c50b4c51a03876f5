"""What the rules say of runs of the real trainers: nothing of healthy ones, the right thing of sick ones."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import RunDir
from cluster.node import doctor, rules
from cluster.node.findings import Finding
from cluster.node.view import read_view
from jobs.data import toy
from jobs.metrics import Metrics
from jobs.runtime import AgreedError, Job, StopFlag
from jobs.trainer import Trainer
from jobs.world import World
from tests.jobs.small_phase1 import config_of as phase1_of
from tests.jobs.small_stage import SmallStage, small_plan
from tests.jobs.test_phase3 import config_of as phase3_of

ROOT = Path(__file__).parents[2]


def found_in(run: Path) -> list[Finding]:
    directory = RunDir(run)
    return rules.judge(doctor.read_case(directory, read_view(directory)))


def trained(job: Job, fault: Callable[[int], float], **plan: Any) -> list[Finding]:
    whole = small_plan(accumulation=1, **plan)
    metrics = Metrics(whole.total)
    metrics.open(job.attempt.metrics)
    try:
        Trainer(SmallStage(fault), whole, World(0, 1, _cpu()), job, metrics, StopFlag()).run()
    except AgreedError:
        pass  # it ends itself: what was wrong stands in its metrics
    return found_in(job.run.path)


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


SICK = {
    "non-finite": (lambda step: math.nan if step > 30 else 1.0, {}, "error"),
    "updates-skipped": (lambda step: 1e4 if step % 3 == 0 and step > 5 else 1.0, {"allowed_gradnorm_factor": 50.0}, "warning"),
    "no-gradient": (lambda step: 0.0, {}, "error"),
    "lr-end": (lambda step: 1.0, {"warmup": 90}, "warning"),
}


@pytest.mark.parametrize("rule", SICK)
def test_a_sick_training_is_found_by_what_its_trainer_wrote(rule: str, job: Job) -> None:
    fault, plan, severity = SICK[rule]
    found = {one.rule: one.severity for one in trained(job, fault, total=60, **plan)}
    assert found.get(rule) == severity, found
    (job.run.path / "config.yaml").write_text('{"training": {"optimizer": {"lr": 0.01}}}')
    if rule != "no-gradient":
        [one] = [one for one in found_in(job.run.path) if one.rule == rule]
        assert rule == "lr-end" or "--set training.optimizer.lr=0.002" in one.fix


def test_a_healthy_training_has_no_findings(job: Job) -> None:
    assert trained(job, lambda step: 1.0, total=120, warmup=10) == []


# --- the stages themselves ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mice") / "data"
    toy.make(directory, samples=12, val=3, size=16, seed=0)
    return directory


def by_hand(stage: str, config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-m", f"jobs.{stage}", str(path), "--run-dir", str(tmp_path / "run")], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def phase3(data: Path, seed: int, **training: Any) -> dict[str, Any]:
    return phase3_of(data, max_steps=240, seed=seed, batch_per_rank=2, validation={
        "path": str(data / "data_val.txt"), "every_steps": 60}, schedule={"warmup": 10}, **training)


def phase1(data: Path, seed: int) -> dict[str, Any]:
    config = phase1_of(data, max_steps=160, seed=seed, schedule={"warmup": 10}, validation={
        "path": str(data / "data_val.txt"), "every_steps": 40, "steps": 5, "guidance": 1.0})
    config["model"]["tiny"]["vae"] = {"channels": [16, 32], "train_steps": 200, "batch": 8, "min_psnr": 12}
    return config


def face_voice(data: Path, seed: int) -> dict[str, Any]:
    return {"data": {"procedural": {"identities": 60, "media": 4, "size": 16, "rate": 8000}, "split": {"val": 0.2, "test": 0.2}},
            "model": {"face": {"kind": "tiny", "size": 16, "width": 32}, "voice": {"kind": "tiny", "rate": 8000, "width": 32},
                      "freeze": "none", "width": 32},
            "training": {"max_steps": 150, "batch": 32, "seed": seed, "precision": "fp32", "loader_workers": 0,
                         "clips": {"train_s": 0.4, "eval_s": 0.6}, "optimizer": {"lr": 1e-3, "towers_lr": 1e-3},
                         "schedule": {"warmup": 10}, "validation": {"every_steps": 50, "trials": 500}},
            "evaluation": {"trials": 300, "bootstrap": 20}, "checkpoint": {"every_steps": 50}}


def clap1(data: Path, seed: int) -> dict[str, Any]:
    return {"data": "random:0", "base_model": "random:0",
            "model": {"image_size": 8, "tokens": 2, "hidden": 16, "tiny": {
                "base": {"channels": [16, 16], "cross_attention_dim": 16, "steps": 60, "batch": 8}}},
            "training": {"max_steps": 150, "seed": seed, "batch_per_rank": 4, "accumulation": 1, "precision": "fp32",
                         "loader_workers": 0, "optimizer": {"lr": 1e-3}, "schedule": {"warmup": 10},
                         "validation": {"every_steps": 50, "max_items": 32, "timesteps": 2, "resamples": 50}},
            "checkpoint": {"every_steps": 50}}


HEALTHY = [*(("phase3", phase3, seed) for seed in range(4)), *(("phase1", phase1, seed) for seed in range(2)),
           *(("face_voice", face_voice, seed) for seed in range(2)), *(("clap1", clap1, seed) for seed in range(2))]


@pytest.mark.campaign
@pytest.mark.parametrize(("stage", "config", "seed"), HEALTHY, ids=[f"{stage}-{seed}" for stage, _, seed in HEALTHY])
def test_ten_healthy_runs_have_no_findings(stage: str, config: Any, seed: int, data: Path, tmp_path: Path) -> None:
    assert found_in(by_hand(stage, config(data, seed), tmp_path)) == []


@pytest.mark.campaign
def test_a_reconstructor_whose_gaussians_are_not_there_renders_white(data: Path, tmp_path: Path) -> None:
    config = phase3(data, 0)
    config["model"]["opacity_bias"] = -30.0
    found = found_in(by_hand("phase3", config, tmp_path))
    assert "white-renders" in {one.rule for one in found}


@pytest.mark.campaign
def test_towers_that_do_not_learn_stay_at_chance(data: Path, tmp_path: Path) -> None:
    config = face_voice(data, 0)
    config["model"]["first_scale"] = 1.0
    config["training"]["optimizer"] = {"lr": 1e-9, "towers_lr": 1e-9}
    found = {one.rule: one.what for one in found_in(by_hand("face_voice", config, tmp_path))}
    assert found["at-chance"].startswith("at chance: ln 32 = 3.466"), found
