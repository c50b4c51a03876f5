from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from cluster.contract import RunDir, read_json_lines
from configs.phase3 import Phase3Run
from jobs.data.multiview import MultiView, ViewChoice, find_samples
from jobs.data.samples import read_sample
from jobs.data.toy import make
from jobs.gslrm_stage import PictureLoss, build_model, recomputation
from jobs.heldout import Heldout
from jobs.world import World
from models import losses
from models.gaussians import load_ply, render
from models.gslrm import activation_gb
from tests.jobs.test_data_check import tool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    make(out, 4, 2, 16, 0)
    return out


def config_of(data: Path, **training: object) -> dict:
    return {
        "model": {"d": 32, "d_head": 16, "n_layer": 1, "patch_size": 4, "image_size": 16, "scale_bias": -3.0,
                  "scale_max": -2.3},
        "training": {
            "dataset": {"path": str(data / "data_train.txt")},
            "validation": {"path": str(data / "data_val.txt"), "every_steps": 4},
            "max_steps": 8, "precision": "fp32", "loader_workers": 0, "activation_checkpointing": False,
            "optimizer": {"lr": 1e-3, "grad_clip": 1.0}, "schedule": {"warmup": 2}, **training},
        "turntable_frames": 3, "checkpoint": {"every_steps": 4}}


def phase3(tmp_path: Path, config: dict, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "jobs.phase3", str(path), *arguments]
    return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=100,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **env})


def test_by_hand_it_trains_validates_and_leaves_its_artifacts(data: Path, tmp_path: Path) -> None:
    done = phase3(tmp_path, config_of(data))
    assert done.returncode == 0, done.stderr
    run = RunDir(next((tmp_path / "runs").glob("phase3-by-hand-*")))
    lines = list(read_json_lines(run.attempt(0).metrics))
    evaluations = [line for line in lines if line.get("event") == "eval"]
    assert [line["step"] for line in evaluations] == [0, 4, 8]
    assert {"val/psnr", "val/ssim", "val/psnr_white", "val/psnr_mean"} <= evaluations[0].keys()
    assert evaluations[0]["val/images"] == 12  # every view of two samples
    assert evaluations[-1]["val/psnr_input"] != evaluations[-1]["val/psnr"]
    assert 0 < evaluations[-1]["val/ssim_input"] <= 1
    assert "evaluation at step 0" in done.stdout and "done: 8 steps, 8 of 8 updates applied" in done.stdout
    assert (run.config.exists(), run.attempt(0).config.exists()) == (True, True)
    assert load_ply(run.artifacts / "gaussians.ply").means.shape == (1, 2 + 5 * 16 * 16, 3)
    with Image.open(run.artifacts / "before_after_truth.png") as picture:
        assert picture.size[0] >= 6 * 192
    pictures = run.attempt(0).path / "validation"
    assert sorted(path.name for path in pictures.iterdir()) == [f"step-{step:08d}.png" for step in (0, 4, 8)]
    [film] = run.artifacts.glob("turntable.*")
    assert f"turntable: {film}" in done.stdout and "activations: kept" in done.stdout
    report = json.loads((run.artifacts / "report.json").read_bytes())
    assert report["metrics"]["val/psnr"] == evaluations[-1]["val/psnr"]
    assert len(report["provenance"]["training data"]) == 64 and len(report["identity"]["rig"]) == 64


@pytest.mark.parametrize(("change", "said"), [
    ({"max_stepz": 8}, "max_stepz"),
    ({"max_steps": "many"}, "max_steps"),
    ({"input_views": 6}, "all 6 views would be inputs"),
    ({"dataset": {"path": "gone.txt"}}, "list file gone.txt: No such file"),
    ({"losses": {"perceptual": 1.0, "perceptual_weights": "/gone.pt"}}, "/gone.pt"),
])
def test_a_persons_mistake_is_one_block_exit_2_and_leaves_nothing(
        data: Path, tmp_path: Path, change: dict, said: str) -> None:
    done = phase3(tmp_path, config_of(data, **change))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_mistake_in_the_data_ends_all_ranks_with_one_message(data: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text(f"{data / 'sample_000000'}\nmissing\n")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config_of(data, dataset={"path": str(listing)})))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--redirects=3",
               f"--log-dir={tmp_path / 'log'}", "-m", "jobs.phase3", str(path), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100)
    assert done.returncode != 0
    said = [file.read_text() for file in sorted((tmp_path / "log").rglob("stderr.log"))]
    assert len(said) == 2 and "Traceback" not in "".join(said)
    assert "".join(said).count("error: missing: directory: does not exist") == 1
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_and_the_supervisors_environment_is_obeyed(data: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "job-1")
    run.attempt(2).path.mkdir(parents=True)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config_of(data, max_steps=100000)))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LAUNCH_RUN_DIR": str(run.path), "LAUNCH_JOB_ID": "job-1",
           "LAUNCH_ATTEMPT": "2", "LAUNCH_CHECKPOINT_DIR": str(run.checkpoints), "LAUNCH_RESUME": ""}
    with subprocess.Popen([sys.executable, "-m", "jobs.phase3", str(path)], env=env, text=True,
                          stdout=subprocess.PIPE) as job:
        assert job.stdout
        for line in job.stdout:
            if line.startswith("step 1/"):
                job.send_signal(signal.SIGTERM)
        assert job.wait() == 0
    lines = list(read_json_lines(run.attempt(2).metrics))
    assert lines[0]["event"] == "resumed" and lines[-1]["event"] == "stopped"
    saved = [line for line in lines if line.get("event") == "checkpoint"][-1]
    assert saved["step"] == lines[-1]["step"] and saved["path"].endswith("-a002")
    assert not run.artifacts.exists() or not any(run.artifacts.iterdir())


