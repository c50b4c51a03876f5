"""`python -m jobs.data split DATA`: training and validation lists, all samples of a source frame on one side.

Which side a frame is on depends on the seed and the frame's name alone, so nothing moves when the order changes.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

from jobs.data.lists import Entry, listings, source_of
from jobs.data.samples import CAMERAS
from jobs.runtime import JobError

TRAIN, VAL = "data_train.txt", "data_val.txt"


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("split", help="divide into training and validation by source frame")
    parser.add_argument("data", type=Path, help="a list file, or a folder of samples")
    parser.add_argument("--out", type=Path, help=f"where {TRAIN} and {VAL} go (default: beside the samples)")
    parser.add_argument("--val", type=float, default=0.1, help="share of the source frames to validate on (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", help="regular expression, one group: the source frame in a sample's name "
                                         "(default: source_frame of its metadata.json, else the name)")
    parser.add_argument("--force", action="store_true", help="replace lists that are there")
    parser.add_argument("--json", action="store_true", help="the report for programs")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    if not 0 < given.val < 1:
        raise JobError(f"--val {given.val:g}: a share between 0 and 1, such as 0.1")
    entries = _samples(given.data)
    out = given.out or (given.data if given.data.is_dir() else given.data.parent)
    taken = [str(out / name) for name in (TRAIN, VAL) if (out / name).exists()]
    if taken and not given.force:
        raise JobError(f"{' and '.join(taken)} exist already", "--force replaces them, --out writes elsewhere")
    sources = {entry: source_of(entry, given.source) for entry in entries}
    chosen = divide(set(sources.values()), given.val, given.seed)
    sides = {TRAIN: [entry for entry in entries if sources[entry] not in chosen],
             VAL: [entry for entry in entries if sources[entry] in chosen]}
    out.mkdir(parents=True, exist_ok=True)
    for name, side in sides.items():
        _write(out / name, side)
    frames = len(set(sources.values()))
    report = {"samples": len(entries), "source_frames": frames, "val_source_frames": len(chosen),
              "train": len(sides[TRAIN]), "val": len(sides[VAL]), "out": str(out)}
    print(json.dumps(report, indent=1) if given.json else
          f"{out / TRAIN}: {len(sides[TRAIN])} samples of {frames - len(chosen)} source frames\n"
          f"{out / VAL}: {len(sides[VAL])} samples of {len(chosen)} source frames")
    return 0


def divide(sources: set[str], share: float, seed: int) -> set[str]:
    """The source frames to validate on: at least one, never all. Raises JobError for fewer than two."""
    if len(sources) < 2:
        raise JobError(f"all samples come from one source frame ({', '.join(sources)}): nothing can be held out",
                       "give --source if the frame stands in the samples' names")
    order = sorted(sources, key=lambda source: hashlib.sha256(f"{seed}\n{source}".encode()).digest())
    return set(order[:min(max(1, round(share * len(order))), len(order) - 1)])


def _samples(data: Path) -> list[Entry]:
    """Every sample once: of a list, or all folders with cameras in a folder. Raises JobError."""
    if data.is_dir():
        found = [Entry(path.parent.name, path.parent) for path in sorted(data.glob(f"*/{CAMERAS}"))]
        if not found:
            raise JobError(f"{data}: no folder in it holds {CAMERAS}", "name a folder of samples, or a list file")
        return found
    unique = {entry.directory.resolve() if entry.directory else entry.name: entry
              for listing in listings(data) for entry in listing.entries}
    missing = [entry.name for entry in unique.values() if entry.directory is None]
    if missing:
        raise JobError(f"{data}: {len(missing)} samples do not exist, the first is {missing[0]}",
                       "correct or remove these lines")
    return list(unique.values())


def _write(path: Path, entries: list[Entry]) -> None:
    """Lines relative to the list where the samples are below it, else absolute."""
    home = path.parent.resolve()
    lines = []
    for entry in entries:
        directory = Path(entry.directory or entry.name).resolve()
        lines.append(str(directory.relative_to(home) if directory.is_relative_to(home) else directory))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text("".join(f"{line}\n" for line in lines))
    os.replace(aside, path)
