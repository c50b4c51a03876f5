"""Where phase 2 keeps what it made: each sample appears whole or not at all, once, in one of two places.

    artifacts/dataset/metadata.json      the recipe: everything that a sample is a function of
    artifacts/dataset/NAME/              an accepted sample: opencv_cameras.json, images/, metadata.json
    artifacts/rejected/NAME/             one that the quality gate refused, and why in its metadata.json
    artifacts/dataset/data_train.txt …   data_val.txt, report.json, and last of all manifest.json

What is there is the truth about how far the work is; there is no list of what was done.
"""
from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cluster.contract import MANIFEST, sha256_file, write_artifact_manifest, write_atomically
from jobs.data.lists import METADATA
from jobs.data.samples import CAMERAS, read_sample
from jobs.data.sheet import ROWS, make_sheet
from jobs.data.split import TRAIN, VAL, divide
from jobs.data.writing import write_cameras
from jobs.runtime import Job, JobError
from models.cameras import Rig

DATASET, REJECTED, REPORT, SHEET = "dataset", "rejected", "report.json", "contact_sheet.png"
_ASIDE = ".aside-"


@dataclass(frozen=True)
class Item:
    """One sample to make: view `view` of the real sample number `sample`."""

    name: str
    source: str  # the real sample's folder
    frame: str  # the real frame it shows: all of a frame are on one side of the split
    sample: int
    view: int
    seed: int


@dataclass(frozen=True)
class Kept:
    """A sample on disk, by its metadata.json."""

    item: Item
    accepted: bool
    metadata: dict[str, Any]
    size: int  # bytes of all its files


class Damaged(Exception):
    """A sample on disk is not what was written; the message says which file."""


class Store:
    """The two places of one job. Any rank writes samples; `open`, `repair` and `finish` are rank 0's."""

    def __init__(self, artifacts: Path) -> None:
        self.artifacts, self.dataset, self.rejected = artifacts, artifacts / DATASET, artifacts / REJECTED

    def open(self, recipe: dict[str, Any], superseded: bool) -> dict[str, Any]:
        """Begin, or go on with what is there. Returns the recipe on disk: its `batch` counts from now on.

        Raises JobError when what is there was made by another recipe.
        """
        for place in (self.dataset, self.rejected):
            place.mkdir(parents=True, exist_ok=True)
            for leftover in [] if superseded else place.glob(f"{_ASIDE}*"):  # of an attempt that was killed
                shutil.rmtree(leftover, ignore_errors=True)
        path = self.dataset / METADATA
        if not path.is_file():
            write_atomically(path, json.dumps(recipe, indent=1).encode())
            return recipe
        there = json.loads(path.read_bytes())
        changed = [f"{key}: {there.get(key)} there, {recipe.get(key)} now" for key in {**there, **recipe}
                   if key != "batch" and there.get(key) != recipe.get(key)]
        if changed:
            raise JobError(f"{self.dataset} holds samples made in another way:\n    " + "\n    ".join(changed),
                           "one data set is made in one way: restart with the old values, or submit a new job")
        return there

    def batch(self) -> int | None:
        """How many samples are generated together in what is there."""
        path = self.dataset / METADATA
        return json.loads(path.read_bytes())["batch"] if path.is_file() else None

    def check_seen(self, recipe: dict[str, Any]) -> None:
        """Raises JobError when this rank looks at another place than rank 0, which made the recipe."""
        path = self.dataset / METADATA
        if not path.is_file() or json.loads(path.read_bytes()) != recipe:
            raise JobError(f"{os.uname().nodename} does not see the {self.dataset} that rank 0 made",
                           "the nodes of one job need a workdir that all of them see")

    def find(self, item: Item, deep: bool = False) -> Kept | None:
        """The sample on disk, its files checked by size, and with `deep` by content; None: it is still to be made.

        Raises Damaged.
        """
        for place in (self.dataset, self.rejected):
            if (place / item.name).is_dir():
                metadata, size = _checked(place / item.name, deep)
                return Kept(item, place == self.dataset, metadata, size)
        return None

    def remove(self, item: Item) -> None:
        """A damaged sample, so that it is made again."""
        for place in (self.dataset, self.rejected):
            if (place / item.name).is_dir():
                aside = place / f"{_ASIDE}gone-{item.name}"
                os.rename(place / item.name, aside)
                shutil.rmtree(aside, ignore_errors=True)

    def put(self, item: Item, rgba: Tensor, rig: Rig, metadata: dict[str, Any], accepted: bool) -> Kept:
        """Write uint8 [V, S, S, 4]: aside, synced, then renamed. Raises OSError."""
        place = self.dataset if accepted else self.rejected
        aside = place / f"{_ASIDE}{item.name}-{os.uname().nodename}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "images").mkdir(parents=True)
        files = [f"images/cam_{view:03d}.png" for view in range(len(rig.names))]
        for file, picture in zip(files, rgba.cpu().numpy()):
            Image.fromarray(picture, "RGBA").save(aside / file)
        write_cameras(aside / CAMERAS, item.name, rig, files)
        if accepted:
            read_sample(item.name, aside)  # what we write is what we read
        written = {name: {"size": (aside / name).stat().st_size, "sha256": sha256_file(aside / name)}
                   for name in (CAMERAS, *files)}
        metadata = {**metadata, "files": written}
        (aside / METADATA).write_text(json.dumps(metadata, indent=1))
        _sync([*(aside / name for name in (*written, METADATA)), aside / "images", aside])
        _appear(aside, place / item.name)
        return Kept(item, accepted, metadata, _size_of(aside.parent / item.name, metadata))

    def finish(self, job: Job, kept: list[Kept], val_share: float, notes: dict[str, Any]) -> dict[str, Any]:
        """Lists, report, contact sheet, and last the manifest that makes the data set an artifact. Returns the
        report. Raises JobError when a list would be empty."""
        accepted = [one for one in kept if one.accepted]
        if not accepted:
            raise JobError(f"none of {len(kept)} samples passed the quality gate: {words(reasons(kept))}",
                           f"look at them in {self.rejected}; train the generator longer, or widen `quality:`")
        sides = self.lists(accepted, val_share)
        for name, side in sides.items():
            write_atomically(self.dataset / name, "".join(f"{line}\n" for line in side).encode())
        report = {**_report(kept), "train": len(sides[TRAIN]), "val": len(sides[VAL]), **notes}
        write_atomically(self.dataset / REPORT, json.dumps(report, indent=1).encode())
        worst = sorted(accepted, key=lambda one: min(one.metadata["quality"]["explained"]))[:ROWS]
        make_sheet([(read_sample(one.item.name, self.dataset / one.item.name), one.item.name, True) for one in worst],
                   self.artifacts / SHEET)
        write_artifact_manifest(self.dataset, job.id, job.attempt.number)
        return report

    def lists(self, accepted: list[Kept], val_share: float) -> dict[str, list[str]]:
        """The lines of each list file: all samples of a source frame are in one. Raises JobError for one frame."""
        held_out = divide({one.item.frame for one in accepted}, val_share, 0)
        return {TRAIN: [one.item.name for one in accepted if one.item.frame not in held_out],
                VAL: [one.item.name for one in accepted if one.item.frame in held_out]}

    def strangers(self, items: Iterable[Item]) -> list[str]:
        """What lies in the data set and belongs to no item: it would be handed over with it."""
        known = {METADATA, TRAIN, VAL, REPORT, MANIFEST, *(item.name for item in items)}
        return sorted(entry.name for entry in self.dataset.iterdir() if entry.name not in known)


