"""What CLAP2Diffusion promises, each promise a test that fails on the defect it names. The gate and the encoding of
batches: tests/models/test_clap2diffusion.py; dead and leaking tensors: tests/jobs/test_trainer_decisions.py."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from cluster.contract import RunDir, list_checkpoints, merged_metrics, verify_checkpoint
from configs.errors import ConfigError
from configs.load import load_run, load_stage
from configs.pipeline import load_pipeline
from jobs.clap_components import load_checkpoint, read_about
from jobs.clap_metrics import scores
from jobs.clap_pictures import Painter
from jobs.clap_stage import TRAINED, ClapStage
from jobs.clap_validation import Grid, bootstrap, other_sounds, summary
from jobs.data.audio import read_audio
from jobs.data.clips import Clips, read_clips
from jobs.data.sounds import make
from jobs.loader import Draw
from jobs.metrics import Metrics
from jobs.runtime import JobError
from jobs.world import World
from models.audio_attention import FixedGates
from tests.helpers import TIMES
from tests.jobs.conftest import Start
from tests.jobs.small_clap import config_of

ROOT = Path(__file__).parents[2]
STAGES = ("clap1", "clap2", "clap3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sounds") / "set"
    make(out, {"train": 12, "val": 8}, 16, 16_000, 1.0, 0)
    return out


def run(start: Start, stage: str, directory: Path, config: dict, ranks: int = 1, attempt: int = 0,
        resume: Path | None = None, fault: str = "", *argv: str) -> int:
    """The exit code of rank 0."""
    path = directory.with_suffix(f".{attempt}.json")
    path.write_text(json.dumps(config))
    RunDir(directory).attempt(attempt).path.mkdir(parents=True)
    return start(directory, ranks, attempt, resume, fault, module="tests.jobs.small_clap", argv=[stage, str(path), *argv])[0]


def output(directory: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(directory.parent.glob(f"{directory.name}.out.*")))


def newest(directory: Path) -> Path:
    return list_checkpoints(RunDir(directory).checkpoints)[0]


def evaluations(directory: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key.startswith("val/")}
            for line in merged_metrics(RunDir(directory)) if line.get("event") == "eval"]


def steps_of(directory: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES}
            for line in merged_metrics(RunDir(directory)) if "event" not in line]


@pytest.fixture(scope="module")
def chain(start: Start, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each stage, each from the one before."""
    runs: dict[str, Path] = {}
    for stage in STAGES:
        runs[stage] = tmp_path_factory.mktemp("chain") / stage
        before = newest(list(runs.values())[-2]) if len(runs) > 1 else None
        assert run(start, stage, runs[stage], config_of(stage, data, before)) == 0, output(runs[stage])
    return runs


# --- 1: a batch of clips --------------------------------------------------------------------------------------------

def test_a_batch_of_clips_is_encoded_as_each_alone(chain: dict[str, Path], data: Path) -> None:
    conditioning = load_checkpoint(newest(chain["clap1"]), None, None, print).conditioning
    sounds = [read_audio(clip.audio, 16_000) for clip in read_clips(data, "val")]
    together = conditioning.embed(conditioning.mel(sounds))
    alone = torch.cat([conditioning.embed(conditioning.mel([sound])) for sound in sounds])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.pdist(together).min() > 1e-3  # distinct clips, distinct embeddings
    assert together.norm(dim=1).tolist() == pytest.approx([1.0] * len(sounds))


# --- 2, 3: what trains ----------------------------------------------------------------------------------------------

def test_each_stage_trains_what_it_says_in_fp32_and_only_that_changes(chain: dict[str, Path]) -> None:
    for before, stage in zip(STAGES, STAGES[1:]):
        first, second = (load_file(newest(chain[name]) / "model.safetensors") for name in (before, stage))
        assert {tensor.dtype for tensor in second.values()} == {torch.float32}
        for name, tensor in first.items():
            trained = any(word in name for word in TRAINED[stage])
            assert torch.equal(tensor, second[name]) is not trained, f"{stage}: {name}"


