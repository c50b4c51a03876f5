"""Sound files as people have them: other rates, channels and encodings are read, damaged ones are named."""
from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jobs.data.audio import AudioError, probe_audio, read_audio

RATE, HZ = 48_000, 440.0


def tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * HZ * np.arange(int(rate * seconds)) / rate)


def write(path: Path, rate: int = RATE, channels: int = 1, subtype: str = "PCM_16") -> Path:
    """The tone in every channel, its sign alternating in all but the first two of five."""
    columns = [tone(rate) * (1 if index < 3 else (-1) ** index) for index in range(channels)]
    soundfile.write(path, np.stack(columns, 1), rate, subtype=subtype)
    return path


def pitch(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax()) * rate / len(samples)


@pytest.mark.parametrize(("rate", "channels", "subtype"), [
    (RATE, 1, "PCM_16"), (16_000, 1, "PCM_16"), (44_100, 2, "PCM_24"), (RATE, 5, "PCM_16"), (22_050, 1, "DOUBLE"),
    (8_000, 1, "ULAW"), (8_000, 1, "ALAW"), (RATE, 1, "FLOAT")])
def test_every_rate_width_and_number_of_channels_is_read(tmp_path: Path, rate: int, channels: int, subtype: str) -> None:
    path = write(tmp_path / "a.wav", rate, channels, subtype)
    samples = read_audio(path, RATE)
    assert samples.dtype == np.float32 and samples.ndim == 1 and samples.flags.c_contiguous
    assert len(samples) == RATE // 2
    assert pitch(samples, RATE) == pytest.approx(HZ, abs=2)
    loudness = 0.5 * (3 + 1 - 1) / 5 if channels == 5 else 0.5  # the mean of the channels
    assert np.abs(samples[1000:-1000]).max() == pytest.approx(loudness, abs=0.02)
    heard = probe_audio(path)
    assert (heard.rate, heard.channels, heard.encoding, heard.seconds) == (rate, channels, subtype, 0.5)


def test_a_wav_without_a_length_from_a_pipe_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav")
    raw = bytearray(path.read_bytes())
    place = raw.index(b"data")
    raw[4:8] = raw[place + 4:place + 8] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)
    assert len(read_audio(path, RATE)) == RATE // 2


def cut(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:20])


def not_finite(path: Path) -> None:
    samples = tone(RATE)
    samples[7] = np.nan
    soundfile.write(path, samples, RATE, subtype="FLOAT")


@pytest.mark.parametrize(("damage", "said", "hint"), [
    (lambda path: None, "cannot be opened: No such file", "metadata"),
    (lambda path: path.write_bytes(b""), "is empty (0 bytes)", "write it again"),
    (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "is a git-lfs pointer", "git lfs pull"),
    (lambda path: path.write_bytes(b"<html>404</html>"), "is no sound file", "write it again"),
    (lambda path: soundfile.write(path, np.zeros(0), RATE), "holds no samples", "take it out"),
    (cut, "is cut short: 1000 bytes", "copy it again"),
    (cut_in_the_header, "is no sound file", "write it again"),
    (not_finite, "not finite", "from its source"),
])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, damage, said: str, hint: str) -> None:
    path = tmp_path / "dog.wav"
    damage(path)
    with pytest.raises(AudioError) as caught:
        read_audio(path, RATE)
    assert str(path) in caught.value.what and said in caught.value.what and hint in str(caught.value.hint)
    again = pickle.loads(pickle.dumps(caught.value))  # the way out of a loader process
    assert str(again) == str(caught.value) and again.path == path
