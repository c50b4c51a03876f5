"""The run files of phase 1: what is shipped, and the mistakes that the schema knows."""
from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import ConfigError, dump, load_run, load_stage, read_run
from configs.phase1 import Phase1Run


def typed(name: str, *sets: str) -> Phase1Run:
    found = load_run(load_stage("phase1", Path.cwd()), name, list(sets), Path.cwd()).typed
    assert isinstance(found, Phase1Run)
    return found


def test_the_full_size_run_says_what_the_method_asks_for() -> None:
    mouse = typed("mouse_mvdiffusion")
    training, validation = mouse.training, mouse.training.validation
    assert (mouse.model.image_size, mouse.model.attention, training.max_steps) == (512, "front_self", 30000)
    assert (training.condition_dropout, training.snr_weighting, training.snr_gamma) == (0.05, "public", 5.0)
    assert (training.ema_max_decay, training.optimizer.grad_clip, training.reference_view_idx) == (0.9999, 1.0, 0)
    assert (validation.steps, validation.guidance, validation.eta) == (50, 3.0, 1.0)
    assert (training.optimizer.beta1, training.optimizer.beta2, training.precision) == (0.9, 0.999, "bf16")
    test = typed("mouse_test").training
    assert (test.max_steps, test.validation.steps) == (10000, 25)


def test_the_demo_is_the_same_method_small() -> None:
    demo = typed("demo")
    training = demo.training
    assert (demo.model.image_size, demo.model.tiny.unet.channels, demo.model.attention) == (32, (32, 64, 64), "front_self")
    assert (demo.model.tiny.prediction_type, demo.model.tiny.vae.min_psnr) == ("v_prediction", 28)
    assert (training.validation.steps, training.validation.guidance, training.optimizer.lr) == (20, 1, 1e-3)
    assert training.batch_per_rank * 2 == 4  # two ranks


def test_the_data_of_the_mouse_pipeline_come_by_set_keys() -> None:
    run = load_run(load_stage("phase1", Path.cwd()), "mouse_mvdiffusion", ["pretrained=/data/pipeckpts"], Path.cwd())
    assert set(run.path_keys) == {"pretrained", "prompt_embeds", "training.dataset.path", "training.validation.path"}
    assert run.set_path_keys == ("pretrained",)
    assert "pretrained" not in load_run(load_stage("phase1", Path.cwd()), "demo", [], Path.cwd()).path_keys


def test_a_resolved_run_reads_back_the_same(tmp_path: Path) -> None:
    run = load_run(load_stage("phase1", tmp_path), "demo", ["training.reference_view_idx=[0, 3]"], tmp_path)
    (tmp_path / "config.yaml").write_text(dump(run.data))
    again = read_run(tmp_path / "config.yaml", Phase1Run)
    assert again.training == run.typed.training and again.training.reference_view_idx == (0, 3)


@pytest.mark.parametrize(("change", "said"), [
    ("training.condition_dropout=0.5", "at most 1/3"),
    ("training.snr_weighting=publik", "public"),
    ("training.reference_view_idx=sometimes", "reference_view_idx"),
    ("training.reference_view_idx=[]", "the list is empty"),
    ("training.validation.lpips_heads=x.pt", "LPIPS needs both files"),
    ("model.attention=sparse", "front_self"),
    ("model.tiny.unet.channels=[24]", "multiples of 16"),
    ("training.accumulation=5000", "no update at all"),
    ("training.ema_decay=0.9", "ema_max_decay"),
])
def test_a_mistake_names_its_key(change: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed("demo", change)
    assert said in str(caught.value)
