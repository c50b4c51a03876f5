"""Small runs of every trainer, and of programs that are not ours, and what the rules say of them."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.contract import RunDir
from cluster.node import doctor, rules
from cluster.node.findings import Case, Finding
from cluster.node.view import read_view
from jobs.loader import Draw
from jobs.metrics import Metrics
from jobs.runtime import AgreedError, StopFlag
from jobs.trainer import Trainer
from jobs.world import World
from tests.jobs.conftest import job_in
from tests.jobs.small_phase1 import config_of as phase1_of
from tests.jobs.small_stage import Numbers, SmallStage, small_plan
from tests.jobs.test_phase3 import config_of as phase3_of
from tests.node.conftest import Job

Config = dict[str, Any]
PROGRESS = {"step": r"step (\d+)/", "total": r"step \d+/(\d+)", "loss": r"loss (\S+)", "lr": r"lr (\S+)",
            "val/loss": r"validation (\S+)"}


def case_in(run: Path) -> Case:
    directory = RunDir(run)
    return doctor.read_case(directory, read_view(directory))


def found_in(run: Path) -> list[Finding]:
    return rules.judge(case_in(run))


@dataclass
class Bed:
    """Where runs are made."""

    place: Path
    mice: Path
    make_job: Callable[..., Job]  # of tests/node/conftest.py
    patch: pytest.MonkeyPatch
    start: Callable[..., list[int]] = field(init=False)  # of tests/jobs/conftest.py

    @property
    def run(self) -> Path:
        return self.place / "run"

    def stage(self, stage: str, config: Config, fault: str = "", code: int = 0) -> list[Finding]:
        """One of our stages by hand, with a piece of it broken as tests/jobs/broken.py says."""
        path = self.place / "config.yaml"
        path.write_text(json.dumps(config))
        codes = self.start(self.run, 1, fault=fault, module="tests.jobs.broken",
                           argv=[stage, str(path), "--run-dir", str(self.run)])
        assert codes == [code], Path(f"{self.run}.out.0").read_text()
        return found_in(self.run)

    def small(self, stage: SmallStage, **plan: Any) -> list[Finding]:
        """The stage of a few thousand parameters, here."""
        whole, job = small_plan(**{"accumulation": 1, **plan}), job_in(self.run)
        metrics = Metrics(whole.total)
        metrics.open(job.attempt.metrics)
        try:
            Trainer(stage, whole, World(0, 1, torch.device("cpu")), job, metrics, StopFlag()).run()
        except AgreedError:
            pass  # it ends itself: what was wrong stands in its metrics
        return found_in(self.run)

    def program(self, source: str, config: str = "", starts: int = 1, **fields: Any) -> list[Finding]:
        """Somebody else's program under a supervisor: its output is all that there is."""
        path = self.place / "train.py"
        path.write_text(source)
        job = self.make_job("command", sys.executable, str(path), progress=PROGRESS, **fields)
        job.run.config.write_text(config)
        for by in ("submit", "restart")[:starts]:
            job.start(by=by).ended(60)
        return found_in(job.run.path)


class Reads(Numbers):
    """`spoil(batch, draws)` is what happens to a batch on its way."""

    def __init__(self, spoil: Callable[[dict[str, Any], list[Draw]], None]) -> None:
        self._spoil = spoil

    def batch(self, draws: list[Draw]) -> dict[str, Any]:
        batch = super().batch(draws)
        self._spoil(batch, draws)
        return batch


def small(spoil: Callable[[dict[str, Any], list[Draw]], None]) -> SmallStage:
    stage = SmallStage()
    stage.source = Reads(spoil)
    return stage


@dataclass
class Fast:
    """In place of the module `time`, where metrics are written: a run of seconds has the times of a long one."""

    times: float
    began: float = field(default_factory=time.time)

    def time(self) -> float:
        return self.began + self.times * (time.time() - self.began)


# --- the stages, healthy ------------------------------------------------------------------------------------

def changed(config: Config, values: dict[str, Any]) -> Config:
    """The same with these dotted keys."""
    for key, value in values.items():
        *above, last = key.split(".")
        place = config
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return config


def phase3(data: Path, seed: int, **values: Any) -> Config:
    config = phase3_of(data, max_steps=240, seed=seed, batch_per_rank=2, schedule={"warmup": 10}, validation={
        "path": str(data / "data_val.txt"), "every_steps": 60})
    return changed(config, {"checkpoint.every_steps": 120, **values})


def phase1(data: Path, seed: int, **values: Any) -> Config:
    config = phase1_of(data, max_steps=220, seed=seed, schedule={"warmup": 10}, validation={
        "path": str(data / "data_val.txt"), "every_steps": 40, "steps": 5, "guidance": 1.0})
    vae = {"channels": [16, 32], "train_steps": 200, "batch": 8, "min_psnr": 12}
    return changed(config, {"model.tiny.vae": vae, "checkpoint.every_steps": 110, **values})


def face_voice(_: Path, seed: int, **values: Any) -> Config:
    return changed({"data": {"procedural": {"identities": 60, "media": 4, "size": 16, "rate": 8000}, "split": {"val": 0.2, "test": 0.2}},
            "model": {"face": {"kind": "tiny", "size": 16, "width": 32}, "voice": {"kind": "tiny", "rate": 8000, "width": 32},
                      "freeze": "none", "width": 32},
            "training": {"max_steps": 150, "batch": 32, "seed": seed, "precision": "fp32", "loader_workers": 0,
                         "clips": {"train_s": 0.4, "eval_s": 0.6}, "optimizer": {"lr": 1e-3, "towers_lr": 1e-3},
                         "schedule": {"warmup": 10}, "validation": {"every_steps": 50, "trials": 500}},
            "evaluation": {"trials": 300, "bootstrap": 20}, "checkpoint": {"every_steps": 50}}, values)


def clap1(_: Path, seed: int, **values: Any) -> Config:
    return changed({"data": "random:0", "base_model": "random:0",
            "model": {"image_size": 8, "tokens": 2, "hidden": 16, "tiny": {
                "base": {"channels": [16, 16], "cross_attention_dim": 16, "steps": 60, "batch": 8}}},
            "training": {"max_steps": 150, "seed": seed, "batch_per_rank": 4, "accumulation": 1, "precision": "fp32",
                         "loader_workers": 0, "optimizer": {"lr": 1e-3}, "schedule": {"warmup": 10},
                         "validation": {"every_steps": 50, "max_items": 32, "timesteps": 2, "resamples": 50}},
            "checkpoint": {"every_steps": 50}}, values)


HEALTHY = [*(("phase3", phase3, seed) for seed in range(4)), *(("phase1", phase1, seed) for seed in range(2)),
           *(("face_voice", face_voice, seed) for seed in range(2)), *(("clap1", clap1, seed) for seed in range(2))]
