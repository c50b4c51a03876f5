from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from models.audio_attention import AudioAttention, FixedGates, TrainedParts, add_audio_attention, audio_sites, gates, set_trained
from models.clap2diffusion import AudioProjector, Conditioning, Recipe, add_lora, build_trained, generate

SD15 = dict(sample_size=64, in_channels=4, out_channels=4, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
WIDTH = 16


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8,
        block_out_channels=(16, 16), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 700]), "encoder_hidden_states": torch.randn(2, 5, WIDTH)}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(2))


def heard(tokens: torch.Tensor | None, *scale: float) -> dict:
    if tokens is None:
        return {}
    return {"cross_attention_kwargs": {"audio_tokens": tokens, "audio_scale": torch.tensor(scale) if scale else None}}


# --- sizes ----------------------------------------------------------------------------------------------------------

def test_the_real_size_has_the_parameters_of_the_specification() -> None:
    with torch.device("meta"):
        projector = AudioProjector()
        parts = build_trained(UNet2DConditionModel(**SD15), 0.1, (8, 32.0, 0.1))
    named = dict(parts.named_parameters())
    assert sum(parameter.numel() for parameter in projector.parameters()) == 7_885_056
    assert sum(parameter.numel() for name, parameter in named.items() if "lora_" in name) == 1_594_368
    assert len(audio_sites(parts.unet)) == sum(name.endswith(".gate") for name in named) == 16
    assert {parameter.dtype for parameter in named.values()} == {torch.float32}


# --- the gate -------------------------------------------------------------------------------------------------------

def test_at_gate_0_and_without_tokens_it_is_the_base_unet(inputs: dict, tokens: torch.Tensor) -> None:
    unet = tiny_unet()
    with torch.no_grad():
        base = unet(**inputs).sample
        build_trained(unet, 0.1, None)
        assert torch.equal(unet(**inputs).sample, base)
        assert torch.equal(unet(**inputs, **heard(tokens, 0.0, 0.0)).sample, base)
        with FixedGates(unet, 0.0):
            assert torch.equal(unet(**inputs, **heard(tokens)).sample, base)
        assert gates(unet) == pytest.approx([0.1] * len(gates(unet)))
        one = unet(**inputs, **heard(tokens, 1.0, 0.0)).sample
        assert not torch.allclose(one[0], base[0], atol=1e-4) and torch.equal(one[1], base[1])


def test_keys_and_values_begin_as_the_sites_own() -> None:
    unet = tiny_unet()
    own = {name: module.to_k.weight.clone() for name, module in unet.named_modules() if name.endswith("attn2")}
    add_audio_attention(unet)
    for name, site in audio_sites(unet).items():
        assert torch.equal(site.to_k_audio.weight, own[name.removesuffix(".processor")])


@pytest.mark.parametrize("gate", [0.0, 1.0, -1.5])
def test_a_gate_that_could_not_train_is_refused(gate: float) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 1, and not 0"):
        add_audio_attention(tiny_unet(), gate)


def test_the_tokens_reach_every_site_and_nothing_warns(inputs: dict, tokens: torch.Tensor, caplog: pytest.LogCaptureFixture,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose signature does not name the argument trains without audio, with one line in a log."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    unet = tiny_unet()
    build_trained(unet, 0.1, None)
    seen: list[str] = []
    for name, site in audio_sites(unet).items():
        site.to_k_audio.register_forward_hook(lambda *_given, name=name: seen.append(name))
    with caplog.at_level(logging.DEBUG):
        unet(**inputs, **heard(tokens))
    assert sorted(seen) == sorted(audio_sites(unet)) and len(seen) == 4
    assert "ignored" not in caplog.text and "not expected" not in caplog.text


class DropsTheArgument(AudioAttention):
    """What the check above is there to find."""

    __call__ = nn.Module.__call__

    def forward(self, attn: object, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                attention_mask: torch.Tensor | None = None, temb: object = None, audio_tokens: torch.Tensor | None = None,
                audio_scale: torch.Tensor | None = None) -> torch.Tensor:
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, audio_tokens, audio_scale)


def test_diffusers_does_drop_it_from_a_plain_module(inputs: dict, tokens: torch.Tensor) -> None:
    unet = tiny_unet()
    build_trained(unet, 0.1, None)
    with torch.no_grad():
        base = unet(**inputs).sample
        for site in audio_sites(unet).values():
            site.__class__ = DropsTheArgument
        assert torch.equal(unet(**inputs, **heard(tokens)).sample, base)


# --- what trains ----------------------------------------------------------------------------------------------------

def test_parts_hold_audio_and_lora_alone_and_are_restored(inputs: dict, tokens: torch.Tensor) -> None:
    first, second = (build_trained(tiny_unet(), 0.1, (2, 8.0, 0.0)) for _ in range(2))
    assert all("lora_" in name or ".processor." in name for name in first.state_dict())
    with torch.no_grad():
        for parameter in dict(first.named_parameters()).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, tensor in second.state_dict().items():
            tensor.copy_(first.state_dict()[name])
        assert torch.equal(first.unet(**inputs, **heard(tokens)).sample, second.unet(**inputs, **heard(tokens)).sample)


