"""Weights held against the networks of a config before a run starts: on the meta device, by the loaders themselves."""
from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.contract import RunDir, list_checkpoints
from configs.schema import SCHEMAS
from configs.yaml12 import dump
from jobs.data import identities, sounds, toy
from jobs.preflight import _filled
from jobs.preflight_env import Found
from jobs.preflight_model import look, needs
from jobs.preflight_networks import Networks
from models.cameras import mv6
from models.gslrm import GSLRM, GSLRMConfig
from tests.jobs import small_clap, small_face_voice, small_phase1, test_phase3
from tests.jobs.conftest import Start
from tests.jobs.small_chain import make_generator, make_reconstructor, phase2_of

SIZES = {"d": 32, "d_head": 16, "n_layer": 1, "patch_size": 4, "image_size": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    toy.make(out, 4, 2, 16, 0)
    return out


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_generator(tmp_path_factory.mktemp("generator") / "step-00000008-a000")


def looked(schema: str, config: dict[str, Any], resume: Path | None = None) -> list[Found]:
    return look(schema, msgspec.convert(config, SCHEMAS[schema]), resume).found


def only(found: list[Found]) -> Found:
    [one] = found
    return one


def phase3(data: Path, **changes: Any) -> dict[str, Any]:
    return {"model": SIZES, "training": {"dataset": {"path": str(data / "data_train.txt")}, "max_steps": 8,
                                         "validation": {"path": str(data / "data_val.txt")}}, **changes}


@pytest.mark.parametrize("public", [False, True])
def test_another_size_is_named_by_its_key(data: Path, tmp_path: Path, public: bool) -> None:
    weights = tmp_path / "ckpt.pt" if public else make_reconstructor(tmp_path / "step-00000008-a000", mv6(16).fingerprint)
    if public:
        model = GSLRM(GSLRMConfig(d=32, d_head=16, n_layer=1, patch_size=4))
        torch.save({"model": {f"module.{name}": tensor for name, tensor in model.state_dict().items()} |
                    {"loss_calculator.x": torch.zeros(3)}}, weights)
    assert looked("phase3", phase3(data, init_from=str(weights))) == []
    other = phase3(data, init_from=str(weights), model={**SIZES, "n_layer": 2, "d": 64})
    one = only(looked("phase3", other))
    assert (one.check, one.severity, one.where) == ("checkpoint", "error", "init_from")
    assert "transformer_layers.1." in one.what and len(one.what) < 2000
    assert one.fix == "--set model.d=32 --set model.n_layer=1"
    assert one.what.splitlines()[0] == ("model.d is 64 here and 32 in the weights; model.n_layer is 2 here and 1 in the "
                                        f"weights: {one.fix}")


def test_a_checkpoint_to_resume_from_is_compared_whole(data: Path, tmp_path: Path) -> None:
    """Weights, moments, identity; what differs is told by the run that it lies in."""
    saved = tmp_path / "checkpoints/step-00000008-a000"
    make_reconstructor(saved, mv6(16).fingerprint)
    RunDir(tmp_path).attempt(0).path.mkdir(parents=True)
    RunDir(tmp_path).attempt(0).config.write_text(dump(phase3(data)))
    weights = load_file(saved / "model.safetensors")
    moments = {f"{name}.{key}": torch.zeros_like(tensor) if key != "step" else torch.zeros(())
               for name, tensor in weights.items() for key in ("step", "exp_avg", "exp_avg_sq")}
    save_file(moments, saved / "optimizer.safetensors")
    assert looked("phase3", phase3(data), saved) == []
    one = only(looked("phase3", phase3(data, model={**SIZES, "n_layer": 3}), saved))
    assert one.where == "resume" and "optimizer:" in one.what and one.fix == "--set model.n_layer=1"
    assert one.what.startswith("model.n_layer is 3 here and 1 in the weights: --set model.n_layer=1\n")
    (saved / "state.json").write_text(json.dumps({"identity": {"rig": "a" * 64}}))
    rig = only(looked("phase3", phase3(data), saved))
    assert rig.check == "rig" and f"its rig is {'a' * 64}, this run's is {mv6(16).fingerprint}" in rig.what


def test_a_generator_and_its_prompts(data: Path, generator: Path, tmp_path: Path) -> None:
    config = phase2_of(data, generator)
    assert looked("phase2", config) == []
    again = make_generator(tmp_path / "step-00000008-a000")
    unet = again / "unet_ema/diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    save_file({name: tensor for name, tensor in tensors.items() if name != "conv_out.bias"} |
              {"conv_in.weight": torch.zeros(16, 8, 5, 5)}, unet)
    torch.save(torch.randn(6, 7, 768), tmp_path / "prompts.pt")
    one = only(looked("phase2", phase2_of(data, again)))
    assert "1 missing: conv_out.bias; 1 of another shape: conv_in.weight [16, 8, 5, 5], here [16, 8, 3, 3]" in one.what
    wide = phase2_of(data, generator, generator={"prompt_embeds": str(tmp_path / "prompts.pt")})
    assert "768 wide, the UNet's cross-attention takes 16" in only(looked("phase2", wide)).what


def test_a_frozen_part_that_is_not_whole(data: Path, generator: Path, tmp_path: Path) -> None:
    again = make_generator(tmp_path / "step-00000008-a000")
    file = next((again / "image_encoder").glob("*.safetensors"))
    tensors = load_file(file)
    gone = next(name for name in tensors if "layer_norm1.weight" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, {"format": "pt"})
    run = {**small_phase1.config_of(data), "pretrained": str(again)}
    one = only(looked("phase1", run))
    assert one.where == "pretrained" and "1 missing" in one.what and "image_encoder" in one.what
    assert looked("phase1", {**run, "pretrained": str(generator)}) == []
    assert looked("phase1", {**run, "pretrained": "${phase0.checkpoints.best}"}) == []  # not there yet


