"""Samples of several posed views on disk: list files, cameras, PNG headers, and every defect they can have.

    data_train.txt                one sample directory per line
    SAMPLE/opencv_cameras.json    {id, frames: [{w, h, fx, fy, cx, cy, w2c, file_path}]}; other keys are ignored,
                                  but `rig` (models.rigs.to_record), which is compared with the frames
    SAMPLE/images/cam_000.png …   RGBA, straight alpha, square (or straight in SAMPLE/)

All of this is checked before training starts, without decoding a pixel.
"""
from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.runtime import JobError
from models import rigs
from models.cameras import Rig, camera_defects, invert_rigid

CAMERAS = "opencv_cameras.json"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_PNG_WITH_ALPHA = (4, 6)  # colour types: grey + alpha, RGBA
_SHOWN = 10  # defects in one message

_AIM = ("behind-camera", "misses-object")  # defects of cameras that do not see the world origin
_REMEDIES = {
    "shape": "write w2c as four rows of four numbers",
    "non-finite": "recompute this camera; the calibration of this view failed",
    "intrinsics": "write fx, fy in pixels of this image",
    "not-rigid": "w2c is world -> camera, row-major: a rotation, a translation and the row 0 0 0 1",
    "mirrored": "negate the flipped axis (the row of R) and its translation",
    "behind-camera": "if the file holds camera -> world matrices, invert them; z points forward",
    "misses-object": "move the object to the world origin, or check cx, cy and the rotation",
}


class BadSample(JobError):
    """A sample that cannot be used: which file of which sample, what is wrong, what to do."""

    def __init__(self, sample: str, file: str, defect: str, remedy: str) -> None:
        self.sample, self.file, self.defect, self.remedy = sample, file, defect, remedy
        super().__init__(f"{sample}: {file}: {defect}", remedy)

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.sample, self.file, self.defect, self.remedy)


@dataclass(frozen=True)
class Frame:
    """One view: its picture and its camera, in pixels of that picture."""

    image: Path
    size: int  # px, square
    fxfycxcy: tuple[float, float, float, float]
    w2c: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Sample:
    name: str  # as in the list file
    frames: tuple[Frame, ...]
    digest: str  # of opencv_cameras.json and the image sizes in bytes
    rig: Rig | None = None  # the one it says it was made for; None: it says nothing

    def c2w(self) -> Tensor:
        """[V, 4, 4] camera -> world."""
        return invert_rigid(torch.tensor([frame.w2c for frame in self.frames], dtype=torch.float64)).float()

    def fxfycxcy(self, size: int) -> Tensor:
        """[V, 4] px, for pictures resized to size x size."""
        rows = [[value * size / frame.size for value in frame.fxfycxcy] for frame in self.frames]
        return torch.tensor(rows, dtype=torch.float64).float()