def test_what_is_not_trained_keeps_its_dropout_off() -> None:
    parts = build_trained(tiny_unet(), 0.1, (2, 8.0, 0.5))
    projector = AudioProjector(8, 16, 2, WIDTH)
    set_trained(parts.named_parameters(), ("processor.gate",))
    set_trained(projector.named_parameters(), ())
    assert sum(parameter.requires_grad for _, parameter in parts.named_parameters()) == 4
    assert not any(module.training for module in (*parts.train().unet.modules(), *projector.train().modules()))
    set_trained(parts.named_parameters(), ("lora_",))
    assert parts.train().unet.training
    assert not any(module.training for module in parts.eval().modules())


def test_a_new_lora_changes_nothing(inputs: dict) -> None:
    unet = tiny_unet()
    with torch.no_grad():
        base = unet(**inputs).sample
        add_lora(unet, 2, 8.0, 0.1)
        assert torch.equal(unet.eval()(**inputs).sample, base)


# --- conditioning and generation ------------------------------------------------------------------------------------

class Tower(nn.Module):
    """A clip's embedding is its first samples."""

    def forward(self, input_features: torch.Tensor, is_longer: torch.Tensor) -> object:
        return type("Found", (), {"audio_embeds": input_features.flatten(1)})


def features(clip: np.ndarray, **_given: object) -> dict[str, torch.Tensor]:
    return {"input_features": torch.from_numpy(clip[None, None, None, :8])}


class Words:
    model_max_length = 4

    def __call__(self, text: str, **_given: object) -> object:
        ids = [ord(letter) % 7 for letter in text[:4]]
        return type("Ids", (), {"input_ids": torch.tensor([ids + [0] * (4 - len(ids))])})


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    def forward(self, ids: torch.Tensor) -> object:
        return type("Found", (), {"last_hidden_state": self.table(ids)})


@pytest.fixture
def conditioning() -> Conditioning:
    torch.manual_seed(3)
    projector = AudioProjector(8, 16, 2, WIDTH).eval()
    return Conditioning(Recipe("fingerprint", 100, 1.0, 2), Tower(), features, Texts(), Words(), projector)


def clips(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(index).normal(size=100).astype(np.float32) for index in range(count)]


def test_a_batch_of_clips_is_encoded_as_each_alone(conditioning: Conditioning) -> None:
    several = clips(5)
    together = conditioning.embed(conditioning.mel(several))
    alone = torch.cat([conditioning.embed(conditioning.mel([clip])) for clip in several])
    assert torch.equal(together, alone)
    assert together.norm(dim=1).tolist() == pytest.approx([1.0] * 5)
    assert torch.pdist(together).min() > 0.1  # distinct clips, distinct embeddings
    assert torch.allclose(conditioning.tokens(together), torch.cat([conditioning.tokens(row[None]) for row in alone]), atol=1e-6)


def make(conditioning: Conditioning, unet: UNet2DConditionModel, count: int = 1, **changes: object) -> torch.Tensor:
    embedding = conditioning.embed(conditioning.mel(clips(count)))
    given = dict(prompt="a", negative_prompt="", steps=3, guidance=3.0, strength=1.0, shape=(3, 8, 8), seeds=list(range(count)))
    return generate(unet, DDIMScheduler(), conditioning, embedding, **{**given, **changes})


def test_generation_depends_on_seed_sound_prompt_and_strength_and_not_on_the_batch(conditioning: Conditioning) -> None:
    unet = tiny_unet()
    parts = build_trained(unet, 0.9, None)
    assert isinstance(parts, TrainedParts)
    first = make(conditioning, unet)
    assert torch.equal(first, make(conditioning, unet))
    assert torch.allclose(make(conditioning, unet, 3)[:1], first, atol=1e-4)
    for change in ({"seeds": [9]}, {"prompt": "b"}, {"strength": 0.0}, {"guidance": 1.0}, {"negative_prompt": "z"}):
        assert not torch.allclose(make(conditioning, unet, **change), first, atol=1e-4), change


def test_the_unconditional_half_hears_nothing(conditioning: Conditioning) -> None:
    """With a gate of 0 guidance from the empty prompt to the empty prompt leads nowhere."""
    unet = tiny_unet()
    build_trained(unet, 0.9, None)
    silent = make(conditioning, unet, prompt="", strength=0.0, guidance=7.5)
    assert torch.allclose(silent, make(conditioning, unet, prompt="", strength=0.0, guidance=1.0), atol=1e-4)
    assert not torch.allclose(make(conditioning, unet, prompt="", guidance=7.5), make(conditioning, unet, prompt="", guidance=1.0), atol=1e-3)
