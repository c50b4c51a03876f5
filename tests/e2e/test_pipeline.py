"""The mouse pipeline as a person starts it: what it says beforehand, and (in the campaign) the whole of the demo."""
from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from cluster.contract import RunDir, read_json_lines
from jobs.data import toy

from .lab import Lab
from .test_experiments import REPOSITORY, SMALL

STAGES = ("phase1", "phase2", "phase3", "reconstruct")
LIMIT_S = 12 * 60


@pytest.fixture
def here(tmp_path: Path) -> Lab:
    """This computer, standing in the checkout."""
    return Lab(REPOSITORY, tmp_path)


def data_of(folder: Path, samples: int, val: int, size: int) -> list[str]:
    """--set words that put a toy set in the place of the demo's."""
    toy.make(folder, samples=samples, val=val, size=size, seed=0)
    train, held = f"{folder}/data_train.txt", f"{folder}/data_val.txt"
    unseen = f"{folder}/sample_{samples:06d}"
    paths = {"phase1.training.dataset.path": train, "phase1.training.validation.path": held,
             "phase2.sources.path": train, "reconstruct.input_image": f"{unseen}/images/cam_000.png",
             "reconstruct.truth": unseen, "reconstruct.mean_of": train}
    return [word for key, path in paths.items() for word in ("--set", f"{key}={path}")]


def test_a_dry_run_shows_who_waits_for_whom_and_the_test_mode(here: Lab, tmp_path: Path) -> None:
    data = data_of(tmp_path / "toy", 3, 2, 32)
    said = here.launch("submit", "pipeline", "--config", "demo", "--dry-run", "--set", "mode=test", *data).stdout
    lines = {label: re.split(" {2,}", next(line for line in said.splitlines() if f" {label} " in line))
             for label in STAGES}
    assert ["mode=test" in " ".join(cells) for cells in lines.values()] == [True, True, True, False]
    assert "phase1.checkpoints.best" in lines["phase2"][-1] and "phase1, phase3" in lines["reconstruct"]
    assert [cell for cell in lines["phase2"] if cell.isdecimal()] == ["3"]  # one of each real sample
    assert "not measured yet; --dry-run --calibrate measures it" in said
    assert not list((tmp_path / "work" / "runs").glob("*"))


def test_a_calibration_says_how_long_it_lasts_and_leaves_only_that(here: Lab, tmp_path: Path) -> None:
    toy.make(tmp_path / "toy", samples=3, val=1, size=32, seed=0)
    data = {"training.dataset.path": f"{tmp_path}/toy/data_train.txt",
            "training.validation.path": f"{tmp_path}/toy/data_val.txt", "training.max_steps": "40000"}
    sets = [word for key, value in (SMALL | data).items() for word in ("--set", f"{key}={value}")]
    asked = ("submit", "phase3", "--config", "exp_c", "--gpus", "0", "--dry-run", *sets)
    assert "not measured yet" in here.launch(*asked).stdout
    done = here.launch(*asked, "--calibrate", timeout_s=240)
    [takes] = [line for line in done.stdout.splitlines() if line.startswith("takes ")]
    assert re.fullmatch(r"takes +~\d.* \(.* s a step, measured on .*, CPU, \d+ s ago by phase3-\w+\); "
                        r"disk .*B, .*B free", takes), takes
    assert "max_steps: 40000" in done.stdout and "runs a few steps to be measured: phase3 12" in done.stderr
    assert not list((tmp_path / "work" / "runs").iterdir()) and json.loads(here.launch("status", "--all", "--json").stdout) == []
    assert "--calibrate goes with --dry-run" in here.launch("submit", "phase3", "--calibrate", code=2).stderr


