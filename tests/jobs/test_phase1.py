"""Phase 1 as a person runs it: what it leaves behind, what it refuses, and that a resume is exact."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from diffusers import AutoencoderKL, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from PIL import Image

from cluster.contract import RunDir, list_checkpoints, merged_metrics, read_json_lines, verify_checkpoint
from configs.phase1 import Phase1Run
from jobs.data.toy import make
from jobs.mv_components import load_components
from jobs.runtime import JobError
from models import rigs
from models.cameras import mv6
from models.mv_unet import load_unet
from models.mvdiffusion import MVDiffusionPipeline, without_progress_bars
from tests.helpers import TIMES
from tests.jobs.conftest import Start
from tests.jobs.small_phase1 import config_of

ROOT = Path(__file__).parents[2]
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "unet_ema/diffusion_pytorch_model.safetensors",
           "optimizer.safetensors", "vae/diffusion_pytorch_model.safetensors", "prompt_embeds.pt", "vae/config.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    make(out, 4, 3, 16, 0)
    return out


def run_phase1(start: Start, run: Path, config: dict, ranks: int = 1, attempt: int = 0, resume: Path | None = None) -> None:
    path = run.with_suffix(".json")
    path.write_text(json.dumps(config))
    RunDir(run).attempt(attempt).path.mkdir(parents=True)
    codes = start(run, ranks, attempt, resume, module="tests.jobs.small_phase1", argv=[str(path)])
    assert codes == [0] * ranks, output(run)


def output(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.parent.glob(f"{run.name}.out.*")))


@pytest.fixture(scope="module", params=[1, 2])
def reference(request: pytest.FixtureRequest, start: Start, data: Path,
              tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """(ranks, a finished run)."""
    run = tmp_path_factory.mktemp("reference") / "run"
    run_phase1(start, run, config_of(data), request.param)
    return request.param, run


@pytest.fixture(scope="module")
def finished(start: Start, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    run_phase1(start, run, config_of(data, reference_view_idx="random", precision="bf16", gradient_checkpointing=True))
    return run


def newest(run: Path) -> Path:
    return list_checkpoints(RunDir(run).checkpoints)[0]


def steps_of(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES}
            for line in merged_metrics(RunDir(run)) if "event" not in line]


# --- exactness ------------------------------------------------------------------------------------------------------

def test_a_resumed_run_is_the_uninterrupted_one(reference: tuple[int, Path], start: Start, data: Path, tmp_path: Path) -> None:
    ranks, whole = reference
    middle = next(path for path in list_checkpoints(RunDir(whole).checkpoints) if "00000004" in path.name)
    run = tmp_path / "run"
    run_phase1(start, run, config_of(data), ranks, attempt=1, resume=middle)
    assert "tiny autoencoder" in output(whole) and "tiny autoencoder" not in output(run)
    assert steps_of(run) == steps_of(whole)[4:]
    first, second = verify_checkpoint(newest(whole)).files, verify_checkpoint(newest(run)).files
    assert {name: first[name] for name in WEIGHTS} == {name: second[name] for name in WEIGHTS}
    evaluations = [[line for line in merged_metrics(RunDir(path)) if line.get("event") == "eval"][-1]["val/psnr"]
                   for path in (whole, run)]
    assert evaluations[0] == evaluations[1]


# --- what it leaves behind ------------------------------------------------------------------------------------------

def test_metrics_pictures_and_the_verdict(reference: tuple[int, Path]) -> None:
    _, path = reference
    run = RunDir(path)
    lines = list(read_json_lines(run.attempt(0).metrics))
    evaluations = [line for line in lines if line.get("event") == "eval"]
    assert [line["step"] for line in evaluations] == [0, 4, 8]
    assert {"val/psnr", "val/ssim", "val/psnr_copy", "val/psnr_white", "val/psnr_mean", "val/psnr_other", "val/psnr_vae",
            "val/diversity"} <= evaluations[0].keys()
    assert {"loss", "mse", "grad_norm", "applied"} <= lines[1].keys() | lines[2].keys()
    pictures = sorted(picture.name for picture in (run.artifacts / "validation").iterdir())
    assert pictures == ["step-00000000.png", "step-00000004.png", "step-00000008.png"]
    with Image.open(run.artifacts / "input_generated_truth.png") as picture:
        assert picture.size == (7 * 96, 3 * 2 * 96)
    verdict = json.loads((run.artifacts / "validation.json").read_bytes())
    assert [bar["beaten"] for bar in verdict["bars"]] == [bar["psnr"] > bar["bar"] for bar in verdict["bars"]]
    assert len(verdict["bars"]) == 3
    said = output(path)
    assert said.count("above ") >= 3 and "the mean training picture of each view" in said


def test_a_checkpoint_opens_with_plain_diffusers(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    folder = newest(finished)
    verify_checkpoint(folder)
    config = json.loads((folder / "unet" / "config.json").read_bytes())
    assert (config["attention"], config["num_views"], config["_class_name"]) == ("front_self", 6, "UNet2DConditionModel")
    ours = load_unet(folder / "unet").state_dict()
    plain = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", local_files_only=True)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items())
    average = UNet2DConditionModel.from_pretrained(folder, subfolder="unet_ema", local_files_only=True)
    assert any(not torch.equal(tensor, ours[name]) for name, tensor in average.state_dict().items())
    assert AutoencoderKL.from_pretrained(folder, subfolder="vae").config.scaling_factor != 0.18215
    with without_progress_bars():
        whole = StableUnCLIPImg2ImgPipeline.from_pretrained(folder, local_files_only=True)
    assert type(whole.unet) is UNet2DConditionModel
    assert torch.equal(whole.unet.conv_in.weight, plain.conv_in.weight)
    readme = (folder / "README.md").read_text()
    assert "single-view attention" in readme and "front_self" in readme


def test_a_checkpoint_carries_its_rig_prompts_and_settings(finished: Path) -> None:
    folder = newest(finished)
    about = json.loads((folder / "mvdiffusion.json").read_bytes())
    assert (about["attention"], about["snr_weighting"], about["image_size"], about["reference_view_idx"]) == (
        "front_self", "public", 16, "random")
    assert about["views"][:2] == ["front", "front_right"]
    state = json.loads((folder / "state.json").read_bytes())
    assert state["identity"]["rig"] == about["rig"] and state["identity"]["attention"] == "front_self"
    cameras = json.loads((folder / "opencv_cameras.json").read_bytes())
    assert [frame["w"] for frame in cameras["frames"]] == [16] * 6
    assert torch.load(folder / "prompt_embeds.pt", weights_only=True).shape == (6, 7, 16)


def test_checkpoints_share_the_files_that_do_not_change(finished: Path) -> None:
    folders = list_checkpoints(RunDir(finished).checkpoints)
    inodes = {(folder / "image_encoder" / "model.safetensors").stat().st_ino for folder in folders}
    assert len(folders) == 2 and len(inodes) == 1


def test_it_samples_with_the_averaged_weights(finished: Path) -> None:
    folder = newest(finished)
    prompts = torch.load(folder / "prompt_embeds.pt", weights_only=True)
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = {weights: MVDiffusionPipeline.from_pretrained(folder, weights)(picture, prompts, 2, 1.0, 0.0, 0, "pt")
             for weights in (None, "ema", "unet")}
    assert torch.equal(found[None], found["ema"]) and not torch.equal(found["ema"], found["unet"])


def test_another_run_starts_from_a_checkpoint(finished: Path, start: Start, data: Path, tmp_path: Path) -> None:
    folder, run = newest(finished), tmp_path / "run"
    run_phase1(start, run, {**config_of(data, max_steps=1), "pretrained": str(folder)})
    first = next(line for line in read_json_lines(RunDir(run).attempt(0).metrics) if line.get("event") == "eval")
    last = [line for line in read_json_lines(RunDir(finished).attempt(0).metrics) if line.get("event") == "eval"][-1]
    assert first["step"] == 0 and abs(first["val/psnr"] - last["val/psnr"]) < 0.2  # bf16 there, fp32 here
    assert verify_checkpoint(newest(run)).files["vae/config.json"] == verify_checkpoint(folder).files["vae/config.json"]
    assert not os.path.samefile(newest(run) / "vae/config.json", folder / "vae/config.json")


# --- mistakes ------------------------------------------------------------------------------------------------------

def mistake(tmp_path: Path, config: dict) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    done = subprocess.run([sys.executable, "-m", "jobs.phase1", str(path)], cwd=tmp_path, text=True, capture_output=True,
                          timeout=200, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert sorted(item.name for item in tmp_path.iterdir() if item.suffix != ".pt") == ["config.yaml"]
    return done.stderr


@pytest.mark.parametrize(("change", "said"), [
    ({"max_stepz": 8}, "max_stepz"),
    ({"condition_dropout": 0.4}, "at most 1/3"),
    ({"validation": {"path": "x", "lpips_weights": "random:0"}}, "LPIPS needs both files"),
    ({"reference_view_idx": 6}, "there is no view 6: the rig has 6 views, 0 to 5"),
])
def test_a_mistake_in_the_config_is_one_block(data: Path, tmp_path: Path, change: dict, said: str) -> None:
    assert said in mistake(tmp_path, config_of(data, **change))


def test_a_folder_that_is_not_there_is_named(data: Path, tmp_path: Path) -> None:
    said = mistake(tmp_path, {**config_of(data), "pretrained": "gone/pipeckpts"})
    assert "pretrained: gone/pipeckpts: there is no such folder" in said


def test_prompts_of_another_text_encoder_are_refused_with_the_reason(data: Path, tmp_path: Path) -> None:
    torch.save(torch.zeros(6, 77, 768, dtype=torch.float16), tmp_path / "clr_embeds.pt")
    said = mistake(tmp_path, {**config_of(data), "prompt_embeds": str(tmp_path / "clr_embeds.pt")})
    assert "768 wide, the UNet's cross-attention takes 16" in said and "the wrong text encoder" in said


def test_prompts_of_another_rig_are_refused(data: Path, tmp_path: Path) -> None:
    torch.save(torch.zeros(6, 7, 16), tmp_path / "other.pt")
    turned = replace(mv6(16), names=(*mv6(16).names[1:], "front"))
    (tmp_path / "other.json").write_text(json.dumps({"rig": rigs.to_record(turned)}))
    config = {**config_of(data), "prompt_embeds": str(tmp_path / "other.pt")}
    with pytest.raises(JobError, match="belong to another rig"):
        load_components(msgspec.convert(config, Phase1Run), None, mv6(16))


def test_an_autoencoder_that_is_too_poor_stops_the_run(start: Start, data: Path, tmp_path: Path) -> None:
    config = config_of(data)
    config["model"]["tiny"]["vae"]["min_psnr"] = 28
    path, run = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(config))
    RunDir(run).attempt(0).path.mkdir(parents=True)
    assert start(run, 2, module="tests.jobs.small_phase1", argv=[str(path)]) == [1, 1]
    said = output(run)
    assert said.count("error: the autoencoder reconstructs the validation pictures with") == 1
    assert "model.tiny.vae.min_psnr is 28" in said and not list_checkpoints(RunDir(run).checkpoints)
