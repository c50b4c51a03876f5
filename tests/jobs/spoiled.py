"""Data as they come out of a preparation that went wrong. Each makes `out`."""
from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from PIL import Image

from jobs.data import identities, sounds

_VIEWS = 6


def _samples(mice: Path, which: str) -> list[Path]:
    return [mice / name for name in (mice / f"data_{which}.txt").read_text().split()]


def _picture(sample: Path, view: int) -> Path:
    return sample / "images" / f"cam_{view:03d}.png"


def of_one_camera(mice: Path, out: Path, camera: int, *kept: int) -> Path:
    """An export that wrote the picture of one camera for all views but those kept."""
    shutil.copytree(mice, out)
    for sample in _samples(out, "train"):
        for view in {*range(_VIEWS)} - {camera, *kept}:
            shutil.copyfile(_picture(sample, camera), _picture(sample, view))
    return out


def inputs_of_others(mice: Path, out: Path) -> Path:
    """The first view, which is put in, is that of the next sample."""
    shutil.copytree(mice, out)
    samples = _samples(mice, "train")
    for sample, other in zip(samples, [*samples[1:], samples[0]]):
        shutil.copyfile(_picture(other, 0), _picture(out / sample.name, 0))
    return out


def black_to_validate_on(mice: Path, out: Path) -> Path:
    """Validation was exported without transparency: black where training has none of the object."""
    shutil.copytree(mice, out)
    for sample in _samples(out, "val"):
        for view in range(_VIEWS):
            with Image.open(_picture(sample, view)) as picture:
                ground = Image.new("RGBA", picture.size, (0, 0, 0, 255))
                ground.alpha_composite(picture.convert("RGBA"))
            ground.save(_picture(sample, view))
    return out


def voices_of_others(out: Path, people: int, media: int, size: int, rate: int) -> Path:
    """A table of names that is off by seven rows."""
    identities.make(out, people, media, size, rate, 0)
    names = sorted(path.name for path in out.glob("id*"))
    for name in names:
        (out / name / "voices").rename(out / name / "aside")
    for name, other in zip(names, names[7:] + names[:7]):
        (out / name / "aside").rename(out / other / "voices")
    return out


def sounds_of_others(out: Path) -> Path:
    """The pairs of the training set are mixed up; validation is as it should be."""
    path = sounds.made_at(out, 0) / "train_metadata.json"
    rows = json.loads(path.read_text())
    heard = [row["audio_path"] for row in rows]
    random.Random(0).shuffle(heard)
    path.write_text(json.dumps([row | {"audio_path": one} for row, one in zip(rows, heard)]))
    return out
