"""A few samples of a data set, looked at before training: the first, the last, and others drawn the same each time.

Without torch unless it is asked for: then a sample is read as training reads it.
"""
from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, UnidentifiedImageError

from jobs.runtime import JobError

if TYPE_CHECKING:
    from configs.face_voice import Data, Procedural, Source
    from jobs.data.pairs import Person

DRAWN = 6  # besides the first and the last
LATER = "${"  # in the path of what another job is still to make
_CAMERAS = "opencv_cameras.json"
_LFS = b"version https://git-lfs"
T = TypeVar("T")


@dataclass(frozen=True)
class Defect:
    what: str
    fix: str


def drawn(items: Sequence[T]) -> list[T]:
    """The first, the last, and a few others in their order; the same ones for the same number."""
    count = len(items)
    inner = random.Random(count).sample(range(1, count - 1), min(DRAWN, count - 2)) if count > 2 else []
    return [items[index] for index in sorted({0, count - 1, *inner})]


def look_at_samples(path: Path, as_training: bool) -> list[Defect]:
    """Samples of several views by their list file. Raises JobError: the list itself cannot be read."""
    if as_training:
        return _as_training(path)
    return [defect for name in drawn(_names(path)) if (defect := _sample(path, name))]


def _names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: {error}", "it must be a text file with one sample directory per line") from None
    if not names:
        raise JobError(f"{path} names no sample", "write one sample directory per line")
    return names


def _as_training(path: Path) -> list[Defect]:
    from jobs.data.multiview import check_pixels
    from jobs.data.samples import BadSample, read_list, read_sample

    found = []
    for name, directory in drawn(read_list(path)[0]):
        try:
            check_pixels(read_sample(name, directory))
        except BadSample as bad:
            found.append(Defect(f"{bad.sample}: {bad.file}: {bad.defect}", bad.remedy))
    return found


def _sample(path: Path, name: str) -> Defect | None:
    """Its camera file and every picture that it names."""
    folder = next((one for one in (path.parent / name, Path(name)) if one.is_dir()), None)
    if folder is None:
        return Defect(f"{name}: there is no such directory", f"correct or remove this line of {path}")
    try:
        frames = json.loads((folder / _CAMERAS).read_bytes())["frames"]
        pictures = [_picture(folder, str(frame["file_path"])) for frame in frames]
    except OSError as error:
        return Defect(f"{name}: {folder / _CAMERAS}: {error.strerror}", "every sample needs its cameras in this file")
    except (ValueError, KeyError, TypeError) as error:
        return Defect(f"{name}: {folder / _CAMERAS} cannot be understood: {error!r}",
                      "it should hold {frames: [{w, h, fx, fy, cx, cy, w2c, file_path}]}")
    return next((defect for picture in pictures if (defect := _decoded(picture))), None)


def _picture(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).exists() else folder / Path(name).name


def _decoded(path: Path) -> Defect | None:
    try:
        with Image.open(path) as picture:
            picture.load()
    except UnidentifiedImageError:
        return Defect(f"{path} is no picture{_lfs(path)}", "copy it again")
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
        return Defect(f"{path}: {getattr(error, 'strerror', None) or error}",
                      "restore it, or remove the sample from the list")
    return None


def look_at_clips(root: Path) -> list[Defect]:
    """Pairs of a sound and a picture, by the metadata of a data set's folder. Raises JobError."""
    found = []
    for split in ("train", "val"):
        path = root / f"{split}_metadata.json"
        if split == "val" and not path.exists():
            continue
        for row in drawn(_rows(path)):
            found += [defect for defect in (_sound(root / str(row.get("audio_path"))),
                                            _decoded(root / str(row.get("image_path")))) if defect]
    return found


def look_at_people(source: Source) -> list[Defect]:
    """A face and a voice of some of the people of a data set, as training finds them. Raises JobError."""
    from jobs.data.pairs import find_people
    from jobs.face_voice import with_found_source

    return [defect for person in drawn(find_people(with_found_source(source)).persons)
            for defect in (_decoded(person.faces[0]), _sound(person.voices[0])) if defect]


def look_at_pairs(data: Data, batch: int) -> None:
    """Of people that can all be read. Raises JobError: their split leaves fewer pairs to train on than one batch."""
    from jobs.data.pairs import People, find_people, split
    from jobs.face_voice import check_filled, with_found_source

    people = People(_procedural(data.procedural)) if data.procedural else find_people(with_found_source(data))
    check_filled(batch, people if data.val else split(people, data.split).train)


def _procedural(how: Procedural) -> tuple[Person, ...]:
    """As they will be made."""
    from jobs.data.identities import media_of, name_of
    from jobs.data.pairs import Person

    return tuple(Person(name_of(number), *media_of(Path(name_of(number)), how.media))
                 for number in range(how.identities))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: {error}",
                       "data names a folder of {train,val}_metadata.json, audio/, frames/") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise JobError(f"{path}: it is no list of rows", "[{video_id, audio_path, image_path, …}, …]")
    return rows


def _sound(path: Path) -> Defect | None:
    import soundfile

    try:
        soundfile.read(path, frames=1024)
    except (OSError, soundfile.SoundFileError) as error:
        return Defect(f"{path}: {error}{_lfs(path)}", "copy it again")
    return None


def _lfs(path: Path) -> str:
    """A file that git-lfs has not fetched is a note of three lines."""
    with open(path, "rb") as file:
        return " but a note of git-lfs: git lfs pull" if file.read(len(_LFS)) == _LFS else ""
