"""Parts of CLAP2Diffusion that its guarantees do not reach: crops, caches, a judge with weights, a gate's target."""
from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from configs.keys import holds_path
from jobs.clap_caches import use_caches
from jobs.clap_components import folder_of
from jobs.clap_encoders import Clip as ClipJudge, Templates
from jobs.clap_made import _text
from jobs.clap_stage import Chances, ClapStage
from jobs.data.clips import Clip, Clips, cropped, spread
from jobs.data.sounds import picture
from jobs.loader import Draw
from jobs.runtime import JobError
from models.mvdiffusion import without_progress_bars

RATE = 1000


@pytest.fixture
def ramp(tmp_path: Path) -> Clips:
    """One clip of 3 s, whose samples rise; the audio tower hears 1 s of it, and gets the samples themselves."""
    soundfile.write(tmp_path / "a.wav", np.linspace(0, 1, 3 * RATE), RATE, subtype="FLOAT")
    from PIL import Image
    Image.fromarray(picture(0, 8, np.random.default_rng(0))).save(tmp_path / "a.png")
    clip = Clip("a", tmp_path / "a.wav", tmp_path / "a.png", "disc", "")
    return Clips([clip], RATE, 1.0, 8, 0, lambda sounds: torch.from_numpy(np.stack(sounds)))


def test_a_long_clip_is_cropped_in_the_middle_and_in_training_anywhere(ramp: Clips) -> None:
    middle = ramp.batch([Draw(0, 0)])
    assert middle.features.shape == (1, RATE) and middle.whole == [False]
    assert torch.equal(middle.features, ramp.batch([Draw(7, 0)]).features)
    assert middle.features[0, 0] == pytest.approx(1 / 3, abs=1e-3)
    anywhere = Clips(ramp.clips, RATE, 1.0, 8, 0, lambda sounds: torch.from_numpy(np.stack(sounds)), anywhere=True)
    first, again, other = (anywhere.batch([Draw(step, 0)]).features for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(cropped(np.zeros(500), RATE, 1.0)) == 500


def test_items_are_spread_over_the_list(ramp: Clips) -> None:
    clips = [ramp.clips[0]] * 3 + [Clip("b", Path(), Path(), None, "")] * 3
    assert [clip.name for clip in spread(clips, 2)] == ["a", "b"] and spread(clips, None) is clips


def test_every_cache_has_a_place_and_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE")
    for name in names:
        monkeypatch.setenv(name, "")
    use_caches(tmp_path, offline=True)
    assert all(os.environ[name].startswith(str(tmp_path)) for name in names[:5]) and os.environ["HF_HUB_OFFLINE"] == "1"
    assert not list(tmp_path.iterdir())


def test_a_download_is_said_and_named_when_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_given: object, **_named: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    said: list[str] = []
    with pytest.raises(JobError, match="hub:some/model cannot be downloaded: no network"):
        folder_of("hub:some/model", said.append)
    assert said == [f"downloading some/model from the hub into {tmp_path}"]
    assert folder_of("/models/sd15", said.append) == Path("/models/sd15") and len(said) == 1
    assert not holds_path("hub:some/model") and holds_path("hub/some/model")


def test_a_judge_takes_pictures_for_what_they_are() -> None:
    random = np.random.default_rng(0)
    pictures = torch.stack([torch.from_numpy(picture(kind % 4, 16, random)).permute(2, 0, 1).float() / 255 for kind in range(32)])
    labels = [str(kind % 4) for kind in range(32)]
    embeddings = torch.eye(4)[[kind % 4 for kind in range(32)]] + 3.0
    judge = Templates(pictures, embeddings, labels, ["0", "1", "2", "3"])
    taken = judge.pictures(pictures).argmax(1)
    assert (taken == torch.tensor([kind % 4 for kind in range(32)])).float().mean() > 0.9
    assert judge.sounds(embeddings).argmax(1).tolist() == [kind % 4 for kind in range(32)]


def test_clip_can_judge(tmp_path: Path) -> None:
    text = dict(vocab_size=82, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                max_position_embeddings=24, bos_token_id=80, eos_token_id=81, pad_token_id=81)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8)
    with without_progress_bars():
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    _text(16)[1].save_pretrained(tmp_path)
    pictures = torch.rand(3, 3, 16, 16)
    judge = ClipJudge(tmp_path, pictures, torch.rand(3, 4), ["a", "b", "a"], ["a", "b"], torch.device("cpu"))
    found = judge.pictures(pictures)
    assert found.shape == (3, 2) and found.sum(1).tolist() == pytest.approx([1.0] * 3)
    with pytest.raises(JobError, match="image_encoder: no CLIP can be read"):
        ClipJudge(tmp_path / "nothing", pictures, torch.rand(3, 4), ["a", "b", "a"], ["a", "b"], torch.device("cpu"))


def test_a_wished_gate_ends_the_stage_and_is_called_a_value_only() -> None:
    stage = ClapStage.__new__(ClapStage)
    stage.ends_within((0.35, 0.45))
    assert stage.finished({"val/gate": 0.2}) is None
    assert "no proof" in str(stage.finished({"val/gate": 0.4}))
    stage.ends_within(None)
    assert stage.finished({"val/gate": 0.4}) is None


def test_the_chances_of_a_sample_are_its_own() -> None:
    one, again, other = (Chances(0, step, 3, (3, 4, 4), 1000) for step in (5, 5, 6))
    assert torch.equal(one.noise, again.noise) and (one.t, one.hears) == (again.t, again.hears)
    assert not torch.equal(one.noise, other.noise)
    hears = [Chances(0, 0, index, (1,), 1000).hears >= 0.3 for index in range(400)]
    assert 0.6 < sum(hears) / len(hears) < 0.8
