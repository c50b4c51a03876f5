"""The media doctor and the procedural set of sounds and pictures, as commands."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jobs.data.__main__ import main
from jobs.data.clips import check_files, clips_fingerprint, read_clips
from jobs.data.sounds import CLASSES, make
from jobs.runtime import JobError


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    return ended.value.code


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make(tmp_path / "set", {"train": 12, "val": 4}, 16, 16_000, 1.0, 0)
    return tmp_path / "set"


def test_the_procedural_set_is_sound_and_the_same_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        assert run("sounds", str(tmp_path / name), "--train", "8", "--val", "4", "--test", "0") == 0
    assert "8 + 4 + 0 pairs of 4 classes" in capsys.readouterr().out
    first, second = (read_clips(tmp_path / name, "train") for name in ("a", "b"))
    assert clips_fingerprint(first) == clips_fingerprint(second)
    assert [clip.audio.read_bytes() for clip in first] == [clip.audio.read_bytes() for clip in second]
    assert [clip.label for clip in first] == [*CLASSES, *CLASSES]
    assert run("media", str(tmp_path / "a"), "--rate", "16000") == 0
    out = capsys.readouterr().out
    assert "train        8 pairs      0 bad  4 classes, 2 to 2 each" in out and "16000 Hz, 1 channel, PCM_16" in out


def damage(data: Path) -> dict[str, str]:
    """Row -> what is wrong with it."""
    rows = read_clips(data, "train")
    rows[0].audio.unlink()
    rows[1].audio.write_bytes(b"")
    rows[2].audio.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    rows[3].audio.write_bytes(rows[4].audio.read_bytes()[:-100])
    soundfile.write(rows[5].audio, np.zeros(16_000), 16_000)
    rows[6].image.write_bytes(b"no picture")
    rows[7].image.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    soundfile.write(rows[8].audio, 0.1 * np.ones(1000), 8_000)
    kinds = ["missing", "zero-length", "LFS pointer", "corrupt", "silence", "corrupt", "LFS pointer"]
    return {rows[index].name: kind for index, kind in zip((0, 1, 2, 3, 5, 6, 7), kinds)}


def test_everything_that_is_wrong_is_listed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = damage(data)
    odd = read_clips(data, "train")[8].name
    assert run("media", str(data), "--rate", "16000", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert {one["row"]: one["kind"] for one in said["findings"] if one["error"]} == wrong
    assert {(one["row"], one["kind"]) for one in said["findings"] if not one["error"]} == {(odd, "wrong rate"), (odd, "short")}
    assert (said["pairs"], said["usable"]) == (16, 9)
    assert run("media", str(data), "--rate", "16000") == 1
    out = capsys.readouterr().out
    assert "NOT sound: 16 pairs, 7 cannot be used" in out and "silence" in out
    with pytest.raises(JobError, match="2 of 24 files are missing or empty: .*train-00000"):
        check_files(read_clips(data, "train"))


def test_a_sound_in_two_splits_is_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "val_metadata.json"
    rows = json.loads(path.read_text())
    rows[0]["audio_path"] = "audio/train-00000.wav"
    path.write_text(json.dumps(rows))
    assert run("media", str(data), "--rate", "16000") == 1
    assert "is in train too" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "said"), [
    (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"), (b"{", "no JSON"), (b"[]", "at least one"),
    (b'[{"video_id": "a", "audio_path": "a.wav"}]', "row 0 has no image_path")])
def test_metadata_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "train_metadata.json").write_bytes(content)
    with pytest.raises(JobError, match=said):
        read_clips(tmp_path, "train")
