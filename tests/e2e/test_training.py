"""The real training learns: on the shipped toy data and on real renderings, here and on a node."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.contract import RunDir, merged_metrics
from jobs.data import toy
from tests.testbed.testbed import Testbed

from .conftest import on_this_machine
from .lab import Lab

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 900


def on(shared: Path, name: str, here: bool = True) -> list[str]:
    """The data of a set, named relative to where the person stands; for a node that does not know that, as it is."""
    parts = {"dataset": "train", "validation": "val"}
    lists = {key: shared / "data" / name / f"data_{part}.txt" for key, part in parts.items()}
    if missing := [str(path) for path in lists.values() if not path.exists()]:
        pytest.skip(f"needs the reference data {missing}")
    return [word for key, path in lists.items()
            for word in ("--set", f"training.{key}.path={os.path.relpath(path, REPOSITORY) if here else path.resolve()}")]


def evaluations(run: Path) -> list[dict]:
    return [line for line in merged_metrics(RunDir(run)) if line.get("event") == "eval"]


def train(lab: Lab, *argv: str) -> tuple[dict, str]:
    done = lab.launch("submit", "phase3", "--config", "demo", "--node", lab.node, "--follow", *argv, timeout_s=LIMIT_S)
    (view,) = json.loads(lab.launch("status", "--all", "--json").stdout)
    assert view["state"] == "COMPLETED" and view["step"] == view["total"]
    return view, done.stdout


def report(name: str, found: list[dict]) -> dict:
    last = found[-1]
    print(f"{name}: step 0 {found[0]['val/psnr']:.2f} -> {last['val/psnr']:.2f} dB held out; "
          f"white {last['val/psnr_white']:.2f}, mean training image {last['val/psnr_mean']:.2f}")
    return last


@pytest.fixture
def here(tmp_path: Path) -> Lab:
    """This computer, standing in the checkout."""
    return Lab(REPOSITORY, tmp_path)


def test_a_few_steps_leave_what_the_readme_promises(here: Lab, tmp_path: Path) -> None:
    toy.make(tmp_path / "toy", samples=4, val=1, size=32, seed=0)
    data = os.path.relpath(tmp_path / "toy", REPOSITORY)
    view, log = train(here, "--set", f"training.dataset.path={data}/data_train.txt",
                      "--set", f"training.validation.path={data}/data_val.txt",
                      "--set", "training.max_steps=4", "--set", "training.validation.every_steps=2")
    run = Path(view["run_dir"])
    assert {"gaussians.ply", "before_after_truth.png"} <= {path.name for path in (run / "artifacts").iterdir()}
    found = evaluations(run)
    assert [line["step"] for line in found] == [0, 2, 4]
    for line in found:
        assert f"{line['val/psnr']:.4g}" in log and f"{line['val/psnr_white']:.4g}" in log
        assert f"{line['val/psnr_mean']:.4g}" in log


@pytest.mark.campaign
def test_demo(here: Lab, tmp_path: Path) -> None:
    toy.make(tmp_path / "toy", samples=40, val=8, size=64, seed=0)
    view, _ = train(here, "--set", f"training.dataset.path={tmp_path}/toy/data_train.txt",
                       "--set", f"training.validation.path={tmp_path}/toy/data_val.txt")
    print(f"demo: {view['ended_at'] - view['started_at']:.0f} s (wanted: 300)")
    assert here.findings(view["id"]) == []
    last = report("demo", evaluations(Path(view["run_dir"])))
    assert last["val/psnr"] > max(last["val/psnr_white"], last["val/psnr_mean"]) + 1


@pytest.mark.campaign
@pytest.mark.parametrize(("name", "above_white", "above_mean"), [("mouse_mvrig", 4.0, 0.0), ("mouse_lab", 2.0, -99.0)])
def test_real_renderings(here: Lab, shared: Path, name: str, above_white: float, above_mean: float) -> None:
    view, _ = train(here, *on(shared, name))
    last = report(name, evaluations(Path(view["run_dir"])))
    assert last["val/psnr"] >= last["val/psnr_white"] + above_white
    assert last["val/psnr"] >= last["val/psnr_mean"] + above_mean


@pytest.mark.campaign
def test_real_renderings_on_a_node(lab: Lab, testbed: Testbed, shared: Path) -> None:
    lab.project = REPOSITORY
    view, _ = train(lab, *on(shared, "mouse_mvrig", here=False))
    last = report("mouse_mvrig on gpu05", evaluations(on_this_machine(testbed, view["run_dir"])))
    assert last["val/psnr"] >= max(last["val/psnr_white"] + 4, last["val/psnr_mean"])