def test_the_rig_of_validation_must_be_the_one_of_training(data: Path, tmp_path: Path) -> None:
    for name in ("sample_000004", "sample_000005"):
        raw = json.loads((data / name / "opencv_cameras.json").read_text())
        raw["frames"] = raw["frames"][1:] + raw["frames"][:1]
        del raw["rig"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "images").symlink_to(data / name / "images")
        (tmp_path / name / "opencv_cameras.json").write_text(json.dumps(raw))
        assert read_sample(name, tmp_path / name)
    (tmp_path / "val.txt").write_text("sample_000004\nsample_000005\n")
    done = phase3(tmp_path, config_of(data, validation={"path": str(tmp_path / "val.txt")}))
    assert done.returncode == 2 and "another rig than the training samples" in done.stderr
    assert "the training data has mv6: 6 views" in done.stderr and "the validation data has 6 views" in done.stderr
    assert "the same cameras in another order" in done.stderr


def test_a_resume_on_another_rig_is_refused_and_says_which_side_has_what(data: Path, tmp_path: Path) -> None:
    assert phase3(tmp_path, config_of(data, max_steps=4), "--run-dir", "run").returncode == 0
    [checkpoint] = (tmp_path / "run/checkpoints").glob("step-*4-a000")
    assert tool("normalize", data, tmp_path / "far", "--radius", "3").returncode == 0
    config = config_of(tmp_path / "far", max_steps=8)
    done = phase3(tmp_path, config, "--run-dir", "again", "--resume", str(checkpoint))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{checkpoint}: its rig in words is mv6: 6 views (front, " in done.stderr
    assert "distance 2.70" in done.stderr and "this run's is 6 views (front, " in done.stderr
    assert "distance 3.00" in done.stderr


def typed(data: Path, **losses_: float) -> Phase3Run:
    return msgspec.convert(config_of(data, losses=losses_), Phase3Run)


@pytest.mark.parametrize("group_px", [1 << 20, 1])
def test_deferred_rendering_has_the_loss_and_gradients_of_the_plain_one(
        data: Path, monkeypatch: pytest.MonkeyPatch, group_px: int) -> None:
    monkeypatch.setattr("jobs.gslrm_stage._PIXELS_AT_ONCE", group_px)
    config = typed(data, l2=1.0, ssim=0.5, masked_l2=0.7, masked_ssim=0.3, background=0.2)
    model = build_model(config)
    sample = read_sample("s", data / "sample_000000")
    c2w, fxfycxcy = sample.c2w()[None], sample.fxfycxcy(16)[None]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 6, 3, 16, 16, generator=generator)
    masks = (torch.rand(1, 6, 1, 16, 16, generator=generator) > 0.6).float()

    def plain() -> torch.Tensor:
        image = render(model(images, c2w, fxfycxcy), c2w, fxfycxcy, 16, 16).image
        return (losses.l2(image, images) + 0.5 * losses.ssim(image, images)
                + 0.7 * losses.masked_l2(image, images, masks) + 0.3 * losses.masked_ssim(image, images, masks)
                + 0.2 * losses.background_l2(image, masks, (1.0, 1.0, 1.0)))

    def deferred() -> torch.Tensor:
        return PictureLoss(config, torch.device("cpu")).deferred(
            model(images, c2w, fxfycxcy), images, masks, c2w, fxfycxcy, 0)[0]

    found = []
    for loss in (plain(), deferred()):
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-6 * found[0][1].abs().max().item())


