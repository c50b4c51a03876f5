"""Pairs of a sound and a picture: `data/<set>/{audio/*.wav, frames/*.jpg, {train,val,test}_metadata.json}`.

A metadata file is a list of rows {video_id, audio_path, image_path, class or label, text}; paths are relative to the
set's folder. `label` and `text` may be missing.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from jobs.data.audio import read_audio
from jobs.loader import Draw
from jobs.memory import Memory
from jobs.runtime import JobError
from jobs.world import mixed_seed

SPLITS = ("train", "val", "test")
_METADATA = "{}_metadata.json"
_LFS = b"version https://git-lfs"
_KEPT = 256 << 20  # bytes of read pairs that one process keeps


@dataclass(frozen=True)
class Clip:
    """One row."""

    name: str  # video_id
    audio: Path
    image: Path
    label: str | None
    text: str

    @property
    def caption(self) -> str:
        """What the picture is called."""
        return self.text or self.label or ""


@dataclass(frozen=True)
class ClipBatch:
    """A few pairs."""

    draws: list[Draw]
    clips: list[Clip]
    features: Tensor  # [B, …] of the sounds, mono float32 at the audio tower's rate, cropped to its length
    pixels: Tensor  # [B, 3, S, S] uint8
    whole: list[bool]  # the sound was not cropped: it is the same in every pass

    @property
    def names(self) -> list[str]:
        return [clip.name for clip in self.clips]


def read_clips(root: Path, split: str) -> list[Clip]:
    """The rows of one split, in their order. Raises JobError with the file, the row and what is wrong."""
    path = root / _METADATA.format(split)
    rows = _rows(path)
    clips = [_clip(root, path, number, row) for number, row in enumerate(rows)]
    names = [clip.name for clip in clips]
    if twice := sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []:
        raise JobError(f"{path}: the video_id {twice[0]} stands there {names.count(twice[0])} times",
                       "a pair may be in a split once")
    return clips


def check_files(clips: Sequence[Clip]) -> None:
    """Raises JobError when a file is not there or empty: better now than in the middle of a run."""
    bad = [str(path) for clip in clips for path in (clip.audio, clip.image)
           if not path.is_file() or not path.stat().st_size]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise JobError(f"{len(bad)} of {2 * len(clips)} files are missing or empty: {', '.join(bad[:3])}{more}",
                       "`python -m jobs.data media DIR` lists all that is wrong with a data set")


def clips_fingerprint(clips: Sequence[Clip]) -> str:
    """sha256 over names, labels, texts, and names and sizes of files: not over their content."""
    digest = hashlib.sha256()
    for clip in clips:
        sizes = [(path.name, path.stat().st_size) for path in (clip.audio, clip.image)]
        digest.update(repr((clip.name, clip.label, clip.text, sizes)).encode())
    return digest.hexdigest()


def spread(clips: list[Clip], most: int | None) -> list[Clip]:
    """At most so many of them, evenly over the list."""
    if most is None or most >= len(clips):
        return clips
    return [clips[number * len(clips) // most] for number in range(most)]


def splits_of(root: Path) -> list[str]:
    """The splits of a set that are there."""
    return [split for split in SPLITS if (root / _METADATA.format(split)).is_file()]


def _rows(path: Path) -> list[Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}", "a data set is a folder with train_metadata.json, "
                                                    "val_metadata.json, audio/ and frames/") from None
    if raw.startswith(_LFS):
        raise JobError(f"{path} is a git-lfs pointer, not the metadata", "fetch the file itself: git lfs pull")
    try:
        rows = json.loads(raw)
    except ValueError as error:
        raise JobError(f"{path} is no JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise JobError(f"{path}: a list of rows is needed, with at least one")
    return rows


def _clip(root: Path, path: Path, number: int, row: Any) -> Clip:
    wrong = [key for key in ("video_id", "audio_path", "image_path")
             if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key]]
    if wrong:
        raise JobError(f"{path}: row {number} has no {' and no '.join(wrong)}",
                       "a row is {video_id, audio_path, image_path, class, text}")
    label = row.get("class", row.get("label"))
    return Clip(row["video_id"], root / row["audio_path"], root / row["image_path"],
                None if label is None else str(label), str(row.get("text") or ""))


class Clips:
    """Pairs as the trainer wants them. A clip that is too long is cropped at its middle, or anywhere (`anywhere`: by
    the draw); a shorter one is left as it is. `features` makes of sounds what the audio tower takes: here, because it
    is slow and the loader's processes can do it. What was read is kept, up to a limit."""

    def __init__(self, clips: Sequence[Clip], rate: int, seconds: float, size: int, seed: int,
                 features: Callable[[list[np.ndarray]], Tensor], anywhere: bool = False) -> None:
        self.clips, self.size = list(clips), size
        self._rate, self._most = rate, round(rate * seconds)
        self._seed, self._features, self._anywhere = seed, features, anywhere
        self._memory = Memory(_KEPT)  # pictures, and the features of sounds that need no crop

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, draws: list[Draw]) -> ClipBatch:
        """Raises JobError naming the file that cannot be used."""
        heard = [self._heard(draw) for draw in draws]
        return ClipBatch(draws, [self.clips[draw.index] for draw in draws], torch.cat([one for one, _ in heard]),
                         self.pictures([draw.index for draw in draws]), [whole for _, whole in heard])

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """[B, 3, S, S] uint8. Raises JobError."""
        return torch.stack([self._picture(index) for index in indices])

    def _picture(self, index: int) -> Tensor:
        return self._memory.get_or_make(("picture", index), lambda: read_picture(self.clips[index].image, self.size))

    def _heard(self, draw: Draw) -> tuple[Tensor, bool]:
        """The features [1, …] of one sound, and whether it is whole."""
        if (kept := self._memory.get(("sound", draw.index))) is not None:
            return kept, True
        sound = read_audio(self.clips[draw.index].audio, self._rate)
        spare = len(sound) - self._most
        if spare <= 0:
            return self._memory.keep(("sound", draw.index), self._features([sound])), True
        first = mixed_seed("crop", self._seed, draw.step, draw.index) % (spare + 1) if self._anywhere else spare // 2
        return self._features([sound[first:first + self._most]]), False


def cropped(sound: np.ndarray, rate: int, seconds: float) -> np.ndarray:
    """The middle of a sound that is too long: what validation and generation hear."""
    most = round(rate * seconds)
    first = max(0, len(sound) - most) // 2
    return sound[first:first + most]


def read_picture(path: Path, size: int) -> Tensor:
    """uint8 [3, size, size]: the middle square, resized. Raises JobError naming the file."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise JobError(f"{path} is no picture that can be read: {_why(path, error)}",
                       "`python -m jobs.data media` lists all such files") from None
    side = min(picture.size)
    left, top = ((edge - side) // 2 for edge in picture.size)
    picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _why(path: Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS))
    except OSError as missing:
        return missing.strerror or str(missing)
    return "it is empty (0 bytes)" if not start else "it is a git-lfs pointer" if start == _LFS else str(error)

