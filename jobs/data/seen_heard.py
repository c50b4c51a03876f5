"""A face from a picture and a voice from a recording, as a tower wants them; a bad file is named.

What is drawn at random (the piece of a recording, the mirrored face) is a function of the draw.
"""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from jobs.batch import TensorBatch
from jobs.data.audio import SILENT_PEAK, AudioError, probe_audio, read_audio
from jobs.data.pairs import People, Person, some
from jobs.loader import Draw
from jobs.runtime import JobError
from jobs.world import World, mixed_seed

_THREADS = 8  # files looked at in parallel: most of the time is spent in waiting for a file server
_UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class FaceForm:
    """What a face tower takes: a square of `size` px, (rgb in 0..1 - mean) / std."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VoiceForm:
    """What a voice tower takes: mono at `rate` Hz, each clip of mean 0 and variance 1 where `normalised`."""

    rate: int
    normalised: bool = True


@dataclass(frozen=True)
class Clip:
    """Which part of a recording: at most `seconds`, never less than `least`."""

    seconds: float
    least: float


def read_face(path: Path, form: FaceForm, mirrored: bool = False) -> Tensor:
    """[3, size, size] normalised; the centre square of the picture. Raises JobError."""
    try:
        with Image.open(path) as picture:
            square = ImageOps.fit(_flat(picture), (form.size, form.size), Image.Resampling.BICUBIC)
    except _UNREADABLE as error:
        raise JobError(f"{path} cannot be read as a picture: {_why(error)}",
                       "write it again, or take it out of the data") from None
    if mirrored:
        square = ImageOps.mirror(square)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(form.mean)[:, None, None]) / torch.tensor(form.std)[:, None, None]


def _flat(picture: Image.Image) -> Image.Image:
    """RGB as it is looked at: turned as its camera says, over black where it is transparent."""
    picture = ImageOps.exif_transpose(picture)
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def read_voice(path: Path, form: VoiceForm, clip: Clip, draw: int | None = None) -> Tensor:
    """[samples] normalised: the middle of the recording, or the piece that `draw` says. Raises JobError."""
    sound = read_audio(path, form.rate)
    if len(sound) < clip.least * form.rate:
        raise _too_short(path, len(sound) / form.rate, clip)
    longest = round(clip.seconds * form.rate)
    spare = max(0, len(sound) - longest)
    start = spare // 2 if draw is None else draw % (spare + 1)
    piece = torch.from_numpy(sound[start:start + longest].copy())
    if piece.abs().max() < SILENT_PEAK:
        raise AudioError(path, "is silent where it is listened to", "take it out of the data")
    if not form.normalised:
        return piece
    return (piece - piece.mean()) / (piece.var(correction=0) + 1e-7).sqrt()


def _too_short(path: Path, seconds: float, clip: Clip) -> AudioError:
    return AudioError(path, f"is {seconds:.2f} s long, at least {clip.least:g} s are needed",
                      "take it out of the data, or lower training.clips.min_s")


def checked(people: People, clip: Clip, on_bad: str, world: World) -> People:
    """Without the files whose head says that they cannot be read. Raises AgreedError for the first of them unless
    `on_bad` is skip."""
    paths = [path for person in people.persons for path in (*person.faces, *person.voices)]
    faces = {path for person in people.persons for path in person.faces}

    def defect(path: Path) -> JobError | None:
        try:
            _look_at(path, path in faces, clip)
        except JobError as error:
            return error
        return None

    mine = paths[world.rank::world.size]
    with ThreadPoolExecutor(_THREADS) as threads:
        found = {path: error for path, error in zip(mine, threads.map(defect, mine)) if error}
    bad = {path: error for part in world.gather(found) for path, error in part.items()}
    if bad and on_bad == "error":
        world.agree(JobError(f"{len(bad)} of {len(paths)} files cannot be used:\n  " + "\n  ".join(
            error.what for error in list(bad.values())[:10]) + ("\n  …" if len(bad) > 10 else ""),
            "mend them, or leave them out: --set data.on_bad=skip"))
    return _without(people, bad) if bad else people


def _look_at(path: Path, face: bool, clip: Clip) -> None:
    if not face:
        heard = probe_audio(path)
        if heard.seconds < clip.least:
            raise _too_short(path, heard.seconds, clip)
        return
    try:
        with Image.open(path) as picture:
            if min(picture.size) < 2:
                raise JobError(f"{path} is a picture of {picture.width} x {picture.height} px")
    except _UNREADABLE as error:
        raise JobError(f"{path} cannot be read as a picture: {_why(error)}") from None


def _without(people: People, bad: dict[Path, JobError]) -> People:
    left = [replace(person, faces=tuple(path for path in person.faces if path not in bad),
                    voices=tuple(path for path in person.voices if path not in bad)) for person in people.persons]
    persons = tuple(person for person in left if person.faces and person.voices)
    gone = sorted(people.names - {person.name for person in persons})
    notes = [f"{len(bad)} bad files left out (on_bad: skip):", *(f"  {error.what}" for error in bad.values())]
    if gone:
        notes.append(f"nothing is left of {len(gone)} identities: {some(gone)}")
    return People(persons, (*people.notes, *notes))


@dataclass(frozen=True)
class Batch(TensorBatch):
    """`faces`: [B, 3, S, S] or the features [B, C] of a frozen tower; `voices`: [B, T] padded with 0 behind `lengths`
    [B], or features and no lengths."""

    faces: Tensor
    voices: Tensor
    lengths: Tensor | None
    identities: Tensor  # [B]
    names: list[str]


class Medium(Protocol):
    """How a file becomes what a batch holds of it."""

    def read(self, path: Path, draw: int | None = None) -> Tensor:
        """None: the same each time. Raises JobError."""

    def together(self, items: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Of a batch: stacked or padded, and in that case the lengths."""


