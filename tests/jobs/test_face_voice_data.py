"""Whose faces and voices: four layouts, nobody on two sides, and files that are read or named."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from configs.face_voice import Data, Source, Split
from jobs.data import identities
from jobs.data.__main__ import main as data_tools
from jobs.data.pairs import People, Person, check_disjoint, find_people, split
from jobs.data.seen_heard import Clip, FaceForm, Faces, Pairs, VoiceForm, Voices, checked, read_face, read_voice
from jobs.loader import Draw
from jobs.runtime import AgreedError, JobError
from jobs.world import World

CLIP = Clip(1.0, 0.3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("people") / "set"
    identities.make(out, 10, 3, 16, 8000, 0)
    return out


def shape_of(people: People) -> dict[str, tuple[list[str], list[str]]]:
    return {one.name: ([path.name for path in one.faces], [path.name for path in one.voices]) for one in people.persons}


# --- layouts --------------------------------------------------------------------------------------------------------

def test_the_layout_of_voxceleb(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "set")
    shutil.rmtree(tmp_path / "set/id00002/voices")
    people = find_people(Source(voxceleb=str(tmp_path / "set"), genders=str(made / "genders.tsv")))
    assert len(people.persons) == 9 and "left out: id00002 (no voices)" in people.notes
    assert shape_of(people)["id00001"] == (["000.png", "001.png", "002.png"], ["000.wav", "001.wav", "002.wav"])
    assert {one.gender for one in people.persons} == {"f", "m"}


def test_two_folders_are_matched_by_base_name(made: Path, tmp_path: Path) -> None:
    for source, target in (("id00001/faces/000.png", "faces/anna.png"), ("id00001/voices/000.wav", "wav/anna.wav"),
                           ("id00002/faces/000.png", "faces/bert.png"), ("id00003/voices/000.wav", "wav/carl.wav"),
                           ("id00004/faces/000.png", "faces/dora/1.png"), ("id00004/voices/000.wav", "wav/dora/1.wav"),
                           ("id00004/faces/001.png", "faces/dora/2.png"), ("id00004/voices/001.wav", "wav/dora/2.wav")):
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / source, tmp_path / target)
    people = find_people(Source(faces=str(tmp_path / "faces"), voices=str(tmp_path / "wav")))
    assert shape_of(people) == {"anna": (["anna.png"], ["anna.wav"]), "dora": (["1.png", "2.png"], ["1.wav", "2.wav"])}
    assert people.notes == ("1 faces without a voice: bert", "1 voices without a face: carl")
    by_letter = find_people(Source(faces=str(tmp_path / "faces"), voices=str(tmp_path / "wav"), identity=r"^(\w)"))
    assert by_letter.names == {"a", "d"}


def test_a_pair_list_and_what_shares_a_file_is_one_identity(tmp_path: Path) -> None:
    lines = ["x/1.jpg\tx/1.wav", "x/1.jpg\tx/2.wav", "x/3.jpg\tx/2.wav", "y/1.jpg\ty/1.wav", "z.jpg\tz.wav\tzoe",
             "id00007/a.jpg\tid00007_b.wav", "", "# a comment"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    people = find_people(Source(pairs=str(tmp_path / "pairs.txt")))
    assert sorted(map(len, (one.voices for one in people.persons))) == [1, 1, 1, 2]
    assert {"zoe", "id00007"} < people.names
    joined = next(one for one in people.persons if len(one.voices) == 2)
    assert [path.name for path in joined.faces] == ["1.jpg", "3.jpg"] and joined.samples == 2


def test_json_pairs(tmp_path: Path) -> None:
    rows = [{"face": "a.jpg", "voice": "a.wav", "identity": "anna", "gender": "f"},
            {"face": "b.jpg", "voice": "b.wav", "identity": "anna"}, {"face": "c.jpg", "voice": "c.wav"}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    people = find_people(Source(pairs=str(tmp_path / "pairs.json")))
    anna = next(one for one in people.persons if one.name == "anna")
    assert (len(anna.faces), anna.gender, len(people.persons)) == (2, "f", 2)


@pytest.mark.parametrize(("name", "text", "said"), [
    ("pairs.txt", "a.jpg a.wav\n", "pairs.txt:1: expected <face>TAB<voice>"),
    ("pairs.txt", "a.jpg\ta.wav\tx\na.jpg\tb.wav\ty\n", "a.jpg belongs to two identities: x and y"),
    ("pairs.txt", "id00001/a.jpg\tid00002/a.wav\n", "but their names say id00001 and id00002"),
    ("pairs.txt", "", "there is nobody with a face and a voice"),
    ("pairs.json", "[{]", "is no JSON"),
    ("pairs.json", '[{"face": "a.jpg"}]', "entry 0: voice must be text"),
    ("absent.txt", None, "No such file"),
])
def test_a_list_that_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(JobError, match=said.replace("[", r"\[")):
        find_people(Source(pairs=str(tmp_path / name)))


# --- the split ------------------------------------------------------------------------------------------------------

def some_people(count: int, first: int = 0) -> People:
    return People(tuple(Person(f"p{number:03d}", tuple(Path(f"{number}-{place}.png") for place in range(4)),
                               tuple(Path(f"{number}-{place}.wav") for place in range(5)))
                        for number in range(first, first + count)))


def test_nobody_is_on_two_sides_of_a_split() -> None:
    parts = split(some_people(40), Split(val=0.2, test=0.2, seen=0.25))
    sides = [parts.train.names, parts.val.names, parts.test.names]
    assert [len(names) for names in sides] == [24, 8, 8] and len(set.union(*sides)) == 40
    assert parts.seen.names == parts.train.names
    for person, kept_back in zip(parts.train.persons, parts.seen.persons):
        assert not set(person.faces) & set(kept_back.faces) and not set(person.voices) & set(kept_back.voices)
        assert (len(kept_back.faces), len(kept_back.voices)) == (1, 1)


def test_a_split_does_not_move_when_somebody_is_added() -> None:
    few, many = split(some_people(40), Split()), split(some_people(41), Split())
    assert len(few.train.names & many.train.names) >= len(few.train.names) - 2
    assert split(some_people(40), Split(seed=1)).test.names != few.test.names


def test_too_few_people_to_split_are_refused() -> None:
    with pytest.raises(JobError, match="two of each are needed"):
        split(some_people(8), Split())


def test_identities_that_are_trained_on_are_refused_in_a_test() -> None:
    with pytest.raises(JobError, match=r"data.test: 2 of 5 identities are trained on too: p008, p009") as caught:
        check_disjoint(some_people(10).names, some_people(5, 8), "data.test", allow_overlap=False)
    assert "data.allow_overlap=true" in str(caught.value) and "--allow-overlap" in str(caught.value)
    allowed = check_disjoint(some_people(10).names, some_people(5, 8), "data.test", allow_overlap=True)
    assert allowed is not None and "2 of 5" in allowed
    assert check_disjoint(some_people(10).names, some_people(5, 10), "data.test", allow_overlap=False) is None


@pytest.mark.parametrize(("data", "said"), [
    ({}, "`procedural`: one of"), ({"faces": "a"}, "`voices`: faces and voices"),
    ({"voxceleb": "a", "pairs": "b"}, "are both given"), ({"voxceleb": "a", "identity": "x"}, "exactly one group"),
    ({"voxceleb": "a", "val": Source(pairs="b")}, "`test`: val and test are given together")])
def test_a_config_that_names_no_one_data_set_is_refused(data: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Data(**data)


# --- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rate", "channels", "encoding", "ending"), [
    (8000, 1, "PCM_16", "wav"), (16000, 2, "PCM_24", "wav"), (44100, 1, "FLOAT", "wav"), (48000, 2, "ULAW", "wav"),
    (22050, 1, "PCM_U8", "wav"), (16000, 1, "PCM_16", "flac")])
def test_a_voice_in_any_rate_channels_and_encoding_is_the_same_voice(tmp_path: Path, rate: int, channels: int,
                                                                    encoding: str, ending: str) -> None:
    time = np.arange(rate) / rate
    sound = 0.5 * np.sin(2 * np.pi * 220 * time)[:, None].repeat(channels, 1)
    soundfile.write(tmp_path / f"a.{ending}", sound, rate, encoding)
    heard = read_voice(tmp_path / f"a.{ending}", VoiceForm(8000), CLIP)
    assert heard.shape == (8000,) and heard.mean().abs() < 1e-3 and heard.var() == pytest.approx(1, abs=1e-3)
    assert torch.fft.rfft(heard).abs().argmax() == 220


def test_bad_files_are_named_all_at_once(made: Path, tmp_path: Path, alone: World) -> None:
    shutil.copytree(made, tmp_path / "set")
    bad = {"id00001/voices/000.wav": b"RIFF", "id00002/voices/001.wav": b"", "id00003/faces/000.png": b"not a picture",
           "id00004/voices/002.wav": b"version https://git-lfs.github.com/spec/v1\n"}
    for name, content in bad.items():
        (tmp_path / "set" / name).write_bytes(content)
    soundfile.write(tmp_path / "set/id00005/voices/000.wav", np.ones(800) * 0.1, 8000)
    people = find_people(Source(voxceleb=str(tmp_path / "set")))
    with pytest.raises(AgreedError) as caught:
        checked(people, CLIP, "error", alone)
    assert all(name in str(caught.value) for name in [*bad, "id00005/voices/000.wav"])
    assert "is 0.10 s long, at least 0.3 s are needed" in str(caught.value)
    left = checked(people, CLIP, "skip", alone)
    assert sum(len(one.faces) + len(one.voices) for one in left.persons) == 60 - 5
    assert left.notes[0].startswith("5 bad files left out")


def test_a_file_whose_body_is_damaged_is_named_when_it_is_read(made: Path, tmp_path: Path) -> None:
    picture = made / "id00001/faces/000.png"
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:300])
    with pytest.raises(JobError, match="cut.png cannot be read as a picture"):
        read_face(tmp_path / "cut.png", FaceForm(16))
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 8000)
    with pytest.raises(JobError, match="silent.wav is silent"):
        read_voice(tmp_path / "silent.wav", VoiceForm(8000), CLIP)


def test_each_encoder_has_its_own_constants(made: Path) -> None:
    path, sound = made / "id00001/faces/000.png", made / "id00001/voices/000.wav"
    plain = read_face(path, FaceForm(16, (0.0,) * 3, (1.0,) * 3))
    shifted = read_face(path, FaceForm(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(shifted * torch.tensor([0.2, 0.3, 0.4])[:, None, None],
                               plain - torch.tensor([0.5, 0.4, 0.3])[:, None, None])
    assert read_voice(sound, VoiceForm(8000, normalised=False), CLIP).abs().max() < 1
    assert read_voice(sound, VoiceForm(8000), CLIP).std() == pytest.approx(1, abs=1e-2)


def test_a_batch_is_a_function_of_its_draws(made: Path) -> None:
    people = find_people(Source(voxceleb=str(made)))
    source = Pairs(people, Faces(FaceForm(16), flip=True), Voices(VoiceForm(8000), Clip(0.5, 0.3)), 0)
    assert len(source) == 30
    first, again = (source.batch([Draw(step, index) for index in range(30)]) for step in (4, 4))
    later = source.batch([Draw(5, index) for index in range(30)])
    assert torch.equal(first.faces, again.faces) and torch.equal(first.voices, again.voices)
    assert first.names == again.names and first.names != later.names
    assert not torch.equal(first.faces, later.faces)  # mirrored or not
    for name, number in zip(first.names, first.identities.tolist()):
        face, voice = name.split(" + ")
        assert Path(face).parts[-3] == Path(voice).parts[-3] == people.persons[number].name


# --- the procedural set ---------------------------------------------------------------------------------------------

def test_the_procedural_set_is_the_same_each_time(made: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["identities", str(tmp_path / "again"), "--identities", "10", "--media", "3", "--size", "16"]
    with pytest.raises(SystemExit) as ended:
        data_tools(argv)
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"10 identities with 3 faces and 3 voices each in {tmp_path / 'again'}\n"
    for path in made.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(made)).read_bytes() == path.read_bytes()
    assert not identities.make(tmp_path / "again", 10, 3, 16, 8000, 0)
    with pytest.raises(JobError, match="is not this data set"):
        identities.make(tmp_path / "again", 10, 3, 16, 8000, 1)


def test_a_face_is_another_one_in_each_file(made: Path) -> None:
    pictures = []
    for number in range(3):
        with Image.open(made / f"id00001/faces/{number:03d}.png") as picture:
            pictures.append(np.array(picture))
    assert not np.array_equal(pictures[0], pictures[1]) and pictures[0].shape == (16, 16, 3)