def test_validation_takes_every_view_once_and_tells_inputs_and_held_out_views_apart(
        data: Path, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out views come out white here and inputs grey. One sample is fewer than a batch, and is no empty set."""
    choice = ViewChoice(5, "heldout", False)
    train, val = (MultiView(find_samples(data / f"data_{part}.txt", "error", alone).samples[:1], 16, (1.0, 1.0, 1.0),
                            choice, 0, 1) for part in ("train", "val"))
    heldout = Heldout(val, train, 2, (1.0, 1.0, 1.0), alone)
    shades = torch.tensor([1.0, 0.5, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 16, 16)
    monkeypatch.setattr("jobs.heldout.render", lambda *_: SimpleNamespace(image=shades))
    found = heldout.evaluate(lambda *_: None, None)  # type: ignore[arg-type, return-value]
    assert found and found["val/images"] == 6
    every = val.views(0).pixels[:, :3].float() / 255
    white, grey = (losses.image_psnr(torch.full_like(every, shade), every) for shade in (1.0, 0.5))
    taken = [view for item in heldout.items for view in item.inputs]
    assert found["val/psnr"] == pytest.approx(found["val/psnr_white"]) == pytest.approx(white.mean().item())
    assert found["val/psnr_input"] == pytest.approx(grey[taken].mean().item())


def test_late_terms_wait_for_the_end_of_the_l2_warm_up(data: Path) -> None:
    config = msgspec.convert(config_of(data, losses={
        "ssim": 0, "perceptual": 1.0, "perceptual_weights": "random:0", "l2_warmup_steps": 3}), Phase3Run)
    pictures = PictureLoss(config, torch.device("cpu"))
    model, sample = build_model(config), read_sample("s", data / "sample_000000")
    c2w, fxfycxcy = sample.c2w()[None], sample.fxfycxcy(16)[None]
    images = torch.rand(1, 6, 3, 16, 16)
    with torch.no_grad():
        gaussians = model(images, c2w, fxfycxcy)
    early, late = (pictures.deferred(gaussians, images, images[:, :, :1], c2w, fxfycxcy, step)[0] for step in (2, 3))
    assert late > early


def test_the_first_weights_are_a_function_of_the_seed_or_of_init_from(data: Path, tmp_path: Path) -> None:
    first, again = build_model(typed(data)), build_model(typed(data))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    moved = {f"module.{name}": tensor + 1 for name, tensor in first.state_dict().items()}
    torch.save({"model": moved, "fwdbwd_pass_step": 5}, tmp_path / "ckpt.pt")
    from_file = build_model(msgspec.structs.replace(typed(data), init_from=str(tmp_path / "ckpt.pt")))
    assert all(torch.equal(a + 1, b) for a, b in zip(first.state_dict().values(), from_file.state_dict().values()))


def test_compiling_without_a_compiler_is_told_before_anything_is_made(data: Path, tmp_path: Path) -> None:
    done = phase3(tmp_path, config_of(data, compile=True), CXX="no-such-compiler")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: training.compile: torch.compile needs the C++ compiler no-such-compiler" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_auto_keeps_what_fits_into_the_free_memory(data: Path, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = msgspec.convert(config_of(data, activation_checkpointing="auto", batch_per_rank=64), Phase3Run)
    model = build_model(config)
    need = activation_gb(model.config, 64 * (2 + 5 * 16), 4)
    state = 16 * sum(parameter.numel() for parameter in model.parameters())
    for gb, chosen in ((need[False], False), (need["selective"], "selective"), (0.0, True)):
        free = SimpleNamespace(available=int(2 * gb * 1e9) + state + 1000)
        monkeypatch.setattr("psutil.virtual_memory", lambda: free)
        assert recomputation(config, model, alone)[0] == chosen
    fixed = msgspec.convert(config_of(data, activation_checkpointing="selective"), Phase3Run)
    assert recomputation(fixed, model, alone)[0] == "selective"


def test_toy_mice_are_the_same_for_the_same_seed(data: Path, tmp_path: Path, alone: World) -> None:
    make(tmp_path / "again", 4, 2, 16, 0)
    image = "sample_000003/images/cam_004.png"
    assert (tmp_path / "again" / image).read_bytes() == (data / image).read_bytes()
    with Image.open(data / image) as picture:
        rgba = np.asarray(picture)
    assert rgba.shape == (16, 16, 4) and not rgba[rgba[..., 3] == 0].any() and rgba[..., 3].max() > 200
    assert make(tmp_path / "again", 4, 2, 16, 0) is False
