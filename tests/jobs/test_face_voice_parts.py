"""What the guards of face-voice matching say and when; features that are kept; towers from a folder."""
from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.contract import read_json_lines
from configs.face_voice import FaceTower, FaceVoiceRun, Guards, VoiceTower
from jobs.alarms import Alarms
from jobs.data.pairs import Parts, People, Person
from jobs.data.seen_heard import Clip, FaceForm, Faces, Pairs, VoiceForm, Voices
from jobs.face_voice import plan_of
from jobs.face_voice_stage import FaceVoiceStage, Matcher, Setting
from jobs.features import Kept, kept_features
from jobs.metrics import Metrics
from jobs.runtime import AgreedError, Job, JobError, NonFinite, StopFlag
from jobs.towers import Built, build_face, build_voice, digest_of, rebuild
from jobs.trainer import Trainer
from jobs.world import World
from models.face_voice import FaceVoice
from models.towers import SpeechTower, TinyFace, TinyVoice, ViTTower
from tests.jobs.conftest import job_in
from tests.jobs.small_face_voice import config_of, tower_folders

WIDTH = 16


# --- trainings on features that need no files ------------------------------------------------------------------------

def people(count: int, media: int, first: int = 0) -> People:
    return People(tuple(Person(f"p{number:04d}", *(tuple(Path(f"{number}/{place}{ending}") for place in range(media))
                                                  for ending in (".png", ".wav")))
                        for number in range(first, first + count)))


def features(everyone: People, telling: bool) -> dict[Path, Tensor]:
    """Of each file; `telling`: a face and a voice of one identity have something in common."""
    found = {}
    for person in everyone.persons:
        own = torch.randn(WIDTH, generator=torch.Generator().manual_seed(int(person.name[1:])))
        for path in (*person.faces, *person.voices):
            random = torch.Generator().manual_seed(zlib.crc32(str(path).encode()))
            noise = torch.randn(WIDTH, generator=random)
            found[path] = (own if telling else own * 0 + 1) + 0.1 * noise
    return found


def training(alone: World, job: Job, telling: bool = True, count: int = 30, media: int = 4, **changes: object) -> Trainer:
    config = msgspec.convert(config_of(Path("nowhere"), "all", **{"batch": 16, "max_steps": 12, **changes}), FaceVoiceRun)
    parts = Parts(people(count, media), people(6, 3, 9000), people(6, 3, 9500), People(()))
    values = {path: row for side in (parts.train, parts.val, parts.test) for path, row in features(side, telling).items()}
    kept = Kept(values)
    torch.manual_seed(0)
    face = Built(TinyFace(WIDTH), FaceForm(16), {}, False)
    voice = Built(TinyVoice(WIDTH, 8000), VoiceForm(8000), {}, False)
    matcher = Matcher(face, voice, FaceVoice(WIDTH, WIDTH, 16), kept, kept, alone.device, False)
    setting = Setting(parts, Pairs(parts.train, kept, kept, 0), matcher, {}, {})
    metrics = Metrics(config.training.max_steps)
    metrics.open(job.attempt.metrics)
    (job.attempt.path / "about").mkdir()
    stage = FaceVoiceStage(config, matcher, setting, metrics, alone, job.attempt.path / "about")
    return Trainer(stage, plan_of(config, alone), alone, job, metrics, StopFlag())


def lines(job: Job, event: str | None = None) -> list[dict]:
    return [line for line in read_json_lines(job.attempt.metrics) if line.get("event") == event]


def test_a_batch_of_1024_trains_on_kept_features(alone: World, job: Job) -> None:
    began = time.monotonic()
    assert training(alone, job, count=300, batch=1024, max_steps=8, schedule={"warmup": 2}).run()
    losses = [line["loss"] for line in lines(job)]
    assert losses[0] > math.log(1024) - 1 and losses[-1] < losses[0] - 0.2
    assert time.monotonic() - began < 60


def test_the_alarm_of_guessing_sounds_where_nothing_can_be_learned_and_not_where_it_can(alone: World, tmp_path: Path,
                                                                                       ) -> None:
    """`telling` False is what towers that are frozen at random give: the same for everybody, and noise."""
    jobs = [job_in(tmp_path / name) for name in ("learning", "guessing")]
    for job, telling in zip(jobs, (True, False)):
        training(alone, job, telling, 30 if telling else 120, max_steps=60, schedule={"warmup": 5},
                 optimizer={"lr": 5e-3 if telling else 1e-3}, guards={"after": 40, "chance_window": 20}).run()
    learning, guessing = ([line["alarm"] for line in lines(job, "alarm")] for job in jobs)
    assert learning == []
    assert any(alarm.startswith(f"the loss stays at ln(batch) = {math.log(16):.3f}") for alarm in guessing)


