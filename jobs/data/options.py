"""Arguments that several data tools share."""
from __future__ import annotations

import argparse
from pathlib import Path

from jobs.data.lists import listings
from jobs.data.rigs import rig_of
from jobs.data.samples import CAMERAS, read_sample
from jobs.runtime import JobError
from models.cameras import Rig
from models.rigs import STANDARD

_ANY_SIZE = 512  # px: a standard rig's fingerprint is the same at every size


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="processes (default: the cores, up to 4; 1 for few samples)")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Of a tool that makes a data set from another one: how it tells what it did, and --workers."""
    parser.add_argument("--json", action="store_true", help="the report for programs")
    parser.add_argument("--sheet", type=Path, help="write a PNG of the first samples")
    add_workers(parser)


def rig_named(name: str) -> Rig:
    """mv6, orbit32, or the rig of a sample: its folder, its opencv_cameras.json, or the first one of a list or data
    set. Raises JobError."""
    if name in STANDARD:
        return STANDARD[name](_ANY_SIZE)
    path = Path(name)
    if not path.exists():
        raise JobError(f"--rig {name}: no such rig and no such file",
                       f"name {' or '.join(STANDARD)}, a data set, a list file, or a sample's folder")
    first = listings(path.parent if path.name == CAMERAS else path)[0].entries[0]
    return rig_of(read_sample(first.name, first.directory))
