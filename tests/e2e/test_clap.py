"""CLAP2Diffusion as a person starts it: what it refuses beforehand, and (in the campaign) the demo and its kills."""
from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from cluster.contract import RunDir, merged_metrics
from tests.helpers import wait_until

from .lab import Lab
from .test_experiments import REPOSITORY

STAGES = ("clap1", "clap2", "clap3")
LIMIT_S = 6 * 60
SHORT = {"clap1.model.tiny.base.steps": 40, "clap1.training.max_steps": 60, "clap2.training.max_steps": 60,
         "clap3.training.max_steps": 40, "checkpoint.every_steps": 10, "training.validation.every_steps": 20, "force": "true",
         "evaluate.sampling.steps": 4, "evaluate.max_pictures": 8}


@pytest.fixture
def here(tmp_path: Path) -> Lab:
    """This computer, standing in the checkout."""
    return Lab(REPOSITORY, tmp_path)


def members(lab: Lab, name: str) -> dict[str, dict]:
    return {one["name"].removeprefix(f"{name}."): one for one in json.loads(lab.launch("status", name, "--json").stdout)}


def test_a_mistake_in_the_last_stage_is_told_before_the_first_begins(here: Lab, tmp_path: Path) -> None:
    said = here.launch("submit", "clap", "--config", "demo", "--set", "clap3.training.max_steps=many", code=2).stderr
    assert "clap3.training.max_steps" in said or "training.max_steps" in said
    assert not list((tmp_path / "work" / "runs").glob("*"))


def test_a_dry_run_shows_the_chain(here: Lab, tmp_path: Path) -> None:
    said = here.launch("submit", "clap", "--config", "demo", "--dry-run").stdout
    for taken in ("clap1.checkpoints.best", "clap2.checkpoints.best", "clap3.checkpoints.best"):
        assert taken in said
    assert not list((tmp_path / "work" / "runs").glob("*"))


@pytest.mark.alone
@pytest.mark.campaign
def test_the_demo_listens(here: Lab) -> None:
    began = time.monotonic()
    done = here.launch("submit", "clap", "--config", "demo", "--name", "c", "--follow", timeout_s=3 * LIMIT_S)
    took = time.monotonic() - began
    found = members(here, "c")
    assert {one["state"] for one in found.values()} == {"COMPLETED"} and list(found) == [*STAGES, "evaluate"]
    assert {label: here.findings(one["id"]) for label, one in found.items()} == dict.fromkeys(found, [])
    runs = {label: RunDir(Path(one["run_dir"])) for label, one in found.items()}
    evaluation = json.loads((runs["evaluate"].artifacts / "evaluation.json").read_bytes())
    assert len(evaluation["bars"]) == 5 and all(bar["reached"] for bar in evaluation["bars"]), evaluation["bars"]
    for bar in evaluation["bars"]:
        assert f"{bar['what']}: {bar['value']:.4g}" in done.stdout
    for label in STAGES:
        verdict = json.loads((runs[label].artifacts / "validation.json").read_bytes())
        assert verdict["learned"], (label, verdict["metrics"])
    assert (runs["evaluate"].artifacts / "pictures.png").stat().st_size > 500
    print(f"clap demo: {took:.0f} s; {evaluation['bars']}")
    assert took < LIMIT_S


def numbers(lab: Lab, name: str) -> dict[str, object]:
    """What the runs of a chain measured: losses and evaluations of every stage, and the last evaluation."""
    found = members(lab, name)
    series = {label: [{key: value for key, value in line.items() if key in ("step", "loss", "lr") or key.startswith("val/")}
                      for line in merged_metrics(RunDir(Path(found[label]["run_dir"]))) if line.get("event") in (None, "eval")]
              for label in STAGES}
    evaluation = json.loads((Path(found["evaluate"]["run_dir"]) / "artifacts" / "evaluation.json").read_bytes())
    return series | {"evaluation": {key: evaluation[key] for key in ("grid", "gate_sweep", "guidance")}}


@pytest.mark.campaign
def test_killed_in_every_stage_the_chain_measures_what_it_measures_undisturbed(here: Lab, tmp_path: Path) -> None:
    """kill -9 of one rank in the middle of each stage; the supervisor starts it again."""
    sets = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    here.launch("submit", "clap", "--config", "demo", "--name", "whole", *sets)
    here.launch("wait", "whole", timeout_s=LIMIT_S)
    here.launch("submit", "clap", "--config", "demo", "--name", "cut", *sets)
    for label in STAGES:
        kill_a_rank(here, label)
    here.launch("wait", "cut", timeout_s=LIMIT_S)
    found = members(here, "cut")
    assert [found[label]["attempt"] for label in STAGES] == [1, 1, 1]
    assert numbers(here, "cut") == numbers(here, "whole")


def kill_a_rank(lab: Lab, label: str) -> None:
    """Once the stage has a checkpoint and has gone on from it."""
    def place() -> Path | None:
        directory = members(lab, "cut")[label]["run_dir"]
        return Path(directory) if directory else None

    def far_enough() -> bool:
        run = place()
        metrics = run / "attempts" / "000" / "metrics.jsonl" if run else None
        return bool(metrics and metrics.exists() and any(f'"step": {step},' in metrics.read_text() for step in range(13, 19)))

    wait_until(far_enough, LIMIT_S, f"{label} is at step 13")
    run = place()
    assert run
    pid = json.loads((run / "attempts" / "000" / "ranks" / "0.json").read_bytes())["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 30, f"{pid} is gone")
