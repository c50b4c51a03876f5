"""A small procedural set of sounds and pictures: `python -m jobs.data sounds OUT [--train 128 --val 32 …]`.

Four classes, each a kind of sound with a shape of a colour: a pure tone is a red disc, a buzz of harmonics a blue
square, a rising sweep a green triangle, bursts of noise a yellow cross. Pitch, tempo and loudness differ in every
sound, place, size and shade in every picture: only the class can be told from one about the other.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from jobs.data.writing import new_data_set
from jobs.runtime import JobError
from jobs.world import mixed_seed

CLASSES = ("disc", "square", "triangle", "cross")
DEFAULT = {"train": 128, "val": 32, "test": 32}  # pairs
DEFAULT_SIZE, DEFAULT_RATE, DEFAULT_SECONDS = 16, 16_000, 1.0  # px, Hz
_COLOURS = ((0.85, 0.15, 0.15), (0.15, 0.25, 0.85), (0.15, 0.7, 0.2), (0.9, 0.8, 0.1))
_BACKGROUND = 0.93


def sound(kind: int, rate: int, seconds: float, random: np.random.Generator) -> np.ndarray:
    """float64 [samples] of one class."""
    t = np.arange(round(rate * seconds)) / rate
    if kind == 0:
        wave = np.sin(2 * np.pi * random.uniform(500, 900) * t + random.uniform(0, 6.28))
    elif kind == 1:
        base = random.uniform(80, 160)
        wave = sum(np.sin(2 * np.pi * base * k * t + random.uniform(0, 6.28)) / k for k in range(1, 12)) / 2
    elif kind == 2:
        low, high = random.uniform(300, 600), random.uniform(2500, 4000)
        wave = np.sin(2 * np.pi * (low * t + (high - low) * t * t / (2 * seconds)))
    else:
        beats = (t * random.uniform(6, 10) + random.uniform(0, 1)) % 1 < 0.4
        wave = random.normal(0, 0.5, len(t)) * beats
    return np.clip(random.uniform(0.3, 0.8) * wave + random.normal(0, 0.005, len(t)), -1, 1)


def picture(kind: int, size: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [size, size, 3] of one class."""
    radius = random.uniform(0.3, 0.4)
    x0, y0 = random.uniform(radius + 0.05, 0.95 - radius, 2)
    axis = (np.arange(4 * size) + 0.5) / (4 * size)  # four samples a side of each pixel
    x, y = (axis[None] - x0) / radius, (axis[:, None] - y0) / radius
    inside = (x * x + y * y < 1, np.maximum(abs(x), abs(y)) < 0.85, (y < 0.75) & (y > 2 * abs(x) - 0.95),
              (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 1))[kind]
    share = inside.reshape(size, 4, size, 4).mean((1, 3))[..., None]
    colour = np.clip(np.array(_COLOURS[kind]) + random.normal(0, 0.05, 3), 0, 1)
    background = _BACKGROUND + random.uniform(-0.05, 0.05)
    return (255 * (share * colour + (1 - share) * background)).round().astype(np.uint8)


def make(out: Path, sizes: dict[str, int], size: int, rate: int, seconds: float, seed: int) -> bool:
    """Write the data set, `sizes` pairs of each split; False when exactly this one is there. Raises JobError."""
    wanted = {"made_by": "jobs.data.sounds", "version": 1, **sizes, "size": size, "rate": rate, "seconds": seconds,
              "seed": seed}
    with new_data_set(out, wanted) as directory:
        if directory is not None:
            (directory / "audio").mkdir()
            (directory / "frames").mkdir()
            for split, count in sizes.items():
                rows = [_write(directory, split, number, size, rate, seconds, seed) for number in range(count)]
                if rows:
                    (directory / f"{split}_metadata.json").write_text(json.dumps(rows, indent=1))
    return directory is not None


def made_at(place: Path, seed: int) -> Path:
    """The default set, made at `place` unless it is there. Raises JobError."""
    make(place, DEFAULT, DEFAULT_SIZE, DEFAULT_RATE, DEFAULT_SECONDS, seed)
    return place


def _write(out: Path, split: str, number: int, size: int, rate: int, seconds: float, seed: int) -> dict[str, str]:
    random = np.random.default_rng(mixed_seed("sounds", seed, split, number))
    kind = number % len(CLASSES)
    name = f"{split}-{number:05d}"
    row = {"video_id": name, "audio_path": f"audio/{name}.wav", "image_path": f"frames/{name}.png",
           "class": CLASSES[kind], "text": CLASSES[kind]}
    soundfile.write(out / row["audio_path"], sound(kind, rate, seconds, random), rate, subtype="PCM_16")
    Image.fromarray(picture(kind, size, random)).save(out / row["image_path"])
    return row


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("sounds", help="make a small procedural set of sounds and pictures, four classes")
    parser.add_argument("out", type=Path, help="a directory to make")
    for split, count in DEFAULT.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"pairs of that split ({count})")
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE, help=f"px ({DEFAULT_SIZE})")
    parser.add_argument("--rate", type=int, default=DEFAULT_RATE, help=f"Hz ({DEFAULT_RATE})")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help=f"of each sound ({DEFAULT_SECONDS:g})")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    if min(given.train, given.val, given.size, given.rate) < 1 or given.test < 0 or given.seconds <= 0:
        raise JobError("--train, --val, --size, --rate and --seconds must be above 0, --test not below it")
    sizes = {"train": given.train, "val": given.val, "test": given.test}
    new = make(given.out, sizes, given.size, given.rate, given.seconds, given.seed)
    print(f"{given.train} + {given.val} + {given.test} pairs of {len(CLASSES)} classes in {given.out}"
          + ("" if new else " (there already)"))
    return 0
