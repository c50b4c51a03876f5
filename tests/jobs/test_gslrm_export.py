"""Checkpoints out to the public code and in again."""
from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch

from configs.phase3 import Phase3Run
from jobs.data.toy import make
from jobs.gslrm_export import export
from jobs.gslrm_stage import build_model, decays
from jobs.runtime import JobError
from models.gslrm import GSLRM, GSLRMConfig
from tests.jobs.test_phase3 import phase3

SIZES = {"d": 64, "d_head": 16, "n_layer": 2, "patch_size": 8, "image_size": 32}


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict:
    return torch.load(shared / "fixtures" / "gslrm_tiny.pt", weights_only=True)


@pytest.fixture(scope="module")
def run(golden: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates from the golden weights, the first of them with a rate of 0: step 1 still has those weights."""
    at = tmp_path_factory.mktemp("run")
    make(at / "data", 2, 1, 32, 0)
    torch.save({"model": golden["state_dict"], "fwdbwd_pass_step": 7}, at / "ckpt_0000000000000007.pt")
    config = {"init_from": str(at / "ckpt_0000000000000007.pt"), "model": SIZES, "turntable_frames": 0,
              "checkpoint": {"every_steps": 1, "keep_last": 9}, "training": {
                  "dataset": {"path": str(at / "data/data_train.txt")},
                  "validation": {"path": str(at / "data/data_val.txt"), "every_steps": 9}, "max_steps": 2,
                  "precision": "fp32", "loader_workers": 0, "schedule": {"warmup": 1}, "optimizer": {"lr": 1e-3}}}
    done = phase3(at, config, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    return at / "run"


def test_the_weights_of_a_public_file_come_out_as_they_went_in(run: Path, golden: dict, tmp_path: Path) -> None:
    file, notes = export(run / "checkpoints/step-00000001-a000", tmp_path)
    assert file == tmp_path / "ckpt_0000000000000001.pt" and not list(tmp_path.glob(".tmp*"))
    assert not any("other Gaussians" in note for note in notes) and "d 64, d_head 16" in " ".join(notes)
    saved = torch.load(file, weights_only=True)
    assert set(saved) == {"model", "optimizer", "lr_scheduler", "fwdbwd_pass_step", "param_update_step"}
    assert (saved["fwdbwd_pass_step"], saved["param_update_step"]) == (1, 1)
    assert saved["model"].keys() == golden["state_dict"].keys()
    assert all(torch.equal(saved["model"][name], tensor) for name, tensor in golden["state_dict"].items())
    model = GSLRM(GSLRMConfig(d=64, d_head=16, n_layer=2)).load_upstream(file)
    found = model(golden["image"][:, :, :3], golden["c2w"], golden["fxfycxcy"])
    torch.testing.assert_close(found.means[0], golden["out"]["xyz"], atol=1e-5, rtol=0)


def test_a_plain_optimizer_and_schedule_take_its_training_state(run: Path, tmp_path: Path) -> None:
    saved = torch.load(export(run, tmp_path / "out.pt", take="last")[0], weights_only=True)
    model = GSLRM(GSLRMConfig(d=64, d_head=16, n_layer=2))
    model.load_state_dict(saved["model"])
    named = list(model.named_parameters())
    groups = [[p for name, p in named if decays(name, p) is decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.05}, {"params": groups[1], "weight_decay": 0}],
                                  lr=1e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["lr_scheduler"])
    assert scheduler.last_epoch == 2 and [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0]
    for name, parameter in named:
        moments = optimizer.state[parameter]
        assert moments["exp_avg"].shape == parameter.shape and moments["step"] == 2, name
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_what_was_exported_starts_another_run(run: Path, tmp_path: Path) -> None:
    file, _ = export(run, tmp_path / "out.pt", take="last")
    config = msgspec.convert(json.loads((run / "config.yaml").read_bytes()), Phase3Run)
    ours, theirs = (build_model(msgspec.structs.replace(config, init_from=str(path)))
                    for path in (run / "checkpoints/step-00000002-a000", file))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def test_a_checkpoint_away_from_its_run_still_knows_its_sizes(run: Path, tmp_path: Path) -> None:
    moved = (run / "checkpoints/step-00000002-a000").rename(run / "moved")
    try:
        assert export(moved, tmp_path / "out.pt")[0].exists()
    finally:
        moved.rename(run / "checkpoints/step-00000002-a000")


def test_other_constants_than_the_public_ones_are_told(run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000001-a000"
    checkpoint.mkdir()
    for made in (run / "checkpoints/step-00000001-a000").iterdir():
        (checkpoint / made.name).write_bytes(made.read_bytes())
    about = json.loads((checkpoint / "gslrm.json").read_bytes())
    (checkpoint / "gslrm.json").write_text(json.dumps({"model": about["model"] | {"scale_bias": -3.0}}))
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    del manifest["files"]["gslrm.json"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "scale_bias -3.0 (there -2.3)" in export(checkpoint, tmp_path / "out.pt")[1][-1]


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no checkpoint directory"):
        export(tmp_path / "gone", tmp_path / "out.pt")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(JobError, match="no finished checkpoint"):
        export(tmp_path, tmp_path / "out.pt")
