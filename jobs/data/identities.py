"""A procedural set of people: `python -m jobs.data identities OUT [--identities 220 --media 6 --size 32 --seed 0]`.

Two numbers are a person: the first drives the pitch of the voice and the shape of the face, the second the formants and
the colour of the face. All the rest (vowels, loudness, noise; place, light, background) is another one in each file.
Who hears a voice can tell the face only by what the two numbers say. In the layout of VoxCeleb, with a table of
genders.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from jobs.data.writing import new_data_set
from jobs.runtime import JobError
from jobs.world import mixed_seed

GENDERS = "genders.tsv"
_VERSION = 1
_VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))  # Hz
_BANDWIDTH = 90.0  # Hz


def latents(seed: int, person: int) -> tuple[float, float]:
    """In 0..1 each."""
    first, second = np.random.default_rng(mixed_seed("identity", seed, person)).random(2)
    return float(first), float(second)


def make_face(who: tuple[float, float], size: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [size, size, 3]."""
    shape, colour = who
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1  # -1..1
    x, y = x - random.uniform(-0.15, 0.15), y - random.uniform(-0.12, 0.12)
    scale = random.uniform(0.9, 1.1)
    across, down = scale * (0.38 + 0.3 * shape), scale * (0.78 - 0.14 * shape)
    skin = np.array([0.9 - 0.25 * colour, 0.45 + 0.3 * colour, 0.3 + 0.5 * colour])
    picture = np.broadcast_to(random.uniform(0.1, 0.9, 3), (size, size, 3)).copy()
    _fill(picture, (x / across) ** 2 + (y / down) ** 2, skin)
    for side in (-1, 1):
        _fill(picture, ((x - side * across * 0.45) / 0.09) ** 2 + ((y + 0.18) / 0.07) ** 2, np.full(3, 0.08))
    open_by = random.uniform(0.04, 0.14)
    _fill(picture, (x / (across * 0.45)) ** 2 + ((y - 0.35) / open_by) ** 2, np.array([0.6, 0.2, 0.2]))
    lit = picture * random.uniform(0.75, 1.15) * (1 + random.uniform(-0.25, 0.25) * x[..., None])
    return (np.clip(lit + random.normal(0, 0.04, lit.shape), 0, 1) * 255).round().astype(np.uint8)


def _fill(picture: np.ndarray, distance: np.ndarray, colour: np.ndarray) -> None:
    """Where `distance` from the middle of an ellipse is below 1, with a soft edge."""
    inside = np.clip((1 - distance) * 4, 0, 1)[..., None]
    picture += inside * (colour - picture)


def make_voice(who: tuple[float, float], rate: int, random: np.random.Generator) -> np.ndarray:
    """float32 [samples] of 0.7 to 1.3 seconds: a few vowels on one breath."""
    pitch, formants = who
    length = int(rate * random.uniform(0.7, 1.3))
    time = np.arange(length) / rate
    bend = 1 + 0.06 * np.sin(2 * np.pi * random.uniform(1, 3) * time + random.uniform(0, 6.28))
    base = 85 * (240 / 85) ** pitch * random.uniform(0.95, 1.05)
    phase = 2 * np.pi * np.cumsum(base * bend) / rate
    scale = (0.8 + 0.5 * formants) * random.uniform(0.98, 1.02)
    peaks = _peaks(length, random) * scale
    sound = np.zeros(length)
    for harmonic in range(1, int(0.45 * rate / base) + 1):
        hertz = harmonic * base
        resonance = sum(1 / (1 + ((hertz - peak) / _BANDWIDTH) ** 2) for peak in peaks)
        sound += (resonance + 0.01) / harmonic * np.sin(harmonic * phase)
    sound *= np.sin(np.pi * np.arange(length) / length) ** 0.3
    sound = sound / np.abs(sound).max() * random.uniform(0.2, 0.8)
    return (sound + random.normal(0, 0.01, length)).clip(-1, 1).astype(np.float32)


def _peaks(length: int, random: np.random.Generator) -> np.ndarray:
    """The formants [3, length] of three vowels, one gliding into the next."""
    chosen = np.array([_VOWELS[index] for index in random.integers(0, len(_VOWELS), 3)], dtype=float)
    places = np.linspace(0, 1, 3)
    return np.stack([np.interp(np.linspace(0, 1, length), places, chosen[:, formant]) for formant in range(3)])


def make(out: Path, identities: int, media: int, size: int, rate: int, seed: int) -> bool:
    """Write the data set; False when exactly this one is there already. Raises JobError."""
    wanted = {"made_by": "jobs.data.identities", "version": _VERSION, "identities": identities, "media": media,
              "size": size, "rate": rate, "seed": seed}
    with new_data_set(out, wanted) as directory:
        if directory is not None:
            for person in range(identities):
                _write(directory / name_of(person), latents(seed, person), media, size, rate, seed, person)
            rows = [f"{name_of(person)}\t{'f' if latents(seed, person)[0] > 0.5 else 'm'}\n"
                    for person in range(identities)]
            (directory / GENDERS).write_text("identity\tgender\n" + "".join(rows))
    return directory is not None


def name_of(person: int) -> str:
    return f"id{person + 1:05d}"


def media_of(folder: Path, media: int) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The faces and the voices of one person."""
    return (tuple(folder / "faces" / f"{number:03d}.png" for number in range(media)),
            tuple(folder / "voices" / f"{number:03d}.wav" for number in range(media)))


def _write(folder: Path, who: tuple[float, float], media: int, size: int, rate: int, seed: int, person: int) -> None:
    for kind in ("faces", "voices"):
        (folder / kind).mkdir(parents=True)
    for number, (face, voice) in enumerate(zip(*media_of(folder, media))):
        random = np.random.default_rng(mixed_seed("media", seed, person, number))
        Image.fromarray(make_face(who, size, random)).save(face)
        soundfile.write(voice, make_voice(who, rate, random), rate, "PCM_16")


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("identities", help="make a small procedural set of faces and voices")
    parser.add_argument("out", type=Path, help="a directory to make")
    parser.add_argument("--identities", type=int, default=220, help="people (220)")
    parser.add_argument("--media", type=int, default=6, help="faces, and as many voices, of each (6)")
    parser.add_argument("--size", type=int, default=32, help="px of a face (32)")
    parser.add_argument("--rate", type=int, default=8000, help="Hz of a voice (8000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    if min(given.identities, given.media, given.size) < 1 or given.rate < 8000:
        raise JobError("--identities, --media and --size must be at least 1, --rate at least 8000")
    new = make(given.out, given.identities, given.media, given.size, given.rate, given.seed)
    print(f"{given.identities} identities with {given.media} faces and {given.media} voices each in {given.out}"
          + ("" if new else " (there already)"))
    return 0
