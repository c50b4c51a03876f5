"""The run files of phase 3 that are experiments, test mode, and that no key is dead."""
from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from configs.fields import ResourcesOverride, Strict
from configs.keys import known_keys
from configs.load import ConfigError, dump, list_runs, load_run, load_stage, read_run
from configs.phase1 import Phase1Run
from configs.phase2 import Phase2Run
from configs.phase3 import Phase3Run
from configs.reconstruct import ReconstructRun

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("baseline", "exp_a", "exp_b", "exp_c")


def typed(name: str, *sets: str, stage: str = "phase3") -> Phase3Run | Phase1Run:
    found = load_run(load_stage(stage, Path.cwd()), name, list(sets), Path.cwd()).typed
    assert isinstance(found, (Phase3Run, Phase1Run))
    return found


def test_the_experiments_differ_in_what_they_are_about() -> None:
    runs = {name: typed(name) for name in EXPERIMENTS}
    assert [(run.training.input_views, run.training.losses.lpips, run.training.losses.perceptual)
            for run in runs.values()] == [(1, 1, 1), (1, 0, 1), (5, 1, 1), (5, 0, 0)]
    assert [run.training.optimizer.grad_clip for run in runs.values()] == [1, 1, 1, 0.5]
    same = [msgspec.structs.replace(
        run.training, input_views=1, losses=typed("exp_c").training.losses,
        optimizer=typed("exp_c").training.optimizer) for run in runs.values()]
    assert all(training == same[0] for training in same)
    assert {run.init_from for run in runs.values()} == {"gslrm/ckpt_0000000000021125.pt"}


def test_the_recommended_run_is_experiment_c_on_views_that_are_not_put_in() -> None:
    recommended, experiment = typed("recommended"), typed("exp_c")
    assert (recommended.training.targets, experiment.training.targets) == ("heldout", "all")
    assert msgspec.structs.replace(recommended.training, targets="all") == experiment.training


@pytest.mark.parametrize("name", sorted(list_runs("phase3", ROOT)))
def test_a_run_file_says_first_what_it_shows(name: str) -> None:
    first, second = (ROOT / f"configs/runs/phase3/{name}.yaml").read_text().splitlines()[:2]
    assert re.fullmatch("# .{30,}", first) and not second.startswith("#")
    assert typed(name)


@pytest.mark.parametrize("weights", ["perceptual_weights", "lpips_weights", "lpips_heads"])
def test_the_vgg_losses_take_their_files_by_set_and_name_the_key_without(weights: str) -> None:
    run = typed("baseline", f"training.losses.{weights}=random:0")
    assert getattr(run.training.losses, weights) == "random:0"
    with pytest.raises(ConfigError, match=f"losses.{weights} = None: the loss"):
        typed("baseline", f"training.losses.{weights}=null")


def test_test_mode_is_one_flag() -> None:
    phase3, phase1 = typed("recommended", "mode=test"), typed("mouse_mvdiffusion", "mode=test", stage="phase1")
    for run in (phase3, phase1):
        assert (run.training.max_steps, run.training.dataset.max_samples) == (10_000, 600)
    assert phase1.training.validation.steps == 25
    full = typed("recommended")
    assert (full.mode, full.training.max_steps, full.training.dataset.max_samples) == ("full", 20_000, None)


def test_test_mode_never_makes_a_run_longer_and_reads_back_the_same(tmp_path: Path) -> None:
    sets = ("mode=test", "training.max_steps=50", "training.dataset.max_samples=7", "training.validation.steps=4")
    run = load_run(load_stage("phase1", tmp_path), "demo", list(sets), tmp_path)
    training = run.data["training"]
    assert (training["max_steps"], training["dataset"]["max_samples"], training["validation"]["steps"]) == (50, 7, 4)
    (tmp_path / "config.yaml").write_text(dump(run.data))
    assert read_run(tmp_path / "config.yaml", Phase1Run) == msgspec.structs.replace(run.typed, resources=ResourcesOverride())


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="tst"):
        typed("demo", "mode=tst")


def test_activation_checkpointing_is_a_switch_or_a_word() -> None:
    found = [typed("demo", f"training.activation_checkpointing={word}").training.activation_checkpointing
             for word in ("true", "false", "selective", "auto")]
    assert found == [True, False, "selective", "auto"]
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        typed("demo", "training.activation_checkpointing=sometimes")


@pytest.mark.parametrize("schema", [Phase1Run, Phase2Run, Phase3Run, ReconstructRun])
def test_no_key_is_dead(schema: type[Strict]) -> None:
    """Every key is looked at somewhere in the work: one that is accepted and does nothing misleads."""
    text = "\n".join(path.read_text() for path in (ROOT / "jobs").rglob("*.py"))
    read = set(re.findall(r"\.(\w+)", text)) | set(re.findall(r'"(\w+)"', text))
    by_launch = {key for key in known_keys(schema) if key.startswith("resources")} | {"mode"}
    dead = [key for key in known_keys(schema) if key not in by_launch and key.rpartition(".")[2] not in read]
    assert not dead