def reasons(kept: Iterable[Kept]) -> Counter[str]:
    """How many samples were rejected for what first."""
    return Counter(one.metadata["rejected"][0][0] for one in kept if not one.accepted)


def words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"


def _report(kept: list[Kept]) -> dict[str, Any]:
    """Counts and reasons: a function of the samples alone."""
    explained = sorted(min(found) for one in kept if (found := one.metadata["quality"]["explained"]))
    rejected = [one for one in kept if not one.accepted]
    return {"samples": len(kept), "accepted": len(kept) - len(rejected), "rejected": len(rejected),
            "reasons": dict(sorted(reasons(kept).items())),
            "least_explained": {"worst": explained[0], "median": explained[len(explained) // 2]} if explained else {},
            "rejected_samples": [{"name": one.item.name, "why": [text for _, text in one.metadata["rejected"]]}
                                 for one in rejected]}


def _checked(directory: Path, deep: bool) -> tuple[dict[str, Any], int]:
    try:
        metadata = json.loads((directory / METADATA).read_bytes())
        for name, expected in metadata["files"].items():
            path = directory / name
            if path.stat().st_size != expected["size"] or deep and sha256_file(path) != expected["sha256"]:
                raise Damaged(f"{path} is not what was written")
        return metadata, _size_of(directory, metadata)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{directory}: {error}") from None


def _size_of(directory: Path, metadata: dict[str, Any]) -> int:
    return (directory / METADATA).stat().st_size + sum(one["size"] for one in metadata["files"].values())


def _appear(aside: Path, final: Path) -> None:
    """One rename. Where the sample is there already (an older attempt that still ran made it), ours, which is the
    same, goes away."""
    try:
        os.rename(aside, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync([final.parent])


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