def test_a_run_may_stop_at_an_alarm(alone: World, job: Job) -> None:
    guards = {"stop": True, "after": 10, "max_cosine": 1.0, "min_std": 0.0, "chance_window": 10, "chance_share": 0.3}
    with pytest.raises(AgreedError, match=r"the loss stays at ln\(batch\)") as caught:
        training(alone, job, False, max_steps=40, guards=guards).run()
    assert caught.value.error.exit_code == 3


# --- what is not finite ----------------------------------------------------------------------------------------------

class Poisoned:
    """Some samples of a source say nan."""

    def __init__(self, source: Pairs, bad: Callable[[int, int], bool]) -> None:
        self._source, self._bad = source, bad

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, draws: list) -> object:
        batch = self._source.batch(draws)
        rows = torch.tensor([self._bad(draw.step, place) for place, draw in enumerate(draws)])
        return replace(batch, voices=torch.where(rows[:, None], math.nan, batch.voices))


def poisoned(alone: World, job: Job, bad: Callable[[int, int], bool], **changes: object) -> Trainer:
    trainer = training(alone, job, **changes)
    trainer.stage.source = Poisoned(trainer.stage.source, bad)
    return trainer


def test_a_step_that_is_not_finite_is_skipped_counted_and_named(alone: World, job: Job) -> None:
    assert poisoned(alone, job, lambda step, place: step == 4 and place in (2, 9)).run()
    (skipped,) = lines(job, "skipped")
    assert skipped["step"] == 5 and skipped["samples_named"].count(" + ") == 2
    steps = lines(job)
    assert steps[4]["loss"] == "nan"  # never 0, never left out
    assert [line["applied"] for line in steps] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11]
    assert all(math.isfinite(line["loss"]) for line in steps if line["step"] != 5)


def test_too_many_in_a_row_or_in_all_end_the_run(alone: World, tmp_path: Path) -> None:
    with pytest.raises(AgreedError, match="3 updates in a row were skipped") as caught:
        poisoned(alone, job_in(tmp_path / "row"), lambda step, place: step > 4 and place == 1,
                 max_consecutive_skips=3).run()
    assert isinstance(caught.value.error, NonFinite)
    with pytest.raises(AgreedError, match="18 of 52 updates were skipped, more than 20%"):
        poisoned(alone, job_in(tmp_path / "ratio"), lambda step, place: step % 3 == 0 and place == 1, max_steps=60).run()


def test_a_loss_that_passes_ln_b_on_its_way_down_is_no_alarm() -> None:
    alarms, chance = Alarms(Guards(after=0, chance_window=20), 64), math.log(64)
    assert not any(alarms.of_loss(step, chance + 0.5 - 0.02 * step) for step in range(60))
    said = [alarms.of_loss(step, chance + 0.02 * (-1) ** step) for step in range(60, 100)]
    assert sum(one is not None for one in said) == 1


def test_collapse_and_chance_are_said_once() -> None:
    alarms = Alarms(Guards(after=0, chance_window=3), 64)
    said = [alarms.of_spread(1, "faces", std, cosine) for std, cosine in ((0.9, 0.1), (0.02, 0.99), (0.02, 0.99))]
    assert said[0] is None and said[2] is None and said[1] is not None and "collapsed" in said[1]
    assert [alarms.of_spread(2, "faces", 0.9, 0.0) for _ in range(3)] == [None] * 3
    assert alarms.of_spread(3, "faces", 0.02, 0.99) is not None
    at_chance = alarms.of_validation(5, 0.52, 0.47, 0.57)
    assert at_chance is not None and "validation is at chance: 1:2 matching 0.520" in at_chance
    assert alarms.of_validation(6, 0.8, 0.7, 0.9) is None


# --- features that are kept ------------------------------------------------------------------------------------------

class Encoder:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, paths: list[Path]) -> Tensor:
        self.asked += [path.name for path in paths]
        return torch.tensor([[float(path.read_text()), 1.0] for path in paths])


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.txt" for number in range(6)]
    for number, path in enumerate(paths):
        path.write_text(str(number))
    return paths


def keep(paths: list[Path], encoder: Encoder, directory: Path, alone: World, tower: str = "a tower",
         stop_asked: Callable[[], bool] = lambda: False) -> Kept | None:
    return kept_features(paths, encoder, tower, directory, 2, alone, stop_asked, lambda text: None)


