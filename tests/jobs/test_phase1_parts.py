"""The parts of phase 1: the average, the slots, the cache of what frozen networks say, the validation."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from configs.phase1 import Phase1Run
from jobs.checkpoint import link_tree
from jobs.data.multiview import MultiView, ViewChoice
from jobs.data.samples import read_list, read_sample
from jobs.data.toy import make
from jobs.ema import Ema, ema_decay
from jobs.loader import Draw
from jobs.metrics import Metrics
from jobs.mv_components import load_components
from jobs.mv_data import Objects, reference_views, slots
from jobs.mv_stage import MVStage, ViewEncoder
from jobs.mv_validation import FixedViews, verdict
from jobs.runtime import JobError
from jobs.world import World
from models.cameras import mv6
from models.mvdiffusion import MVDiffusionPipeline
from tests.jobs.small_phase1 import config_of
from tests.jobs.small_stage import small_plan


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    make(out, 3, 2, 16, 0)
    return out


def views_of(listing: Path) -> MultiView:
    samples = [read_sample(*line) for line in read_list(listing)[0]]
    return MultiView(samples, 16, (1.0, 1.0, 1.0), ViewChoice(6, "all", False), 0, 1)


def typed(data: Path, **training: Any) -> Phase1Run:
    return msgspec.convert(config_of(data, **training), Phase1Run)


@pytest.fixture
def stage(data: Path, alone: World, tmp_path: Path) -> MVStage:
    config = typed(data)
    train = Objects(views_of(data / "data_train.txt"), 0, 0)
    return MVStage(config, load_components(config, None, mv6(16)), train, Metrics(8), alone, {}, {}, tmp_path, tmp_path)


# --- the average ------------------------------------------------------------------------------------------------------

def test_the_average_follows_its_ramp() -> None:
    assert [ema_decay(n, 0.9999) for n in (1, 10, 90)] == pytest.approx([2 / 11, 11 / 20, 91 / 100])
    assert ema_decay(10**7, 0.9999) == 0.9999
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    ema, expected = Ema(net, 0.9), net.weight.detach().clone()
    for update in range(1, 6):
        with torch.no_grad():
            net.weight += 1
        ema.update(update)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_a_short_run_does_not_look_untrained() -> None:
    kept = 1.0
    for update in range(1, 301):
        kept *= ema_decay(update, 0.9999)
    assert kept < 1e-6 < 0.97 < 0.9999 ** 300


def test_the_stage_averages_its_unet_after_each_update(stage: MVStage) -> None:
    before = stage.modules["unet_ema"].conv_in.weight.clone()
    with torch.no_grad():
        stage.modules["unet"].conv_in.weight += 1
    stage.after_update(1)
    torch.testing.assert_close(stage.modules["unet_ema"].conv_in.weight, before + 9 / 11)


# --- slots and references ---------------------------------------------------------------------------------------------

def test_prompts_move_with_their_views() -> None:
    assert slots(0, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert slots(3, 6).tolist() == [3, 0, 1, 2, 4, 5]
    assert reference_views("random", 6) == [0, 1, 2, 3, 4, 5] and reference_views((2, 4), 6) == [2, 4]
    with pytest.raises(JobError, match="there is no view 7"):
        reference_views((2, 7), 6)


def test_a_view_keeps_its_own_prompt_in_training(data: Path, alone: World, tmp_path: Path) -> None:
    config = typed(data)
    components = load_components(config, None, mv6(16))
    stage = MVStage(config, components, Objects(views_of(data / "data_train.txt"), 4, 0), Metrics(8), alone, {}, {}, tmp_path,
                    tmp_path)
    seen: list[Tensor] = []
    stage.modules["unet"].register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    stage.loss(stage.source.batch([Draw(0, 0), Draw(0, 1)]), 0)
    assert torch.equal(seen[0].unflatten(0, (2, 6))[1], components.prompts[[4, 0, 1, 2, 3, 5]])


def test_random_references_are_a_function_of_step_and_sample(data: Path) -> None:
    views = views_of(data / "data_train.txt")
    draws = [Draw(step, 0) for step in range(40)]
    first = Objects(views, "random", 1).batch(draws).order
    assert torch.equal(first, Objects(views, "random", 1).batch(draws).order)
    assert set(first[:, 0].tolist()) == set(range(6))
    assert not torch.equal(first, Objects(views, "random", 2).batch(draws).order)


# --- the loss ----------------------------------------------------------------------------------------------------------

def test_views_share_their_time_step_and_nothing_else(stage: MVStage) -> None:
    seen: list[tuple[Tensor, ...]] = []
    stage.modules["unet"].register_forward_pre_hook(lambda _, given: seen.append(given))
    torch.manual_seed(3)
    stage.loss(stage.source.batch([Draw(0, 0), Draw(0, 1)]), 0)
    latents, t, _, labels = seen[0]
    assert latents.shape == (12, 8, 8, 8) and labels.shape == (12, 32)
    assert [len(set(row)) for row in t.unflatten(0, (2, 6)).tolist()] == [1, 1] and t[0] != t[6]
    front = latents[:, 4:].unflatten(0, (2, 6))
    assert torch.equal(front[:, 0], front[:, 5])  # one condition, repeated
    embeds = labels.unflatten(0, (2, 6))[..., :16]
    assert (embeds[:, 1] - embeds[:, 0]).abs().max() > 0  # an own noise row per view
    assert torch.equal(embeds[:, 1], embeds[:, 0]) is False and labels[:, 16:24].eq(1).all()


def test_everything_is_dropped_at_the_highest_rate(data: Path, alone: World, tmp_path: Path) -> None:
    config = typed(data, condition_dropout=1 / 3)
    stage = MVStage(config, load_components(config, None, mv6(16)), Objects(views_of(data / "data_train.txt"), 0, 0), Metrics(8),
                    alone, {}, {}, tmp_path, tmp_path)
    seen: list[tuple[Tensor, ...]] = []
    stage.modules["unet"].register_forward_pre_hook(lambda _, given: seen.append(given))
    kinds = set()
    for step in range(12):
        torch.manual_seed(step)
        stage.loss(stage.source.batch([Draw(step, 0)]), step)
        kinds.add((bool(seen[-1][3].any()), bool(seen[-1][0][:, 4:].any())))
    assert kinds == {(False, True), (False, False), (True, False)}


def test_each_object_is_encoded_once(stage: MVStage, alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = stage.sampler
    encoder = ViewEncoder(sampler, alone)
    encoded: list[int] = []
    pictured: list[int] = []
    vae_encode, embed = sampler.vae.encode, sampler.embed
    monkeypatch.setattr(sampler.vae, "encode", lambda x: (encoded.append(len(x)), vae_encode(x))[1])
    monkeypatch.setattr(sampler, "embed", lambda x: (pictured.append(len(x)), embed(x))[1])
    for step in range(3):
        torch.manual_seed(step)
        latents, condition, embeds = encoder.conditions(stage.source.batch([Draw(step, 0), Draw(step, 1)]))
    assert (encoded, pictured) == ([6, 6], [1, 1])  # not once per step, and CLIP not once per view
    assert (latents.shape, condition.shape, embeds.shape) == ((2, 6, 4, 8, 8), (2, 4, 8, 8), (2, 16))


def test_targets_are_samples_and_the_condition_is_the_mode(stage: MVStage, alone: World) -> None:
    encoder, batch = ViewEncoder(stage.sampler, alone), stage.source.batch([Draw(0, 0)])
    vae = stage.sampler.vae
    pictures = batch.pixels[0, :, :3].float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
    torch.manual_seed(0)
    latents, condition, _ = encoder.conditions(batch)
    torch.manual_seed(0)
    noise = torch.randn(1, 6, 4, 8, 8)
    scale = vae.config.scaling_factor
    torch.testing.assert_close(latents[0], (posterior.mean + posterior.std * noise[0]) * scale)
    torch.testing.assert_close(condition[0], posterior.mode()[0] * scale)


# --- the validation ------------------------------------------------------------------------------------------------

class Oracle(MVDiffusionPipeline):
    """Draws the true views of the object whose picture is put in, with `wrong` of them for all."""

    views: list[Tensor]
    answer: Any

    def sample(self, embeds: Tensor, *_: Any, **__: Any) -> Tensor:
        return embeds[None]

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return pictures[0], pictures

    def decode(self, latents: Tensor) -> Tensor:
        return self.answer(next(views for views in self.views if torch.equal(views[0], latents)))


@pytest.mark.parametrize(("answer", "psnr_above", "other_margin", "diversity"), [
    (lambda views: views + 0.01, 38, 10, 1.0),
    (lambda views: views[:1].expand_as(views), 0, 0, 0.0),  # a collapse: all views alike
])
def test_the_validation_tells_learning_from_copying(data: Path, alone: World, stage: MVStage, answer: Any, psnr_above: float,
                                                    other_margin: float, diversity: float) -> None:
    val, train = views_of(data / "data_val.txt"), views_of(data / "data_train.txt")
    sampler = stage.sampler
    oracle = Oracle(sampler.unet, sampler.vae, sampler.image_encoder, sampler.image_normalizer,
                    sampler.image_noising_scheduler, sampler.scheduler, sampler.feature_extractor)
    oracle.views = [val.views(index).pixels[:, :3].float() / 255 for index in range(2)]
    oracle.answer = answer
    config = msgspec.structs.replace(typed(data).training.validation, lpips_weights="random:0", lpips_heads="random:1")
    found = FixedViews(oracle, val, train, config, torch.zeros(6, 7, 16), 0, alone).evaluate(lambda: False)
    assert found is not None and {"val/lpips", "val/ssim", "val/psnr_vae"} <= found.keys()
    assert found["val/psnr"] > psnr_above and found["val/diversity"] == pytest.approx(diversity, abs=1e-3)
    bars = {bar["against"]: bar["beaten"] for bar in verdict(found)}
    if diversity:
        assert found["val/psnr"] - found["val/psnr_other"] > other_margin and all(bars.values())
    else:
        assert found["val/psnr"] == pytest.approx(found["val/psnr_copy"], abs=1e-4) and not all(bars.values())


def test_an_evaluation_that_is_asked_to_stop_has_no_answer(data: Path, alone: World, stage: MVStage) -> None:
    val = views_of(data / "data_val.txt")
    fixed = FixedViews(stage.sampler, val, val, typed(data).training.validation, torch.zeros(6, 7, 16), 0, alone)
    assert fixed.evaluate(lambda: True) is None


def test_the_validation_is_the_same_each_time_and_that_of_the_average(data: Path, alone: World, stage: MVStage) -> None:
    val = views_of(data / "data_val.txt")
    fixed = FixedViews(stage.sampler, val, val, typed(data).training.validation, torch.zeros(6, 7, 16), 0, alone)
    with torch.no_grad():
        first = fixed.evaluate(lambda: False)
        torch.manual_seed(99)
        stage.modules["unet"].conv_in.weight += 1
        assert fixed.evaluate(lambda: False) == first
        stage.modules["unet_ema"].conv_in.weight += 1
        assert fixed.evaluate(lambda: False) != first


# --- what the shared loop learned for this stage ------------------------------------------------------------------------

def test_a_constant_rate_stays_after_the_warm_up() -> None:
    plan = small_plan(lr_decay="constant")
    assert [plan.lr_of(update) for update in (0, 2, 4, 19)] == pytest.approx([0, 5e-3, 1e-2, 1e-2])
    assert small_plan().lr_of(19) < 1e-3


def test_files_that_cannot_be_linked_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "vae").mkdir(parents=True)
    (tmp_path / "a" / "vae" / "config.json").write_text("{}")

    def refused(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr("os.link", refused)
    assert link_tree(tmp_path / "a", tmp_path / "b") == ["vae/config.json"]
    assert (tmp_path / "b" / "vae" / "config.json").read_text() == "{}"