def test_the_gates_learn_at_their_own_rate(chain: dict[str, Path], alone: World, data: Path, tmp_path: Path) -> None:
    stage = as_stage(chain["clap2"], "clap2", data, alone, tmp_path)
    rates = {name: stage.learning(name, parameter) for module, owner in stage.modules.items()
             for name, parameter in ((f"{module}.{key}", value) for key, value in owner.named_parameters())}
    own = {name for name, rate in rates.items() if rate.lr is not None}
    assert own == {name for name in rates if name.endswith(".gate")} and {rates[name].weight_decay for name in own} == {0.0}


def as_stage(directory: Path, name: str, data: Path, world: World, tmp_path: Path) -> ClapStage:
    from configs.clap import Training

    loaded = load_checkpoint(newest(directory), None, None, print)
    clips = clips_of(loaded, data, "train")
    grid = Grid(loaded, clips_of(loaded, data, "val"), Training(max_steps=1).validation, False, world)
    return ClapStage(name, Training(max_steps=1), loaded, clips, grid, world, Metrics(1), {}, {}, tmp_path)


def clips_of(loaded: object, data: Path, split: str) -> Clips:
    recipe = loaded.about.recipe
    return Clips(read_clips(data, split), recipe.rate, recipe.seconds, loaded.about.image_size, 0, loaded.conditioning.mel)


# --- 5: updates -----------------------------------------------------------------------------------------------------

def test_a_rest_of_passes_is_an_update_and_the_schedule_ends(start: Start, data: Path, chain: dict[str, Path], tmp_path: Path) -> None:
    config = config_of("clap3", data, newest(chain["clap2"]), training={"max_steps": 5, "accumulation": 2})
    assert run(start, "clap3", tmp_path / "run", config) == 0, output(tmp_path / "run")
    report = json.loads((tmp_path / "run/artifacts/report.json").read_bytes())
    assert (report["step"], report["applied"], report["updates"]) == (5, 3, 3)


# --- 6: a stage starts from the one before, LoRA included --------------------------------------------------------------

@pytest.mark.parametrize(("before", "stage"), [("clap1", "clap2"), ("clap2", "clap3")])
def test_a_stage_begins_with_the_very_evaluation_that_the_one_before_ended_with(chain: dict[str, Path], before: str, stage: str) -> None:
    assert evaluations(chain[stage])[0] == evaluations(chain[before])[-1]
    assert evaluations(chain[stage])[0]["val/matched"] != evaluations(chain[stage])[-1]["val/matched"]
    if stage == "clap3":
        lora = {name: tensor for name, tensor in load_file(newest(chain[stage]) / "model.safetensors").items() if "lora_B" in name}
        assert lora and all(tensor.abs().max() > 0 for tensor in lora.values())


