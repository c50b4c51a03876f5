"""Sample directories and data sets are written here and nowhere else: cameras with the record of their rig, and whole
data sets that appear complete or not at all.
"""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jobs.data.lists import LISTS, METADATA, Entry, Listing, each
from jobs.data.samples import BadSample
from jobs.runtime import JobError
from models import rigs
from models.cameras import Rig, invert_rigid

R = TypeVar("R")


def write_cameras(path: Path, name: str, rig: Rig, images: list[str], keep: dict[str, Any] | None = None) -> None:
    """opencv_cameras.json of a sample: the cameras of `rig` with its record, and `images` relative to `path`.

    `keep`: a file of the same views whose other keys are kept.
    """
    keep = keep or {}
    before = keep.get("frames") or [{}] * len(images)
    w2c = invert_rigid(rig.c2w.double()).tolist()
    frames = [{**old, "w": rig.width, "h": rig.height, "fx": k[0], "fy": k[1], "cx": k[2], "cy": k[3], "w2c": pose,
               "file_path": image}
              for old, pose, k, image in zip(before, w2c, rig.fxfycxcy.tolist(), images)]
    path.write_text(json.dumps({"id": name, **keep, "rig": rigs.to_record(rig), "frames": frames}, indent=1))


@contextmanager
def new_data_set(out: Path, made: dict[str, Any]) -> Iterator[Path | None]:
    """A directory that becomes `out` when the block ends without an error, with `made` as its metadata.json.

    Yields None when exactly this data set is there already. Raises JobError when something else is.
    """
    if (out / METADATA).is_file() and json.loads((out / METADATA).read_bytes()) == made:
        yield None
        return
    if out.exists() and (not out.is_dir() or os.listdir(out)):
        raise JobError(f"{out} is not empty and is not this data set", "name a new directory, or remove it first")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        (aside / METADATA).write_text(json.dumps(made, indent=1))
        os.rename(aside, out)
    except OSError as error:
        raise JobError(f"cannot write {error.filename or out}: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def derive(lists: list[Listing], out: Path, made: dict[str, Any], change: Callable[[Entry, Path], R],
           workers: int | None) -> list[R]:
    """A data set made from another one: `change(entry, directory)` writes one sample into its new directory.

    Samples take the names of their directories. The lists keep their order and their names; one that is not called
    data_*.txt becomes data_train.txt. Raises JobError, and then leaves nothing.
    """
    entries = _by_directory_name(lists)
    with new_data_set(out, made) as directory:
        if directory is None:
            raise JobError(f"{out} is there already, made by the same command", "remove it to make it again")
        results = list(each(partial(_change_one, change, directory), list(entries.items()), workers, out.name))
        for listing in lists:
            file = listing.path.name if fnmatch(listing.path.name, LISTS) else "data_train.txt"
            lines = [f"{entry.directory.name}\n" for entry in listing.entries if entry.directory]
            (directory / file).write_text("".join(lines))
    return results


def _change_one(change: Callable[[Entry, Path], R], out: Path, item: tuple[str, Entry]) -> R:
    name, entry = item
    (out / name).mkdir()
    return change(entry, out / name)


def _by_directory_name(lists: list[Listing]) -> dict[str, Entry]:
    """Every sample once. Raises JobError for a missing one, or two directories of one name."""
    found: dict[str, Entry] = {}
    for entry in (entry for listing in lists for entry in listing.entries):
        if entry.directory is None:
            raise BadSample(entry.name, "directory", "does not exist", "correct or remove this line of the list file")
        other = found.setdefault(entry.directory.name, entry)
        if other.directory is not None and other.directory.resolve() != entry.directory.resolve():
            raise JobError(f"two samples are called {entry.directory.name}: {other.directory} and {entry.directory}",
                           "rename one, or make two data sets")
    return found
