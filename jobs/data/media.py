"""`python -m jobs.data media DIR`: can every pair of sound and picture of this data set be used?

For each row of {train,val,test}_metadata.json: is the pair there, whole, a sound and a picture, not an LFS pointer, not
silent, not too short, at the rate that is wanted. Over all: pairs in two splits. Exit code 0: every pair can be used;
1: not.
"""
from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs.data.audio import SILENT_PEAK, AudioError, Recording, probe_audio, read_audio
from jobs.data.clips import Clip, read_clips, read_picture, splits_of
from jobs.data.lists import each
from jobs.data.options import add_workers
from jobs.runtime import JobError

_LINES = 20  # findings in the table; --json has all
_KINDS = {  # words of a reader -> what it is called in the table
    "No such file": "missing", "(0 bytes)": "zero-length", "holds no samples": "zero-length", "git-lfs": "LFS pointer",
}


@dataclass(frozen=True)
class Finding:
    """One thing about one file. `error`: the pair cannot be used."""

    split: str
    row: str  # video_id
    kind: str  # missing, corrupt, zero-length, LFS pointer, wrong rate, silence, short, twice
    what: str
    error: bool


@dataclass(frozen=True)
class Look:
    """What was found about one row."""

    findings: list[Finding]
    heard: Recording | None


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("media", help="sounds with pictures: missing, corrupt, LFS pointers, rate, silence")
    parser.add_argument("data", type=Path, help="a folder with {train,val,test}_metadata.json")
    parser.add_argument("--rate", type=int, default=48_000, help="Hz that is wanted (48000); others are resampled")
    parser.add_argument("--seconds", type=float, default=1.0, help="a sound that is shorter is told (1)")
    parser.add_argument("--limit", type=int, help="only the first rows of each split")
    parser.add_argument("--json", action="store_true", help="all of it, for programs")
    add_workers(parser)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    began = time.monotonic()
    splits = splits_of(given.data)
    if not splits:
        raise JobError(f"{given.data}: no train_metadata.json, val_metadata.json or test_metadata.json is in it",
                       "name the folder of a data set")
    rows = [(split, clip) for split in splits for clip in read_clips(given.data, split)[:given.limit]]
    looks = list(each(partial(look, given.rate, given.seconds), rows, given.workers, "media"))
    findings = [finding for one in looks for finding in one.findings] + _twice(rows)
    if given.json:
        print(json.dumps(_as_json(rows, looks, findings), indent=1))
    else:
        print("\n".join(_table(rows, looks, findings, time.monotonic() - began)))
    return 1 if any(finding.error for finding in findings) else 0


def look(rate: int, seconds: float, row: tuple[str, Clip]) -> Look:
    """Read both files of one row to their end."""
    split, clip = row
    findings: list[Finding] = []

    def tell(kind: str, what: str, error: bool) -> None:
        findings.append(Finding(split, clip.name, kind, what, error))

    heard = None
    try:
        heard = probe_audio(clip.audio)
        samples = read_audio(clip.audio, heard.rate)
        if np.abs(samples).max() < SILENT_PEAK:
            tell("silence", f"{clip.audio} is silent: its peak is {np.abs(samples).max():.1e} of full scale", True)
        if heard.rate != rate:
            tell("wrong rate", f"{clip.audio} is at {heard.rate} Hz, not {rate}: it is resampled when read", False)
        if heard.seconds < seconds:
            tell("short", f"{clip.audio} is {heard.seconds:.2f} s long", False)
    except AudioError as error:
        tell(_kind(error.what), error.what, True)
    try:
        read_picture(clip.image, 8)
    except JobError as error:
        tell(_kind(error.what), error.what, True)
    return Look(findings, heard)


def _kind(what: str) -> str:
    return next((kind for words, kind in _KINDS.items() if words in what), "corrupt")


def _twice(rows: list[tuple[str, Clip]]) -> list[Finding]:
    """Sounds that are in two splits: what is validated on was trained on."""
    first: dict[Path, str] = {}
    found = []
    for split, clip in rows:
        other = first.setdefault(clip.audio.resolve(), split)
        if other != split:
            found.append(Finding(split, clip.name, "twice", f"{clip.audio} is in {other} too", True))
    return found


def _as_json(rows: list[tuple[str, Clip]], looks: list[Look], findings: list[Finding]) -> dict[str, Any]:
    return {"pairs": len(rows), "usable": len(rows) - len(_bad(findings)),
            "splits": dict(Counter(split for split, _ in rows)),
            "classes": dict(Counter(clip.label for _, clip in rows if clip.label is not None)),
            "recordings": dict(Counter(_words(one.heard) for one in looks if one.heard)),
            "kinds": dict(Counter(finding.kind for finding in findings)),
            "findings": [asdict(finding) for finding in findings]}


def _table(rows: list[tuple[str, Clip]], looks: list[Look], findings: list[Finding], seconds: float) -> list[str]:
    lines = []
    for split, count in Counter(split for split, _ in rows).items():
        labels = Counter(clip.label for there, clip in rows if there == split and clip.label is not None)
        bad = len({row for there, row in _bad(findings) if there == split})
        each_class = f", {min(labels.values())} to {max(labels.values())} each" if labels else ""
        words = f"{len(labels) or 'no'} classes{each_class}"
        lines.append(f"{split:6} {count:7} pairs  {bad:5} bad  {words}")
    for words, count in Counter(_words(one.heard) for one in looks if one.heard).most_common(5):
        lines.append(f"sounds {count:7} {words}")
    for kind, count in Counter(finding.kind for finding in findings).most_common():
        lines.append(f"{kind:12} {count}")
    told = sorted(findings, key=lambda finding: not finding.error)
    lines += [f"  {'error' if one.error else 'note '}  {one.split}/{one.row}: {one.kind}: {one.what}"
              for one in told[:_LINES]]
    if len(told) > _LINES:
        lines.append(f"  … and {len(told) - _LINES} more (--json has all)")
    bad = len(_bad(findings))
    return [*lines, f"{'sound' if not bad else 'NOT sound'}: {len(rows)} pairs, {bad} cannot be used; "
                    f"{seconds / len(rows):.2g} s a pair"]


def _bad(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.split, finding.row) for finding in findings if finding.error}


def _words(heard: Recording) -> str:
    return f"{heard.rate} Hz, {heard.channels} channel{'s' if heard.channels > 1 else ''}, {heard.encoding}"