def test_a_lora_written_here_loads_into_plain_diffusers(chain: dict[str, Path], data: Path) -> None:
    loaded = load_checkpoint(newest(chain["clap2"]), None, None, print)
    torch.manual_seed(0)
    given = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 700]), "encoder_hidden_states": torch.randn(2, 5, 16)}
    plain = UNet2DConditionModel.from_pretrained(newest(chain["clap2"]) / "base/unet").eval()
    with torch.no_grad():
        base = plain(**given).sample
        plain.load_lora_adapter(chain["clap2"] / "artifacts/lora", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        plain.eval()  # a new LoRA begins with its dropout on
        ours = loaded.frozen.unet.eval()(**given).sample
        assert torch.allclose(plain(**given).sample, ours, atol=1e-6) and not torch.allclose(base, ours, atol=1e-6)


@pytest.mark.parametrize("stage", ["clap2", "clap3"])
def test_a_stage_before_that_has_not_learned_to_listen_is_refused(start: Start, data: Path, chain: dict[str, Path], tmp_path: Path, stage: str) -> None:
    before = newest(chain[STAGES[STAGES.index(stage) - 1]])
    config = config_of(stage, data, before, force=False)
    config["training"]["validation"]["seed"] = deaf_seed(before, data)
    directory = tmp_path / "run"
    assert run(start, stage, directory, config) == 4
    assert "has not learned to listen" in output(directory) and "--force" in output(directory)
    assert not list(RunDir(directory).checkpoints.glob("step-*"))
    assert run(start, stage, directory, config, 1, 1, None, "", "--force") == 0, output(directory)


def deaf_seed(checkpoint: Path, data: Path) -> int:
    """A seed of the grid with which this hardly trained model has no paired gap."""
    from configs.clap import Validation

    loaded = load_checkpoint(checkpoint, None, None, print)
    loaded.parts.eval()
    loaded.projector.eval()
    for seed in range(20):
        grid = Grid(loaded, clips_of(loaded, data, "val"), Validation(max_items=8, timesteps=2, resamples=50, seed=seed), False,
                    World(0, 1, torch.device("cpu")))
        if grid.evaluate(lambda: False)["val/gap_low"] <= 0:
            return seed
    raise AssertionError("the tiny model listens with every seed")


# --- 7: a resume is the uninterrupted run -----------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_it_is_the_uninterrupted_run(start: Start, data: Path, chain: dict[str, Path], tmp_path: Path, stage: str) -> None:
    before = newest(chain[STAGES[STAGES.index(stage) - 1]]) if stage != "clap1" else None
    directory, config = tmp_path / "run", config_of(stage, data, before)
    assert run(start, stage, directory, config, fault="KILL:6") == -9
    checkpoint = newest(directory)
    assert checkpoint.name == "step-00000004-a000"
    assert run(start, stage, directory, config, attempt=1, resume=checkpoint) == 0, output(directory)
    assert "a tiny one is made" not in output(directory)
    assert steps_of(directory) == steps_of(chain[stage])
    assert evaluations(directory) == evaluations(chain[stage])
    first, second = (verify_checkpoint(newest(one)).files for one in (chain[stage], directory))
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["optimizer.safetensors"] == second["optimizer.safetensors"]
    assert first["base/unet/diffusion_pytorch_model.safetensors"] == second["base/unet/diffusion_pytorch_model.safetensors"]


def test_two_ranks_with_half_the_batch_train_what_one_trains(start: Start, data: Path, chain: dict[str, Path], tmp_path: Path) -> None:
    """At the same global batch, over the same base model, without dropout."""
    made = newest(chain["clap1"])
    found = []
    for ranks in (1, 2):
        config = config_of("clap1", data, training={"batch_per_rank": 4 // ranks, "audio_dropout": 0.2})
        config |= {"base_model": str(made / "base"), "clap_model": str(made / "clap"), "seconds": 1.0}
        config["model"]["dropout"] = 0.0
        directory = tmp_path / f"ranks-{ranks}"
        assert run(start, "clap1", directory, config, ranks) == 0, output(directory)
        found.append((load_file(newest(directory) / "model.safetensors"), steps_of(directory)))
    (one, alone_), (two, both) = found
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert [line["loss"] for line in alone_] == pytest.approx([line["loss"] for line in both], abs=1e-5)
    start_ = load_file(made / "model.safetensors")
    assert max((one[name] - start_[name]).abs().max() for name in one) > 1e-3  # it did train


# --- 8: the fixed grid ------------------------------------------------------------------------------------------------

def test_the_other_sound_is_always_of_another_class() -> None:
    labels = ["a"] * 9 + ["b"] * 3 + ["c"]
    for seed in range(5):
        assert all(labels[index] != labels[other] for index, other in enumerate(other_sounds(labels, seed)))
        partners = other_sounds([None] * 7, seed)
        assert sorted(partners) == list(range(7)) and all(index != other for index, other in enumerate(partners))
    with pytest.raises(JobError, match="all items of validation are of the class 'a'"):
        other_sounds(["a", "a"], 0)
    with pytest.raises(JobError, match="two items"):
        other_sounds(["a"], 0)


def test_the_difference_is_paired_and_its_bound_tells_chance_from_learning() -> None:
    """Item losses that differ a hundred times more among each other than with their sound."""
    random = np.random.default_rng(0)
    items = random.uniform(0.1, 1.0, 64)
    gain = random.normal(0.002, 0.004, 64)
    found = summary(np.stack([items, items + gain, items + random.normal(0, 0.004, 64)], 1), 2000, 0)
    assert 0 < found["val/gap_low"] < found["val/gap"] < found["val/gap_high"]
    assert found["val/gap"] == pytest.approx(gain.mean()) and found["val/win"] == (gain > 0).mean()
    assert found["val/null_gap_low"] < 0
    assert found["val/score"] == -items.mean()
    unpaired = bootstrap(random.permutation(items + gain) - items, 2000, 0)
    assert unpaired.low < 0  # what a comparison of means would have to show


def test_the_grid_is_fixed_and_deaf_gates_hear_no_difference(chain: dict[str, Path], data: Path, alone: World) -> None:
    from configs.clap import Validation

    loaded = load_checkpoint(newest(chain["clap2"]), None, None, print)
    loaded.parts.eval()
    loaded.projector.eval()
    grid = Grid(loaded, clips_of(loaded, data, "val"), Validation(timesteps=2), False, alone)
    first = grid.losses()
    assert np.array_equal(first, grid.losses()) and first.shape == (8, 3)
    assert not np.array_equal(first[:, 0], first[:, 1]) and not np.array_equal(first[:, 0], first[:, 2])
    with FixedGates(loaded.frozen.unet, 0.0):
        deaf = grid.losses()
    assert np.array_equal(deaf[:, 0], deaf[:, 1]) and np.array_equal(deaf[:, 0], deaf[:, 2])
    assert np.array_equal(grid.losses(), first)  # the gates are what they were


# --- 9, 10: the sweep, and one conditioning for training and generation -------------------------------------------------

def test_an_evaluation_sweeps_the_gates_and_holds_pictures_against_shuffled_sounds(start: Start, data: Path, chain: dict[str, Path], tmp_path: Path) -> None:
    config = {"data": str(data), "checkpoint": str(newest(chain["clap3"])), "precision": "fp32", "split": "val",
              "grid": {"timesteps": 2, "resamples": 50}, "sampling": {"steps": 2, "guidance": [1, 7.5]}}
    directory = tmp_path / "run"
    assert run(start, "clap_evaluate", directory, config) == 0, output(directory)
    found = json.loads((directory / "artifacts/evaluation.json").read_bytes())
    assert [row["gate"] for row in found["gate_sweep"]] == [0, 0.1, 0.4, 1]
    assert found["gate_sweep"][0]["val/gap"] == found["gate_sweep"][0]["val/null_gap"] == 0
    assert abs(found["gate_sweep"][3]["val/null_gap"]) > 0
    entry = found["guidance"][1]
    assert {"AIS", "IIS", "AIC", "R@1", "R@5", "FID"} <= entry["scores"].keys() == entry["scores_shuffled"].keys()
    assert entry["accuracy"]["low"] <= entry["accuracy"]["value"] <= entry["accuracy"]["high"]
    said = output(directory)
    for bar in found["bars"]:
        assert f"{bar['what']}: {bar['value']:.4g}" in said and ("reached" in said)
    assert (directory / "artifacts/pictures.png").stat().st_size > 500


def test_generation_hears_what_training_heard(start: Start, data: Path, chain: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = newest(chain["clap3"])
    painter = Painter(checkpoint, None, None, "fp32")
    clip = read_clips(data, "val")[3]
    clips = clips_of(painter.loaded, data, "val")
    assert torch.equal(painter.hear(clip.audio)[0], painter.loaded.conditioning.embed(clips.batch([Draw(0, 3)]).features)[0])
    recipes = [read_about(newest(chain[stage])).recipe for stage in STAGES]
    assert recipes[0] == recipes[1] == recipes[2] and recipes[0].clap and recipes[0].tokens == 2
    config = {"checkpoint": str(checkpoint), "audio": str(clip.audio), "steps": 2, "precision": "fp32"}
    pictures = []
    for number, flags in enumerate(([], ["--prompt", "disc", "--seed", "0"], [])):
        directory = tmp_path / f"run-{number}"
        assert run(start, "clap_generate", directory, config, 1, 0, None, "", *flags) == 0, output(directory)
        pictures.append((directory / "artifacts/picture.png").read_bytes())
    assert pictures[0] == pictures[2] != pictures[1]
    said = json.loads((tmp_path / "run-1/artifacts/picture.json").read_bytes())
    assert said["prompt"] == "disc" and said["recipe"]["clap"] == recipes[0].clap and len(said["audio_sha256"]) == 64


def test_a_checkpoint_refuses_another_base_or_audio_tower(chain: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = newest(chain["clap1"])
    other = UNet2DConditionModel.from_pretrained(checkpoint / "base/unet")
    for name in ("tokenizer", "text_encoder", "scheduler"):
        (tmp_path / name).symlink_to(checkpoint / "base" / name)
    with torch.no_grad():
        other.conv_in.bias += 1
    other.save_pretrained(tmp_path / "unet")
    with pytest.raises(JobError, match="trained around another base model"):
        load_checkpoint(checkpoint, str(tmp_path), None, print)
    with pytest.raises(JobError, match="clap_model: .*cannot be read"):
        load_checkpoint(checkpoint, None, str(tmp_path), print)


# --- 11: the whole chain's configs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["demo", "clap2diffusion"])
def test_the_configs_of_the_chain_are_whole(name: str) -> None:
    members = load_pipeline(load_stage("clap", ROOT), name, ["data=/data/vggsound"], ROOT)
    resolved = {member.label: load_run(member.stage, member.config, list(member.sets), ROOT) for member in members}
    assert list(resolved) == [*STAGES, "evaluate"]
    assert {run.data["data"] for run in resolved.values()} == {"/data/vggsound"}
    assert resolved["clap3"].data["init_from"] == "${clap2.checkpoints.best}"
    if name == "clap2diffusion":
        assert [resolved[stage].data["training"]["optimizer"]["lr"] for stage in STAGES] == [1e-4, 5e-5, 1e-2]


@pytest.mark.parametrize(("change", "said"), [
    ("clap3.training.max_steps=many", "whole number"), ("clap1.model.gate=0", "only the gates have a gradient"),
    ("clap2.lora.rnk=4", "lora.rank"), ("clap1.clap_model=null", "needs a folder"),
    ("clap3.target_gate=[0.5,0.4]", "is above")])
def test_a_mistake_in_any_stage_is_found_before_the_first_begins(change: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        for member in load_pipeline(load_stage("clap", ROOT), "clap2diffusion", [change], ROOT):
            load_run(member.stage, member.config, list(member.sets), ROOT)
    assert said in str(caught.value)


# --- measures -------------------------------------------------------------------------------------------------------

def test_scores_are_high_for_what_belongs_together_and_at_chance_for_what_does_not() -> None:
    torch.manual_seed(0)
    classes = torch.eye(4).repeat(6, 1) + 0.05 * torch.rand(24, 4)
    found = scores(classes, classes + 0.01 * torch.rand(24, 4), classes, 200, 0)
    assert found["AIC"]["value"] == 1 and found["AIS"]["value"] > 0.9 and found["IIS"]["value"] > 0.9
    assert found["R@5"]["value"] > found["R@1"]["value"] > 3 * found["R@1"]["chance"] and found["FID"]["value"] < 0.01
    strange = scores(classes, torch.rand(24, 4), classes, 200, 0)
    assert strange["AIS"]["value"] == pytest.approx(0.5, abs=0.15) and strange["AIC"]["value"] < 0.6
    assert strange["FID"]["value"] > found["FID"]["value"]