def test_a_file_and_a_tower_meet_once(files: list[Path], tmp_path: Path, alone: World) -> None:
    encoder, store = Encoder(), tmp_path / "features"
    found = keep(files, encoder, store, alone)
    assert found is not None and [found.read(path).tolist() for path in files] == [[n, 1.0] for n in range(6)]
    (tmp_path / "moved").mkdir()
    moved = [path.rename(tmp_path / "moved" / path.name) for path in files]
    again = keep(moved, encoder, store, alone)
    assert again is not None and again.read(moved[3]).tolist() == [3.0, 1.0] and len(encoder.asked) == 6
    moved[0].write_text("60")
    changed = keep(moved, encoder, store, alone)
    assert changed is not None and changed.read(moved[0]).tolist() == [60.0, 1.0] and len(encoder.asked) == 7
    keep(moved, encoder, store, alone, tower="another tower")
    assert len(encoder.asked) == 13


def test_whoever_is_killed_goes_on_where_it_was(files: list[Path], tmp_path: Path, alone: World,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.features.SHARD", 2)
    encoder, store = Encoder(), tmp_path / "features"
    answers: Iterator[bool] = iter([False, False, True, True])
    assert keep(files, encoder, store, alone, stop_asked=lambda: next(answers)) is None
    assert len(encoder.asked) == 4
    damaged = sorted(store.rglob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:50])  # cut by a full disk, say
    assert keep(files, encoder, store, alone) is not None
    assert len(encoder.asked) == 8 and len(set(encoder.asked)) == 6


def test_features_that_are_not_finite_are_named_and_not_kept(files: list[Path], tmp_path: Path, alone: World) -> None:
    files[4].write_text("nan")
    with pytest.raises(AgreedError, match=r"features of .*4\.txt are not finite"):
        keep(files, Encoder(), tmp_path / "features", alone)


# --- towers from a folder --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("towers")
    tower_folders(out, 32, 1, 16, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]},
                  {"sampling_rate": 16000, "do_normalize": False})
    return out


def test_a_tower_is_what_its_folder_says(folders: Path) -> None:
    face = build_face(FaceTower(path=str(folders / "vit")), 0)
    voice = build_voice(VoiceTower(path=str(folders / "w2v")), 0)
    assert face.form == FaceForm(16, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)) and isinstance(face.tower, ViTTower)
    assert voice.form == VoiceForm(16000, False) and isinstance(voice.tower, SpeechTower)
    assert face.pretrained and voice.pretrained
    assert digest_of(face.tower) == digest_of(build_face(FaceTower(path=str(folders / "vit")), 1).tower)
    for built in (face, voice):
        again = rebuild(json.loads(json.dumps(built.about)))
        again.tower.load_state_dict(built.tower.state_dict())
        assert again.form == built.form
    with torch.no_grad():
        assert face.tower(torch.randn(2, 3, 16, 16)).shape == (2, 32)
        assert voice.tower(torch.randn(2, 8000), torch.tensor([8000, 5000])).shape == (2, 32)


def test_spans_that_no_seed_of_ours_reaches_are_not_masked(folders: Path) -> None:
    """wav2vec2 in training masks spans drawn by numpy and drops layers: a resume would not be exact."""
    tower = build_voice(VoiceTower(path=str(folders / "w2v")), 0).tower.train()
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        np.random.seed(seed)
        found.append(tower(torch.ones(1, 8000), torch.tensor([8000])))
    assert torch.equal(*found)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json: cannot be read"),
    (lambda folder: (folder / "preprocessor_config.json").write_text("{}"), "says nothing of image_mean and image_std"),
    (lambda folder: (folder / "config.json").unlink(), "is no folder of transformers with a config.json"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be read"),
    (lambda folder: _without_a_weight(folder), r"lacks 1 weights of its vit: layernorm.weight"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "holds a bert, the run file says vit")])
def test_a_folder_that_is_not_whole_is_refused(folders: Path, tmp_path: Path, spoil: Callable[[Path], object],
                                               said: str) -> None:
    import shutil

    shutil.copytree(folders / "vit", tmp_path / "vit")
    spoil(tmp_path / "vit")
    with pytest.raises(JobError, match=said):
        build_face(FaceTower(path=str(tmp_path / "vit")), 0)


def _without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_clip_of_a_voice_is_drawn_anew_and_the_middle_in_an_evaluation(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 8000)
    voices = Voices(VoiceForm(8000), Clip(0.5, 0.1))
    drawn = [voices.read(tmp_path / "a.wav", draw) for draw in (2, 2, 9000)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(voices.read(tmp_path / "a.wav"), voices.read(tmp_path / "a.wav"))
    assert isinstance(Faces(FaceForm(16)), Faces)
