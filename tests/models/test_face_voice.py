"""The contrast, its temperature, and towers that must not hear padding or train what is frozen."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.face_voice import MAX_SCALE, FaceVoice, contrast, spread
from models.towers import SpeechTower, TinyFace, TinyVoice, Tower, ViTTower, masked_mean, without_chance


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def unit(*shape: int) -> Tensor:
    return functional.normalize(torch.randn(*shape), dim=1)


# --- the loss -------------------------------------------------------------------------------------------------------

def test_the_loss_of_guessing_is_ln_b_whoever_is_in_the_batch_twice() -> None:
    same = unit(1, 8).expand(12, 8)
    for identities in (torch.arange(12), torch.arange(12) // 2, torch.tensor([0] * 5 + list(range(1, 8)))):
        assert contrast(same, same, identities, torch.tensor(2.0)).loss.item() == pytest.approx(math.log(12), abs=1e-5)


def test_without_repeats_it_is_the_cross_entropy_of_both_ways() -> None:
    faces, voices, log_scale = unit(9, 16), unit(9, 16), torch.tensor(2.5)
    logits, target = log_scale.exp() * faces @ voices.T, torch.arange(9)
    expected = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    found = contrast(faces, voices, target, log_scale)
    torch.testing.assert_close(found.loss, expected)
    hits = [(way.argmax(1) == target).float().mean() for way in (logits, logits.T)]
    assert found.accuracy == pytest.approx((sum(hits) / 2).item())


@pytest.mark.parametrize(("identities", "pulled"), [([7, 7, 1, 2], True), ([7, 8, 1, 2], False)])
def test_an_identity_that_is_twice_in_a_batch_is_not_pushed_away_from_itself(identities: list[int], pulled: bool) -> None:
    faces = torch.full((4, 4), 0.5).requires_grad_()  # as near to each of the voices
    contrast(faces, torch.eye(4), torch.tensor(identities), torch.tensor(2.0)).loss.backward()
    assert faces.grad is not None and (faces.grad[0, 1].item() < 0) is pulled  # the first face, the second voice
    assert faces.grad[0, 0] < 0 < faces.grad[0, 2]


@pytest.mark.parametrize("bound", [0.0, math.log(MAX_SCALE)])
def test_a_clamped_temperature_stays_the_same_parameter_and_keeps_its_gradient(bound: float) -> None:
    heads = FaceVoice(8, 8, 16, dropout=0.0)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.1)
    parameter = heads.log_scale
    with torch.no_grad():
        parameter.fill_(bound * 3 - 1)
    heads.clamp_scale()
    assert heads.log_scale is parameter and any(parameter is one for one in optimizer.param_groups[0]["params"])
    assert parameter.item() == pytest.approx(bound)
    # at the lower bound faces and voices that belong together, at the upper ones that do not: it must come back
    faces = unit(6, 16)
    voices = faces if bound == 0 else faces.roll(1, 0)
    contrast(faces, voices, torch.arange(6), parameter).loss.backward()
    assert parameter.grad is not None and abs(parameter.grad.item()) > 1e-3
    optimizer.step()
    heads.clamp_scale()
    assert abs(parameter.item() - bound) > 0.01


def test_the_temperature_is_learned() -> None:
    heads = FaceVoice(8, 8, 16, dropout=0.0)
    assert "log_scale" in dict(heads.named_parameters())
    assert heads.log_scale.exp().item() == pytest.approx(1 / 0.07)


def test_what_is_not_a_number_is_said_by_the_loss() -> None:
    heads = FaceVoice(8, 8, 16).eval()
    features = torch.randn(4, 8)
    features[2] = math.nan
    voices = heads.voices(features)
    assert voices[[0, 1, 3]].isfinite().all() and voices[2].isnan().all()
    assert contrast(heads.faces(torch.randn(4, 8)), voices, torch.arange(4), heads.log_scale).loss.isnan()


def test_a_head_that_says_nothing_gives_no_exploding_gradient() -> None:
    """normalize divides by the length; with the usual eps of 1e-12 a zero vector gives gradients of 1e12."""
    heads = FaceVoice(8, 8, 16).eval()
    nn.init.zeros_(heads.face[-1].weight), nn.init.zeros_(heads.face[-1].bias)
    contrast(heads.faces(torch.randn(4, 8)), heads.voices(torch.randn(4, 8)), torch.arange(4), heads.log_scale
             ).loss.backward()
    assert heads.face[-1].weight.grad is not None and 0 < heads.face[-1].weight.grad.norm() < 1e9


def test_spread_tells_a_sphere_from_a_point() -> None:
    even, point = spread(unit(500, 32)), spread(unit(1, 32).expand(50, 32))
    assert even.std == pytest.approx(1, abs=0.05) and abs(even.cosine) < 0.01
    assert point.std == pytest.approx(0, abs=1e-3) and point.cosine == pytest.approx(1, abs=1e-4)


# --- towers ---------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
         "num_feat_extract_layers": 7}


def speech(kind: str, **options: object) -> SpeechTower:
    import transformers

    config = without_chance(getattr(transformers, f"{kind}Config")(**SMALL, **options))
    return SpeechTower(getattr(transformers, f"{kind}Model")(config))


def voices(name: str) -> Tower:
    if name == "tiny":
        return TinyVoice(32, 16000)
    if name == "wavlm":
        return speech("WavLM")
    stable = {"feat_extract_norm": "layer", "do_stable_layer_norm": True} if name == "wav2vec2 large" else {}
    return speech("Wav2Vec2", **stable)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' WavLM, about its own masks
@pytest.mark.parametrize("name", ["tiny", "wav2vec2", "wav2vec2 large", "wavlm"])
def test_padding_is_not_heard(name: str) -> None:
    tower = voices(name).eval()
    lengths = torch.tensor([16000, 7000, 4100])
    clips = [torch.randn(int(length)) for length in lengths]
    batch = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with torch.no_grad():
        together = tower(batch, lengths)
        alone = torch.cat([tower(clip[None], length[None]) for clip, length in zip(clips, lengths)])
        deaf = tower(batch, torch.full((3,), 16000))
    assert (together - alone).abs().max() < 1e-3
    assert functional.cosine_similarity(together, alone).min() > 1 - 1e-6
    assert (deaf[1:] - alone[1:]).abs().max() > 1e-2  # without the mask it would be


def test_the_mean_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [math.nan]]])
    assert masked_mean(hidden, torch.tensor([2])).item() == 2.0


@pytest.mark.parametrize(("how", "trained"), [("all", set()), ("top_k", {"3"}), ("none", {"0", "1", "2", "3"})])
def test_what_is_frozen_has_no_gradient_and_stays_in_eval_mode(how: str, trained: set[str]) -> None:
    tower = TinyFace(16)
    for layer in tower.layers:
        layer.append(nn.Dropout(0.5))
    tower.freeze(how, 1)
    tower.train()
    assert {name.split(".")[1] for name, one in tower.named_parameters() if one.requires_grad} == trained
    assert {str(number) for number, layer in enumerate(tower.layers) if layer[-1].training} == trained
    assert tower.training is bool(trained)


def test_the_last_blocks_of_real_towers_are_trained() -> None:
    import transformers

    vit = ViTTower(transformers.ViTModel(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8),
        add_pooling_layer=False))
    vit.freeze("top_k", 1)
    assert {name.split(".")[1:3][0] for name, one in vit.named_parameters() if one.requires_grad} == {"layers", "layernorm"}
    assert not any(name.startswith(("net.layers.0", "net.layers.1")) for name, one in vit.named_parameters()
                   if one.requires_grad)
    voice = voices("wav2vec2")
    voice.freeze("top_k", 1)
    voice.train()
    assert all(name.startswith("net.encoder.layers.1") for name, one in voice.named_parameters() if one.requires_grad)
    assert not voice.net.feature_extractor.training and voice.net.encoder.layers[1].training
    with pytest.raises(ValueError, match="top_k: 5, but the tower has 2 blocks"):
        voice.freeze("top_k", 5)


@pytest.mark.parametrize(("kind", "millions"), [("ViT", 85.8), ("Wav2Vec2", 94.4), ("WavLM", 94.4)])
def test_the_full_size(kind: str, millions: float) -> None:
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{kind}Config")()
        options = {"add_pooling_layer": False} if kind == "ViT" else {}
        net = getattr(transformers, f"{kind}Model")(without_chance(config), **options)
        tower = ViTTower(net) if kind == "ViT" else SpeechTower(net)
        heads = FaceVoice(tower.width, tower.width)
    assert tower.width == 768
    assert sum(one.numel() for one in tower.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert heads.face[0].weight.shape == (512, 768)