@dataclass(frozen=True)
class Faces:
    """Pictures for a tower."""

    form: FaceForm
    flip: bool = False

    def read(self, path: Path, draw: int | None = None) -> Tensor:
        return read_face(path, self.form, self.flip and draw is not None and draw % 2 == 1)

    def together(self, items: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return torch.stack(items), None


@dataclass(frozen=True)
class Voices:
    """Recordings for a tower."""

    form: VoiceForm
    clip: Clip

    def read(self, path: Path, draw: int | None = None) -> Tensor:
        return read_voice(path, self.form, self.clip, None if draw is None else draw // 2)

    def together(self, items: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return padded(items)


def padded(sounds: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, T] with 0 behind each, and the lengths [B]."""
    return torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True), torch.tensor([len(one) for one in sounds])


class Pairs:
    """The training pairs of some people: a jobs.loader.Source.

    Sample i is one face (or voice, whichever an identity has more of) with a voice (face) of the same identity, another
    one each time.
    """

    def __init__(self, people: People, faces: Medium, voices: Medium, seed: int) -> None:
        self._faces, self._voices, self._seed = faces, voices, seed
        self._rows = [(number, person, place) for number, person in enumerate(people.persons)
                      for place in range(person.samples)]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, draws: list[Draw]) -> Batch:
        """Raises JobError for a bad file."""
        seeds = [mixed_seed("pair", self._seed, draw.step, draw.index) for draw in draws]
        rows = [self._rows[draw.index] for draw in draws]
        chosen = [_chosen(person, place, seed) for (_, person, place), seed in zip(rows, seeds)]
        faces, _ = self._faces.together([self._faces.read(face, seed) for (face, _), seed in zip(chosen, seeds)])
        voices, lengths = self._voices.together(
            [self._voices.read(voice, seed) for (_, voice), seed in zip(chosen, seeds)])
        return Batch(faces, voices, lengths, torch.tensor([number for number, *_ in rows]),
                     [f"{face} + {voice}" for face, voice in chosen])


def _chosen(person: Person, place: int, seed: int) -> tuple[Path, Path]:
    faces, voices = person.faces, person.voices
    partner = seed >> 32  # the low bits say how the two are read
    if len(faces) < len(voices):
        return faces[partner % len(faces)], voices[place]
    return faces[place], voices[partner % len(voices)]