def test_towers_of_a_folder(tmp_path: Path) -> None:
    small_face_voice.tower_folders(tmp_path, 16, 1, 16, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
                                   {"sampling_rate": 8000, "do_normalize": True})
    config = small_face_voice.config_of(tmp_path)
    config["model"] |= {"face": {"kind": "vit", "path": str(tmp_path / "vit")},
                        "voice": {"kind": "wav2vec2", "path": str(tmp_path / "w2v")}}
    assert looked("face-voice", config) == []
    tensors = load_file(tmp_path / "vit/model.safetensors")
    tensors.pop("embeddings.cls_token")
    save_file(tensors, tmp_path / "vit/model.safetensors", {"format": "pt"})
    one = only(looked("face-voice", config))
    assert one.where == "model.face.path" and "lacks 1 weights of its vit: embeddings.cls_token" in one.what


def test_weights_that_are_something_else(data: Path, tmp_path: Path) -> None:
    """Nobody is advised to run what is in them."""
    (tmp_path / "ckpt.pt").write_bytes(b"garbage " * 99)
    one = only(looked("phase3", phase3(data, init_from=str(tmp_path / "ckpt.pt"))))
    assert "not a torch file of plain tensors" in one.what and "weights_only" not in one.what


def test_a_batch_larger_than_what_there_is_to_train_on(tmp_path: Path) -> None:
    def told(data: dict[str, Any], batch: int) -> list[Found]:
        config = small_face_voice.config_of(tmp_path, batch=batch) | {"data": data}
        return list(_filled(msgspec.convert(config, SCHEMAS["face-voice"])))

    made = {"procedural": {"identities": 24, "media": 2}}
    one = only(told(made, 4096))
    pairs = int(re.search(r"only (\d+) to train on", one.what)[1])
    assert one.severity == "error" and 4 < pairs < 48 and one.fix.startswith("--set training.batch=")
    identities.make(tmp_path / "made", 24, 2, 16, 8000, 0)  # as the job will
    there = {"voxceleb": str(tmp_path / "made")}
    assert f"only {pairs} to" in only(told(there, pairs + 1)).what and told(there, pairs) == told(made, pairs) == []


def test_what_is_counted_for_the_memory(data: Path) -> None:
    """At full size, without its weights: the public GS-LRM has 303,565,824."""
    began = time.monotonic()
    full = phase3(data, model={})
    networks = look("phase3", msgspec.convert(full, SCHEMAS["phase3"]), None).networks
    assert networks is not None and time.monotonic() - began < 5
    least, saved, words = needs(networks)
    assert least * 2**20 == pytest.approx(303_565_824 * 16 + networks.activations_gb * 1e9)
    assert saved == pytest.approx(303_565_824 * 12, rel=1e-6) and words.startswith("303.6 M trained weights")
    frozen = Networks(frozen=(torch.nn.Linear(10, 10),))
    assert needs(frozen)[:2] == (440 / 2**20, 0.0)


# --- what real runs left --------------------------------------------------------------------------------------------

def trained(start: Start, at: Path, schema: str, config: dict[str, Any], module: str, *argv: str) -> Path:
    """Train -> its newest checkpoint."""
    RunDir(at).attempt(0).path.mkdir(parents=True)
    (at / "config.yaml").write_text(dump(config))
    assert start(at, 1, module=module, argv=[*argv, str(at / "config.yaml")]) == [0], schema
    return list_checkpoints(RunDir(at).checkpoints)[0]


@pytest.mark.campaign
def test_what_trainers_leave_fits_them(start: Start, data: Path, tmp_path: Path) -> None:
    people, clips = tmp_path / "people", tmp_path / "set"
    identities.make(people, 20, 3, 16, 8000, 0)
    sounds.make(clips, {"train": 12, "val": 8}, 16, 16_000, 1.0, 0)
    left = {}
    for schema, module, config in (
            ("phase3", "jobs.phase3", test_phase3.config_of(data)),
            ("phase1", "tests.jobs.small_phase1", small_phase1.config_of(data)),
            ("face-voice", "tests.jobs.small_face_voice", small_face_voice.config_of(people))):
        left[schema] = trained(start, tmp_path / schema, schema, config, module)
        assert looked(schema, config, left[schema]) == [], schema
    config = small_face_voice.config_of(people, freeze="all")  # its towers are in no checkpoint
    heads = trained(start, tmp_path / "heads", "face-voice", config, "tests.jobs.small_face_voice")
    assert looked("face-voice", config, heads) == []
    other = {**config, "training": {**config["training"], "seed": 1}}  # of which tiny towers are a function
    assert "its face tower is" in only(looked("face-voice", other, heads)).what
    before = None
    for stage in ("clap1", "clap2", "clap3"):
        config = small_clap.config_of(stage, clips, before)
        assert looked(stage, config) == []
        before = trained(start, tmp_path / stage, stage, config, "tests.jobs.small_clap", stage)
        assert looked(stage, config, before) == [], stage
    told = only(looked("clap3", {**config, "training": {**config["training"], "prompt": "text"}}, before))
    assert "its prompt is empty, this run's is text" in told.what
    assert looked("clap-evaluate", {"data": str(clips), "checkpoint": str(before)}) == []
    assert looked("face-voice-eval", {"checkpoint": str(left["face-voice"])}) == []
    assert looked("phase2", phase2_of(data, left["phase1"])) == []
    picture = next(data.glob("*/images/*.png"))
    assert looked("reconstruct", {"input_image": str(picture), "generator": {"checkpoint": str(left["phase1"])},
                                  "reconstructor": {"checkpoint": str(left["phase3"])}}) == []
