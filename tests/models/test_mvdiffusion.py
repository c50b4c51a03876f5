"""The multi-view UNet and the sampling loop: against the public code's numbers, and against a slow loop written here."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from models.mv_conditioning import class_labels, drop_conditions, snr_weights, training_target
from models.mv_unet import MultiViewProcessor, as_multiview, load_unet, unet_config, with_condition_channels
from models.mvdiffusion import (
    MVDiffusionPipeline, PipelineError, UNetError, build_unet, to_rgb, without_progress_bars,
)

CONFIG = {"sample_size": 8, "in_channels": 8, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
          "norm_num_groups": 8, "attention_head_dim": [2, 2], "cross_attention_dim": 16, "use_linear_projection": True,
          "class_embed_type": "projection", "projection_class_embeddings_input_dim": 32,
          "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SCHEDULER = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
             "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}


def vae_of(levels: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
                         layers_per_block=1, **config).eval()


def processor_of(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.fixture(autouse=True)
def same_random_numbers_after() -> Any:
    state = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(state)


@pytest.fixture
def tiny() -> MVDiffusionPipeline:
    torch.manual_seed(0)
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16)).eval()
    normalizer = StableUnCLIPImageNormalizer(16)
    with torch.no_grad():
        normalizer.mean.normal_()
        normalizer.std.uniform_(0.5, 2)
    return MVDiffusionPipeline(build_unet(CONFIG).eval(), vae_of(2, block_out_channels=[8, 8], norm_num_groups=4, sample_size=16),
                               vision, normalizer, DDPMScheduler(beta_schedule="squaredcos_cap_v2"), DDIMScheduler(**SCHEDULER),
                               processor_of(16))


# --- against the public code --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("attention", "same", "other"), [
    ("front_self", "out_sparse", "out_dense"), ("dense", "out_dense", "out_sparse")])
def test_the_unet_agrees_with_the_public_code(shared: Path, attention: str, same: str, other: str) -> None:
    golden = torch.load(shared / "fixtures" / "mvunet_tiny.pt", weights_only=True)
    unet = build_unet({**golden["config"], "attention": attention}).eval()
    unet.load_state_dict(golden["state_dict"])
    with torch.no_grad():
        found = unet(golden["x"], golden["t"], golden["ehs"], golden["class_labels"])
    torch.testing.assert_close(found, golden[same], atol=1e-5, rtol=0)
    assert (found - golden[other]).abs().max() > 0.01


def test_the_sampled_latents_agree_with_the_public_code(shared: Path) -> None:
    golden = torch.load(shared / "fixtures" / "mvpipe_tiny.pt", weights_only=True)
    unet = build_unet(golden["unet_config"]).eval()
    unet.load_state_dict(golden["unet"])
    vae = vae_of(4, **golden["vae_config"])
    vae.load_state_dict(golden["vae"])
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**golden["vision_config"])).eval()
    vision.load_state_dict(golden["vision"])
    normalizer = StableUnCLIPImageNormalizer(32)
    normalizer.load_state_dict(golden["normalizer"])
    pipeline = MVDiffusionPipeline(unet, vae, vision, normalizer, DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
                                   DDIMScheduler(**SCHEDULER), processor_of(32))
    found = pipeline(golden["image"], golden["prompt_embeds"], golden["steps"], golden["guidance"], golden["eta"],
                     golden["seed"], output_type="latent")
    torch.testing.assert_close(found, golden["latents"], atol=2e-5, rtol=0)


# --- against slow twins ----------------------------------------------------------------------------------------------

def slow_latents(pipeline: MVDiffusionPipeline, picture: Tensor, prompts: Tensor, steps: int, guidance: float, eta: float,
                 seed: int) -> Tensor:
    """DDIM, unCLIP noising and guidance from their formulas, a view at a time where that is possible."""
    generator = torch.Generator().manual_seed(seed)
    image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
    pixels = pipeline.feature_extractor(images=image, return_tensors="pt").pixel_values
    embed = pipeline.image_encoder(pixels).image_embeds[0]
    mode = pipeline.vae.encode(picture[None] * 2 - 1).latent_dist.mode()[0] * pipeline.vae.config.scaling_factor
    mean, std = pipeline.image_normalizer.mean[0], pipeline.image_normalizer.std[0]
    keep = pipeline.image_noising_scheduler.alphas_cumprod[0]
    rows = torch.randn(6, len(embed), generator=generator)
    half = len(embed) // 2
    labels = torch.stack([torch.cat([(keep.sqrt() * (embed - mean) / std + (1 - keep).sqrt() * row) * std + mean,
                                     torch.ones(half), torch.zeros(half)]) for row in rows])
    x = torch.randn(6, 4, *mode.shape[1:], generator=generator)
    alphas = torch.cumprod(1 - torch.linspace(.00085 ** .5, .012 ** .5, 1000) ** 2, 0)
    stride = 1000 // steps
    for t in [i * stride + 1 for i in reversed(range(steps))]:
        now, before = alphas[t], alphas[t - stride] if t >= stride else alphas[0]
        told = pipeline.unet(torch.cat([x, mode.expand_as(x)], 1), torch.full((6,), t), prompts, labels)
        free = pipeline.unet(torch.cat([x, torch.zeros_like(x)], 1), torch.full((6,), t), prompts, torch.zeros_like(labels))
        v = told if guidance == 1 else free + guidance * (told - free)
        clean, noise = now.sqrt() * x - (1 - now).sqrt() * v, now.sqrt() * v + (1 - now).sqrt() * x
        sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
        x = before.sqrt() * clean + (1 - before - sigma ** 2).sqrt() * noise
        if eta > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator)
    return x


@pytest.mark.parametrize(("size", "steps", "guidance", "eta", "seed"), [
    ((16, 16), 1, 1.0, 0.0, 0), ((16, 16), 5, 3.0, 1.0, 5), ((32, 32), 7, 1.0, 1.0, 1), ((16, 24), 10, 2.5, 0.0, 2),
    ((24, 16), 3, 0.0, 0.5, 3), ((64, 64), 4, 7.5, 0.3, 4)])
def test_sampling_is_what_the_formulas_say(tiny: MVDiffusionPipeline, size: tuple[int, int], steps: int, guidance: float,
                                           eta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    picture = (torch.rand(3, *size, generator=generator) * 255).round() / 255
    prompts = torch.randn(6, 7, 16, generator=generator)
    with torch.no_grad():
        expected = slow_latents(tiny, picture, prompts, steps, guidance, eta, seed)
    found = tiny(picture, prompts, steps, guidance, eta, seed, output_type="latent")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("views", [2, 6])
@pytest.mark.parametrize("attention", ["front_self", "dense"])
def test_each_query_attends_to_the_tokens_that_the_rule_names(attention: str, views: int) -> None:
    torch.manual_seed(1)
    unet = build_unet({**CONFIG, "attention": attention, "num_views": views})
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    hidden = torch.randn(2 * views, 5, 16)
    with torch.no_grad():
        found = MultiViewProcessor(attention, views)(attn, hidden)  # type: ignore[arg-type]
        for row in range(2 * views):
            first = row // views * views
            seen = [first, row] if attention == "front_self" else list(range(first, first + views))
            tokens = torch.cat([hidden[view] for view in dict.fromkeys(seen)])
            if attention == "front_self" and row == first:
                tokens = hidden[row]
            mixed = []
            for head in range(2):
                part = slice(head * 8, head * 8 + 8)
                q, k, v = (layer(of)[:, part] for layer, of in ((attn.to_q, hidden[row]), (attn.to_k, tokens), (attn.to_v, tokens)))
                mixed.append(torch.softmax(q @ k.T / 8 ** 0.5, 1) @ v)
            torch.testing.assert_close(found[row], attn.to_out[0](torch.cat(mixed, 1)), atol=1e-6, rtol=1e-5)


def test_only_the_front_view_reaches_the_others() -> None:
    torch.manual_seed(0)
    unet = build_unet(CONFIG).eval()
    x, prompts, labels = torch.randn(12, 8, 8, 8), torch.randn(12, 7, 16), torch.randn(12, 32)

    def changed_by(view: int) -> list[int]:
        other = x.clone()
        other[view] += 1
        with torch.no_grad():
            apart = (unet(other, 5, prompts, labels) - unet(x, 5, prompts, labels)).flatten(1).abs().amax(1)
        return [row for row in range(12) if apart[row] > 1e-6]

    assert changed_by(3) == [3]
    assert changed_by(6) == [6, 7, 8, 9, 10, 11]


def test_an_object_gets_the_same_views_whatever_stands_beside_it(tiny: MVDiffusionPipeline) -> None:
    pictures, prompts = torch.rand(3, 3, 16, 16), torch.randn(6, 7, 16)
    together = tiny.generate(pictures, prompts, 3, 2.0, 1.0, [11, 12, 13], "latent")
    alone = tiny(pictures[1], prompts, 3, 2.0, 1.0, 12, output_type="latent")
    torch.testing.assert_close(together[1], alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_noise_is_not_that_of_torchs_global_generator(tiny: MVDiffusionPipeline) -> None:
    picture, prompts = torch.rand(3, 16, 16), torch.randn(6, 7, 16)
    found = [tiny(picture, prompts, 2, 1.0, 1.0, 4, output_type="latent") for _ in range(2)]
    assert torch.equal(*found)


# --- pictures in and out --------------------------------------------------------------------------------------------

def test_every_form_of_a_picture_means_the_same() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pil = Image.fromarray(rgba)
    expected = rgba[..., :3] / 255 * (rgba[..., 3:] / 255) + (1 - rgba[..., 3:] / 255)
    for form in (pil, rgba, torch.from_numpy(rgba)):
        assert torch.allclose(to_rgb(form), torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-6)
    unit = torch.rand(3, 8, 8)
    assert torch.equal(to_rgb(unit), unit)
    with pytest.raises(PipelineError, match=r"this one is float32 \[8, 8\]"):
        to_rgb(unit[0])


def test_pictures_come_out_as_pil_or_tensor(tiny: MVDiffusionPipeline) -> None:
    picture, prompts = torch.rand(3, 16, 16), torch.randn(6, 7, 16)
    views = tiny(picture, prompts, 2, 1.0, 0.0, 0)
    tensors = tiny(picture, prompts, 2, 1.0, 0.0, 0, output_type="pt")
    assert [view.size for view in views] == [(16, 16)] * 6 and tensors.shape == (6, 3, 16, 16)
    assert 0 <= tensors.min() and tensors.max() <= 1
    assert np.array_equal(np.asarray(views[2]), (tensors[2] * 255).round().byte().permute(1, 2, 0).numpy())


# --- conditions and weights ----------------------------------------------------------------------------------------

def test_the_label_is_noised_at_level_0_and_ends_in_cosines_then_sines() -> None:
    scheduler, normalizer = DDPMScheduler(beta_schedule="squaredcos_cap_v2"), StableUnCLIPImageNormalizer(8)
    embeds, noise = torch.randn(2, 8), torch.randn(2, 8)
    labels = class_labels(embeds, noise, normalizer, scheduler)
    assert labels.shape == (2, 16)
    assert labels[:, 8:].tolist() == [[1.0] * 4 + [0.0] * 4] * 2
    assert not torch.allclose(labels[:, :8], embeds, atol=1e-4)
    torch.testing.assert_close(labels[:, :8], class_labels(embeds, noise * 0, normalizer, scheduler)[:, :8], atol=0.05, rtol=0)


def test_conditions_are_dropped_each_alone_and_both() -> None:
    labels, latents = torch.ones(4, 6, 8), torch.ones(4, 6, 4, 2, 2)
    chance = torch.tensor([0.01, 0.07, 0.12, 0.15])
    kept_labels, kept_latents = drop_conditions(labels, latents, chance, 0.05)
    assert kept_labels[:, 0, 0].tolist() == [0, 0, 1, 1] and kept_labels[:2].abs().max() == 0  # the level half too
    assert kept_latents[:, 0, 0, 0, 0].tolist() == [1, 0, 0, 1]
    assert torch.equal(drop_conditions(labels, latents, chance * 0, 0.0)[0], labels)


def test_weights_of_the_noise_levels() -> None:
    alphas = torch.tensor([0.99, 0.9, 0.5, 0.1, 0.0])
    snr = [99, 9, 1, 1 / 9, 0]
    t = torch.arange(5)
    for prediction in ("v_prediction", "epsilon"):
        assert snr_weights(alphas, t, "public", 5.0, prediction).tolist() == pytest.approx([5 / 99, 5 / 9, 1, 1, 1], rel=1e-4)
    paper = [min(value, 5) / (value + 1) for value in snr]
    assert snr_weights(alphas, t, "paper", 5.0, "v_prediction").tolist() == pytest.approx(paper, rel=1e-4)
    assert snr_weights(alphas, t, "none", 5.0, "v_prediction").tolist() == [1.0] * 5


def test_the_target_is_what_the_scheduler_says() -> None:
    latents, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 400, 999])
    for kind in ("epsilon", "sample", "v_prediction"):
        scheduler = DDIMScheduler(**{**SCHEDULER, "prediction_type": kind})
        alpha = scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
        expected = {"epsilon": noise, "sample": latents, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents}
        torch.testing.assert_close(training_target(scheduler, latents, noise, t), expected[kind])


# --- building, folders ---------------------------------------------------------------------------------------------

def test_four_input_channels_become_eight_and_eight_stay() -> None:
    four = {"conv_in.weight": torch.randn(16, 4, 3, 3)}
    config, weights = with_condition_channels({"in_channels": 4}, four)
    assert config["in_channels"] == 8
    assert torch.equal(weights["conv_in.weight"][:, :4], four["conv_in.weight"])
    assert weights["conv_in.weight"].shape == (16, 8, 3, 3) and not weights["conv_in.weight"][:, 4:].any()
    eight = {"conv_in.weight": torch.randn(16, 8, 3, 3)}
    assert torch.equal(with_condition_channels({"in_channels": 8}, eight)[1]["conv_in.weight"], eight["conv_in.weight"])
    with pytest.raises(UNetError, match="5 input channels"):
        with_condition_channels({}, {"conv_in.weight": torch.zeros(1, 5, 3, 3)})


def test_weights_have_the_names_and_shapes_of_plain_diffusers() -> None:
    ours, plain = build_unet(CONFIG), UNet2DConditionModel(**CONFIG)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    full = {"in_channels": 8, "out_channels": 4, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
            "use_linear_projection": True, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}
    with torch.device("meta"):
        state = build_unet(full)
    assert len(state.state_dict()) == 690
    assert 865e6 < sum(parameter.numel() for parameter in state.parameters()) < 875e6
    rules = [processor for processor in state.attn_processors.values() if isinstance(processor, MultiViewProcessor)]
    assert len(rules) == 16 and {rule.attention for rule in rules} == {"front_self"}


def test_a_mistake_in_a_unet_config_is_named() -> None:
    with pytest.raises(UNetError, match="does not know: block_out_chanels"):
        build_unet({**CONFIG, "block_out_chanels": 3})
    with pytest.raises(UNetError, match="'sparse' is none of front_self, dense"):
        build_unet({**CONFIG, "attention": "sparse"})
    with pytest.raises(ValueError, match="7 is no whole number of objects of 6 views"):
        build_unet(CONFIG)(torch.zeros(7, 8, 8, 8), 0, torch.zeros(7, 7, 16), torch.zeros(7, 32))
    assert unet_config(build_unet({**CONFIG, "attention": "dense"}))["attention"] == "dense"


def save_plain(pipeline: MVDiffusionPipeline, folder: Path, unet: torch.nn.Module) -> None:
    """A folder as plain diffusers and transformers write it."""
    unet.save_pretrained(folder / "unet")
    for name in ("vae", "image_encoder", "image_normalizer", "image_noising_scheduler", "scheduler", "feature_extractor"):
        with without_progress_bars():
            getattr(pipeline, name).save_pretrained(folder / name)


def test_a_folder_of_plain_diffusers_opens_and_samples_the_same(tiny: MVDiffusionPipeline, tmp_path: Path) -> None:
    plain = UNet2DConditionModel(**CONFIG)
    plain.load_state_dict(tiny.unet.state_dict())
    save_plain(tiny, tmp_path, plain)
    picture, prompts = torch.rand(3, 16, 16), torch.randn(6, 7, 16)
    expected = tiny(picture, prompts, 3, 2.0, 1.0, 7, output_type="latent")
    again = MVDiffusionPipeline.from_pretrained(tmp_path)
    assert again.unet.attention == "front_self" and not again.unet.training
    assert torch.equal(again(picture, prompts, 3, 2.0, 1.0, 7, output_type="latent"), expected)
    tiny.unet = as_multiview(plain.eval())
    assert torch.equal(tiny(picture, prompts, 3, 2.0, 1.0, 7, output_type="latent"), expected)
    dense = MVDiffusionPipeline.from_pretrained(tmp_path, attention="dense")
    assert not torch.allclose(dense(picture, prompts, 3, 2.0, 1.0, 7, output_type="latent"), expected, atol=1e-3)


def test_the_averaged_weights_are_taken_where_there_are_some(tiny: MVDiffusionPipeline, tmp_path: Path) -> None:
    save_plain(tiny, tmp_path, UNet2DConditionModel(**CONFIG))
    average = UNet2DConditionModel(**CONFIG)
    average.save_pretrained(tmp_path / "unet_ema")
    bias = average.state_dict()["conv_in.weight"]
    assert torch.equal(MVDiffusionPipeline.from_pretrained(tmp_path).unet.conv_in.weight, bias)
    assert torch.equal(MVDiffusionPipeline.from_pretrained(tmp_path, weights="ema").unet.conv_in.weight, bias)
    assert not torch.equal(MVDiffusionPipeline.from_pretrained(tmp_path, weights="unet").unet.conv_in.weight, bias)


def test_a_plain_unet_of_stable_diffusion_gets_its_condition_channels(tmp_path: Path) -> None:
    plain = UNet2DConditionModel(**{**CONFIG, "in_channels": 4})
    plain.save_pretrained(tmp_path)
    unet = load_unet(tmp_path)
    assert unet.config.in_channels == 8 and torch.equal(unet.conv_in.weight[:, :4], plain.conv_in.weight)
    assert not unet.conv_in.weight[:, 4:].any()


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-2-1-unclip", "gone"])
def test_nothing_is_asked_of_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(PipelineError, match="there is no such folder"):
        MVDiffusionPipeline.from_pretrained(name)


def test_a_folder_that_lacks_something_is_named(tiny: MVDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    save_plain(tiny, tmp_path, UNet2DConditionModel(**CONFIG))
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(UNetError, match="unet: no UNet in diffusers' format can be read there"):
        MVDiffusionPipeline.from_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(PipelineError, match="scheduler: DDIMScheduler cannot be read there"):
        MVDiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(("shape", "seeds", "said"), [
    ((6, 7, 24), [0], "24 wide, the UNet's cross-attention is 16"), ((5, 7, 16), [0], r"must be \[6, L, D\]"),
    ((6, 7, 16), [0, 1], "1 pictures need 1 seeds, not 2")])
def test_inputs_that_do_not_fit_are_named(tiny: MVDiffusionPipeline, shape: tuple[int, ...], seeds: list[int], said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        tiny.generate([torch.rand(3, 16, 16)], torch.zeros(shape), 2, 1.0, 0.0, seeds)