@pytest.mark.campaign
def test_the_demo_learns_in_every_phase(here: Lab, tmp_path: Path) -> None:
    """In less than twelve minutes: the bars that each phase is held against, its pictures, and what was handed over."""
    data = data_of(tmp_path / "toy", 40, 8, 64)
    began = time.monotonic()
    done = here.launch("submit", "pipeline", "--config", "demo", "--name", "p", "--follow", *data, timeout_s=LIMIT_S)
    took = time.monotonic() - began
    found = {one["name"].removeprefix("p."): one for one in json.loads(here.launch("status", "p", "--json").stdout)}
    assert {one["state"] for one in found.values()} == {"COMPLETED"} and list(found) == list(STAGES)
    assert {label: here.findings(one["id"]) for label, one in found.items()} == dict.fromkeys(STAGES, [])
    runs = {label: RunDir(Path(one["run_dir"])) for label, one in found.items()}

    verdicts = {label: json.loads((runs[label].artifacts / "validation.json").read_bytes())
                for label in ("phase1", "phase3")}
    chain = json.loads((runs["reconstruct"].artifacts / "metrics.json").read_bytes())
    assert [len(verdict["bars"]) for verdict in (*verdicts.values(), chain)] == [3, 2, 3]
    for verdict in (*verdicts.values(), chain):
        assert all(bar["beaten"] for bar in verdict["bars"]), verdict
    one = verdicts["phase1"]["metrics"]
    assert one["val/psnr"] >= one["val/psnr_other"] + 1.5 and one["val/psnr_vae"] >= 28
    assert verdicts["phase3"]["metrics"]["val/psnr"] > verdicts["phase3"]["metrics"]["val/psnr_mean"]
    assert chain["views"] == 5 and {"chain", "copy", "white", "untrained", "mean"} <= chain["psnr"].keys()
    report = json.loads((runs["phase2"].artifacts / "dataset" / "report.json").read_bytes())
    assert report["samples"] == 40 and report["accepted"] >= 20

    for label, name in (("phase1", "input_generated_truth.png"), ("phase2", "contact_sheet.png"),
                        ("phase3", "before_after_truth.png"), ("phase3", "gaussians.ply"),
                        ("reconstruct", "gaussians.ply"), ("reconstruct", "views/00_front.png"),
                        ("reconstruct", "renders/05_front_left.png")):
        assert (runs[label].artifacts / name).stat().st_size > 500, (label, name)

    for position, label in enumerate(STAGES, 1):
        assert f"--- p.{label} ({position} of 4" in done.stderr and f"{found[label]['id']} COMPLETED" in done.stderr
    best = json.loads((runs["phase1"].checkpoints / "best.json").read_bytes())["checkpoint"]
    assert "takes phase1.checkpoints.best" in done.stderr and f"generator: {runs['phase1'].checkpoints}/{best}" in done.stdout
    assert done.stdout.count("\nabove ") == 3 + 2 + 3 and "NOT above" not in done.stdout
    measured = list(read_json_lines(tmp_path / "work" / ".launch" / "measured.jsonl"))
    assert [line["job"] for line in measured] == [found[label]["id"] for label in STAGES]
    assert took < LIMIT_S


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["mouse_mvrig", "mouse_lab"])
def test_phase_1_learns_on_real_renderings(here: Lab, shared: Path, name: str) -> None:
    """Views of unseen mice, above the copied and the white picture and by 1.5 dB above another mouse put in."""
    lists = {key: shared / "data" / name / f"data_{part}.txt"
             for key, part in (("dataset", "train"), ("validation", "val"))}
    sets = [word for key, path in lists.items() for word in ("--set", f"training.{key}.path={path}")]
    done = here.launch("submit", "phase1", "--config", "demo", "--name", name, "--follow", *sets, timeout_s=LIMIT_S)
    verdict = json.loads((here.run_dir(name) / "artifacts" / "validation.json").read_bytes())
    print(f"{name}: " + "  ".join(f"{key} {value:.2f}" for key, value in verdict["metrics"].items()))
    assert len(verdict["bars"]) == 3 and all(bar["beaten"] for bar in verdict["bars"]), verdict
    assert verdict["metrics"]["val/psnr_vae"] >= 28 and f"{verdict['metrics']['val/psnr_mean']:.2f} dB" in done.stdout
