"""The experiments of phase 3 as they are shipped, at the size of a test, and `launch compare` over them and over jobs of
several places."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jobs.data import toy

from .lab import Lab

REPOSITORY = Path(__file__).parents[2]
SMALL = {
    "model.d": "32", "model.d_head": "16", "model.n_layer": "1", "model.patch_size": "4", "model.image_size": "32",
    "init_from": "null", "turntable_frames": "0", "training.max_steps": "2", "training.batch_per_rank": "1",
    "training.loader_workers": "0", "training.validation.every_steps": "2", "training.schedule.warmup": "1",
}
COLUMNS = {"psnr", "val_psnr", "val_psnr_input", "val_ssim", "applied", "attempted", "skipped", "lr", "s_step"}

FOREIGN = """import json, os, sys, time
with open(f"{os.environ['LAUNCH_RUN_DIR']}/attempts/000/metrics.jsonl", "w") as file:
    for step in range(1, 5):
        json.dump({"t": time.time(), "step": step, "loss": 1 / step}, file)
        file.write(chr(10))
"""


@pytest.fixture
def here(tmp_path: Path) -> Lab:
    """This computer, standing in the checkout."""
    return Lab(REPOSITORY, tmp_path)


def test_the_four_experiments_run_as_they_are_and_are_compared(here: Lab, tmp_path: Path) -> None:
    toy.make(tmp_path / "toy", samples=2, val=1, size=32, seed=0)
    data = {f"training.{key}.path": f"{tmp_path}/toy/data_{part}.txt"
            for key, part in (("dataset", "train"), ("validation", "val"))}
    vgg = {f"training.losses.{key}": "random:0" for key in ("perceptual_weights", "lpips_weights", "lpips_heads")}
    jobs = []
    for name in ("baseline", "exp_a", "exp_b", "exp_c"):
        sets = [word for key, value in (SMALL | data | vgg).items() for word in ("--set", f"{key}={value}")]
        jobs.append(here.submit("phase3", "--config", name, "--name", name, "--gpus", "0", *sets))
    here.launch("wait", *jobs, timeout_s=400)

    found = json.loads(here.launch("compare", *jobs, "--json").stdout)
    assert [job["name"] for job in found["jobs"]] == ["baseline", "exp_a", "exp_b", "exp_c"]
    for job in found["jobs"]:
        assert all(math.isfinite(job[column]) for column in COLUMNS), job
        assert job["attempted"] == 2
        assert job["wall_s"] > 1 and 0 <= job["useful"] < 1 and job["gpu_s"] == 0
    assert found["environment"] == {} and "rig" not in found["inputs"]
    assert list(found["config"]["training.input_views"].values()) == [1, 1, 5, 5]
    assert list(found["config"]["training.losses.lpips"].values()) == [1, 0, 1, 0]
    assert list(found["config"]["training.losses.perceptual"].values()) == [1, 1, 1, 0]
    first = found["jobs"][0]
    goal = f"val/psnr={first['val_psnr']}"
    reached = json.loads(here.launch("compare", *jobs, "--reach", goal, "--json").stdout)["jobs"][0]["reached"]["val/psnr"]
    assert reached["value"] == first["val_psnr"] and 0 < reached["wall_s"] <= first["wall_s"]

    *_, same, results, cost = here.launch("compare", *jobs, "--reach", goal).stdout.split("\n\n")
    assert cost.startswith("to reach val/psnr ") and "never" not in cost.splitlines()[2].split()[1]
    rows = [line.split()[0] for line in results.splitlines()]
    assert {"psnr", "inputs", "applied", "skipped", "s/step", "wall", "GPU"} <= set(rows)
    assert "the same environment: Python 3" in same and "the same inputs: rig in words, rig, training data" in same


@pytest.mark.campaign
def test_other_peoples_programs_on_an_ssh_node_and_in_slurm_are_compared_from_a_laptop(slurm: Lab) -> None:
    program = slurm.project / "foreign.py"
    program.write_text(FOREIGN)
    first = slurm.submit("--node", "gpu05", "--", "python3", "foreign.py", "--lr", "1e-4")
    program.write_text(FOREIGN + "# one line\n# and another\n")
    second = slurm.submit("--node", "lab", "--gpus", "1", "--", "python3", "foreign.py", "--lr", "1e-3")
    slurm.launch("wait", first, second)

    text = slurm.launch("compare", first, second, "--reach", "loss=0.4").stdout
    config, code, *_, results, cost = text.split("\n\n")
    assert config.splitlines()[1].split() == ["(command)", "--lr", "1e-4", "--lr", "1e-3"]
    assert code.splitlines()[0] == f"code of {second} against {first}: 1 file, +2 -0" and "foreign.py  +2 -0" in code
    assert "no config is known" in text and "no fingerprint of an input is recorded" in text
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in results.splitlines()}
    assert rows["node"] == ["gpu05", "lab"] and rows["GPU h"][0] == "0" != rows["GPU h"][1]
    assert cost.splitlines()[0] == "to reach loss ≤ 0.4" and cost.splitlines()[2].split() == ["step", "3", "3"]