def read_list(path: Path) -> tuple[list[tuple[str, Path | None]], str]:
    """The lines of a list file -> ([(line, sample directory or None when there is none)], how paths were
    meant).

    A line is an absolute path, or relative to the list file, or to the current directory, in that order.
    Raises JobError when the file is missing, unreadable or empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise JobError(f"list file {path}: {reason}",
                       "training.dataset.path and training.validation.path name a text file with one sample "
                       "directory per line") from None
    lines = [line for line in lines if line]
    if not lines:
        raise JobError(f"list file {path}: it names no sample", "write one sample directory per line")
    found = [(line, *_find(line, path.parent)) for line in lines]
    rules = Counter(rule for _, _, rule in found if rule)
    said = ", ".join(f"{count} {rule}" for rule, count in rules.items())
    return [(line, directory) for line, directory, _ in found], said


def _find(line: str, list_directory: Path) -> tuple[Path | None, str]:
    given = Path(line)
    if given.is_absolute():
        return (given, "absolute") if given.is_dir() else (None, "")
    for base, rule in ((list_directory, "relative to the list file"),
                       (Path.cwd(), "relative to the current directory")):
        if (base / given).is_dir():
            return base / given, rule
    return None, ""


def read_sample(name: str, directory: Path | None, centred: bool = True) -> Sample:
    """Read and check cameras and PNG headers; `centred`: the object is at the world origin. Raises BadSample."""
    if directory is None:
        raise BadSample(name, "directory", "does not exist (looked relative to the list file and to the "
                        "current directory)", "correct or remove this line of the list file")
    raw = read_cameras(name, directory)
    frames = tuple(_read_frame(name, directory, index, frame, centred)
                   for index, frame in enumerate(raw["frames"]))
    digest = hashlib.sha256(json.dumps(raw["frames"], sort_keys=True).encode())
    for frame in frames:
        digest.update(str(frame.image.stat().st_size).encode())
    sample = Sample(name, frames, digest.hexdigest())
    return replace(sample, rig=_carried_rig(sample, directory, raw.get("rig")))


def _carried_rig(sample: Sample, directory: Path, record: Any) -> Rig | None:
    """The rig that the file names, after a comparison with its frames: cameras that were moved afterwards no
    longer belong to it."""
    if not isinstance(record, dict) or "fingerprint" not in record:  # somebody else's key
        return None
    where = str(directory / CAMERAS)
    try:
        rig = _rig_from(json.dumps(record, sort_keys=True))
    except ValueError as error:
        raise BadSample(sample.name, where, str(error), "write the sample again with the tool that made it") from None
    if len(rig.names) != len(sample.frames):
        raise BadSample(sample.name, where, f"has {len(sample.frames)} frames, its rig {len(rig.names)} views",
                        "write the sample again with the tool that made it")
    found = rig_of_frames(sample, rig.names)
    if difference := rig.difference(found):
        raise BadSample(sample.name, where, f"its cameras are not those of the rig it carries: {difference}",
                        "restore the cameras, or remove the key `rig` if they were changed on purpose")
    return rig


def rig_of_frames(sample: Sample, names: tuple[str, ...]) -> Rig:
    """The cameras of a sample under the given names."""
    size = sample.frames[0].size
    return Rig(names, sample.c2w(), sample.fxfycxcy(size), size, size)


@lru_cache(maxsize=64)
def _rig_from(record: str) -> Rig:
    return rigs.from_record(json.loads(record))


def read_cameras(name: str, directory: Path) -> dict[str, Any]:
    """opencv_cameras.json as it is, with its list `frames`. Raises BadSample."""
    path = directory / CAMERAS
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise BadSample(name, str(path), str(error.strerror),
                        "every sample needs its cameras in this file") from None
    except ValueError as error:
        raise BadSample(name, str(path), f"is not JSON: {error}", "write the file again") from None
    frames = raw.get("frames") if isinstance(raw, dict) else None
    if not isinstance(frames, list) or not frames:
        raise BadSample(name, str(path), "has no list `frames`",
                        "it should hold {id, frames: [{w, h, fx, fy, cx, cy, w2c, file_path}]}")
    return raw


def _read_frame(name: str, directory: Path, index: int, raw: Any, centred: bool) -> Frame:
    where = f"{directory / CAMERAS}, frame {index}"
    missing = [key for key in ("w", "h", "fx", "fy", "cx", "cy", "w2c", "file_path")
               if not isinstance(raw, dict) or key not in raw]
    if missing:
        raise BadSample(name, where, f"lacks {', '.join(missing)}", "add what is missing")
    try:
        width, height = int(raw["w"]), int(raw["h"])
        fxfycxcy = tuple(float(raw[key]) for key in ("fx", "fy", "cx", "cy"))
        w2c = tuple(tuple(float(value) for value in row) for row in raw["w2c"])
        defects = camera_defects([list(row) for row in w2c], *fxfycxcy, width, height)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadSample(name, where, f"a camera value is no number: {error}", "write plain numbers") from None
    if not centred:
        defects = [defect for defect in defects if not defect.startswith(_AIM)]
    if defects:
        raise BadSample(name, f"{where} ({raw['file_path']})", defects[0],
                        _REMEDIES.get(defects[0].split(":")[0], "correct the camera"))
    image = _find_image(name, directory, str(raw["file_path"]))
    size = _check_png(name, image)
    if (width, height) != size:
        raise BadSample(name, str(image),
                        f"is {size[0]} x {size[1]} px, its camera is for {width} x {height}",
                        "the intrinsics must belong to this image; scale them with it")
    return Frame(image, width, fxfycxcy, w2c)


def _find_image(name: str, directory: Path, file_path: str) -> Path:
    for place in (directory / file_path, directory / Path(file_path).name):
        if place.is_file():
            return place
    raise BadSample(name, str(directory / file_path), "the image does not exist",
                    "restore it, or remove the sample from the list")


def _check_png(name: str, path: Path) -> tuple[int, int]:
    """(width, height) in px of a whole, square, 8-bit PNG with alpha."""
    try:
        with open(path, "rb") as file:
            head = file.read(26)
            file.seek(max(0, path.stat().st_size - len(_PNG_END)))
            tail = file.read()
    except OSError as error:
        raise BadSample(name, str(path), str(error.strerror), "make the file readable") from None
    again = "render or export this image again"
    if len(head) < 26 or not head.startswith(_PNG):
        raise BadSample(name, str(path), "is not a PNG image", again)
    if tail != _PNG_END:
        raise BadSample(name, str(path), "is a truncated PNG: its end is missing", again)
    width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
    if width != height:
        raise BadSample(name, str(path), f"is not square: {width} x {height} px",
                        "crop or pad it, and move cx, cy accordingly")
    if depth != 8 or colour not in _PNG_WITH_ALPHA:
        raise BadSample(name, str(path),
                        f"has no 8-bit alpha channel (bit depth {depth}, colour type {colour})",
                        "save it as 8-bit RGBA with straight alpha: the alpha is the object's mask")
    return width, height


def check_view_count(samples: Iterable[Sample], expected: int) -> list[BadSample]:
    """Samples with another number of views than `expected`."""
    return [BadSample(sample.name, CAMERAS, f"has {len(sample.frames)} views, the others have {expected}",
                      "every sample of a run needs the same views in the same order")
            for sample in samples if len(sample.frames) != expected]


def usual_view_count(samples: list[Sample]) -> int:
    """The number of views that most samples have; the larger one of two equally frequent."""
    counts = Counter(len(sample.frames) for sample in samples)
    return max(counts, key=lambda views: (counts[views], views))


def summary_of(defects: list[BadSample]) -> JobError:
    """One error for all that was found."""
    first = defects[0]
    if len(defects) == 1:
        return first
    lines = [f"{d.sample}: {d.file}: {d.defect}\n    {d.remedy}" for d in defects[:_SHOWN]]
    more = [f"… and {len(defects) - _SHOWN} more"] if len(defects) > _SHOWN else []
    return JobError(f"{len(defects)} bad samples:\n  " + "\n  ".join(lines + more),
                    "mend them, or leave them out with training.dataset.on_bad: skip")


def data_fingerprint(samples: list[Sample]) -> str:
    """sha256 over names, cameras and image sizes in bytes, in the order of the list; where the data lies and
    what the pixels are does not enter: reading every byte of it would take longer than most starts."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.name}\n{sample.digest}\n".encode())
    return digest.hexdigest()


def angles_deg(c2w: Tensor) -> Tensor:
    """[V, V] angles in degrees between the normalised viewing directions of c2w [V, 4, 4]."""
    forward = torch.nn.functional.normalize(c2w[:, :3, 2].double(), dim=1)
    return torch.rad2deg(torch.arccos((forward @ forward.T).clamp(-1, 1)))
