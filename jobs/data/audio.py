"""Sound files: mono float32 at the rate that is asked for, or a clear word about what is wrong with the file.

Whatever libsndfile reads (wav of any width, A-law and mu-law, flac, ogg, mp3) at any rate and with any number of
channels. libsndfile itself reads what is left of a file that was cut, and calls it whole: that is looked for here.
"""
from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from jobs.runtime import JobError

SILENT_PEAK = 1e-4  # full scale is 1; 16-bit noise of one step is 3e-5
_LFS = b"version https://git-lfs"
_UNKNOWN = (0, 0xFFFFFFFF)  # what a program that writes into a pipe puts where the length belongs
_LFS_HINT = "fetch the file itself: git lfs pull"


class AudioError(JobError):
    """A sound file that cannot be used: which, `what` is wrong with it, what to do."""

    def __init__(self, path: str | Path, what: str, hint: str | None = None) -> None:
        self.path, self.defect = Path(path), what
        super().__init__(f"{path} {what}", hint)

    def __reduce__(self) -> tuple[type[AudioError], tuple[Path, str, str | None]]:
        """The way out of a loader process."""
        return AudioError, (self.path, self.defect, self.hint)


@dataclass(frozen=True)
class Recording:
    """What the header of a sound file says."""

    rate: int  # Hz
    channels: int
    frames: int
    encoding: str  # PCM_16, ULAW, DOUBLE, …

    @property
    def seconds(self) -> float:
        return self.frames / self.rate


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """float32 [samples], mono, at `rate` Hz, full scale 1. Channels are averaged; another rate is resampled (soxr).

    Raises AudioError: missing, empty, an LFS pointer, cut short, no sound file, no samples, not finite.
    """
    path = Path(path)
    heard = probe_audio(path)
    try:
        samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(path, f"cannot be read to its end: {error}", "write it again from its source") from None
    mono = samples.mean(1)
    if not np.isfinite(mono).all():
        raise AudioError(path, "holds samples that are not finite numbers", "write it again from its source")
    if heard.rate != rate:
        mono = soxr.resample(mono, heard.rate, rate)
    return np.ascontiguousarray(mono, dtype=np.float32)


def probe_audio(path: str | Path) -> Recording:
    """What the header says, held against the file's length. Raises AudioError as `read_audio` does."""
    path = Path(path)
    _check_bytes(path)
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(path, f"is no sound file that can be read: {error}",
                         "write it again as wav, flac, ogg or mp3") from None
    if info.frames < 1:
        raise AudioError(path, "has a header but holds no samples", "write it again, or take it out of the data")
    return Recording(info.samplerate, info.channels, info.frames, info.subtype)


def _check_bytes(path: Path) -> None:
    """Raises AudioError for what libsndfile words badly or does not notice."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            if not start:
                raise AudioError(path, "is empty (0 bytes)", "write it again, or take it out of the data")
            if start.startswith(_LFS):
                raise AudioError(path, "is a git-lfs pointer, not the sound", _LFS_HINT)
            if start[:4] == b"RIFF" and (missing := _missing_bytes(file)):
                raise AudioError(path, f"is cut short: {missing} bytes of sound that its header names are not there",
                                 "copy it again, or take it out of the data")
    except OSError as error:
        raise AudioError(path, f"cannot be opened: {error.strerror}", "is its path right in the metadata?") from None


def _missing_bytes(file: BinaryIO) -> int:
    """How much shorter a RIFF wav is than its data chunk says; 0 when it is whole or says nothing."""
    size = os.fstat(file.fileno()).st_size
    place = 12  # behind RIFF, length, WAVE
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        place += 8
        if name == b"data":
            return 0 if length in _UNKNOWN else max(0, place + length - size)
        place += length + length % 2
    return 0
