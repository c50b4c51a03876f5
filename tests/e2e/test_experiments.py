"""The experiments of phase 3 as they are shipped, at the size of a test, and `launch compare` over them."""
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
    assert list(found["config"]["training.input_views"].values()) == [1, 1, 5, 5]
    assert list(found["config"]["training.losses.lpips"].values()) == [1, 0, 1, 0]
    assert list(found["config"]["training.losses.perceptual"].values()) == [1, 1, 1, 0]
    table = here.launch("compare", *jobs).stdout.split("\n\n")[1]
    assert {"psnr", "inputs", "applied", "skipped", "s/step"} <= set(table.splitlines()[0].split())
