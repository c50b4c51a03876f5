"""`python -m jobs.data check DATA …`: is this data set what training takes it for?

Every sample is looked at (jobs.data.inspection); over all of them: the number of views, the rigs, samples listed
twice, source frames on both sides of a split. Exit code 0: sound; 1: at least one error.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jobs.data.inspection import Finding, Inspection, Options, inspect
from jobs.data.lists import Listing, each, listings
from jobs.data.options import add_workers, rig_named
from jobs.data.samples import BadSample, Sample, read_sample
from jobs.data.sheet import ROWS, make_sheet
from jobs.runtime import JobError
from models import hull
from models.cameras import RADIUS

_LINES = 20  # bad samples in the table; --json has all


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("check", help="files, pictures, cameras, and whether silhouettes and cameras agree")
    parser.add_argument("data", type=Path, nargs="+", help="list files, folders of data sets, or one sample")
    parser.add_argument("--threshold", type=float, default=hull.THRESHOLD,
                        help=f"least explained fraction of a silhouette ({hull.THRESHOLD})")
    parser.add_argument("--radius", type=float, default=RADIUS, help=f"the median camera distance ({RADIUS})")
    parser.add_argument("--rig", help="the rig it must have: mv6, orbit32, or a sample's folder")
    parser.add_argument("--source", help="regular expression that finds a sample's source frame in its name")
    parser.add_argument("--limit", type=int, help="only the first samples of each list")
    parser.add_argument("--json", action="store_true", help="all of it, for programs")
    parser.add_argument("--sheet", type=Path, help=f"write a PNG of the {ROWS} worst samples")
    add_workers(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Checked:
    """One list, its samples in order, and what is wrong or odd with them together."""

    listing: Listing
    inspections: list[Inspection]
    findings: list[Finding]


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    if given.limit is not None and given.limit < 1:
        raise JobError("--limit must be at least 1")
    began = time.monotonic()
    options = Options(given.threshold, given.radius, rig_named(given.rig) if given.rig else None, given.source)
    lists = [listing for data in given.data for listing in listings(data, given.limit)]
    checked = [check(listing, options, given.workers) for listing in lists]
    leaks = _leaks(checked)
    seconds = time.monotonic() - began
    if given.sheet:
        _write_sheet(checked, given.sheet)
    if given.json:
        print(json.dumps(_as_json(checked, leaks, options, seconds), indent=1))
    else:
        print("\n".join(_table(checked, leaks, options, seconds)))
    return 0 if all(_sound(one) for one in checked) else 1


def check(listing: Listing, options: Options, workers: int | None) -> Checked:
    """Look at every sample of one list, and at all of them together."""
    found = list(each(partial(inspect, options), listing.entries, workers, f"check {listing.path.name}"))
    return Checked(listing, found, [*_view_findings(found), *_twice(listing), *_rig_notes(found)])


def _sound(checked: Checked) -> bool:
    return all(one.good for one in checked.inspections) and not any(finding.error for finding in checked.findings)


def _view_findings(found: list[Inspection]) -> list[Finding]:
    counts = Counter(len(one.views) for one in found if one.views)
    if len(counts) < 2:
        return []
    usual = max(counts, key=lambda views: (counts[views], views))
    odd = [one.name for one in found if one.views and len(one.views) != usual]
    return [Finding(True, f"{len(odd)} samples have another number of views than the usual {usual}: {_some(odd)}",
                    "every sample needs the same views in the same order")]


def _twice(listing: Listing) -> list[Finding]:
    counts = Counter(entry.directory.resolve() for entry in listing.entries if entry.directory)
    twice = [path.name for path, count in counts.items() if count > 1]
    return [Finding(True, f"{len(twice)} samples are listed more than once: {_some(twice)}",
                    "remove the repeated lines")] if twice else []


def _rig_notes(found: list[Inspection]) -> list[Finding]:
    rigs = {one.rig for one in found if one.rig}
    if len(rigs) < 2:
        return []
    return [Finding(False, f"the samples were taken with {len(rigs)} different rigs",
                    "expected where each was cropped on its own; else one calibration is wrong")]


def _leaks(checked: list[Checked]) -> list[Finding]:
    """Source frames that are in more than one list: what is validated on was trained on."""
    where: dict[str, set[str]] = {}
    for one in checked:
        for inspection in one.inspections:
            where.setdefault(inspection.source, set()).add(str(one.listing.path))
    shared = sorted(source for source, paths in where.items() if len(paths) > 1)
    return [Finding(False, f"{len(shared)} source frames are in more than one list: {_some(shared)}",
                    "divide by source frame with `split`")] if shared else []


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _write_sheet(checked: list[Checked], path: Path) -> None:
    pairs = [(one, entry) for each_list in checked
             for one, entry in zip(each_list.inspections, each_list.listing.entries)]
    rows: list[tuple[Sample, str, bool]] = []
    for one, entry in sorted(pairs, key=lambda pair: (pair[0].good, pair[0].least)):
        try:
            caption = next((finding.what for finding in one.findings), f"agrees to {one.least:.3f}")
            rows.append((read_sample(entry.name, entry.directory), f"{one.name}: {caption}", one.good))
        except BadSample:
            continue  # it is in the table; there is nothing to show
        if len(rows) == ROWS:
            break
    make_sheet(rows, path)


def _as_json(checked: list[Checked], leaks: list[Finding], options: Options, seconds: float) -> dict[str, Any]:
    return {
        "sound": all(_sound(one) for one in checked), "threshold": options.threshold, "seconds": round(seconds, 3),
        "findings": [asdict(finding) for finding in leaks],
        "lists": [{"list": str(one.listing.path), "paths": one.listing.paths, "sound": _sound(one),
                   "findings": [asdict(finding) for finding in one.findings],
                   "rigs": dict(Counter(inspection.rig for inspection in one.inspections if inspection.rig)),
                   "samples": [{**asdict(inspection), "good": inspection.good, "least_explained": inspection.least}
                               for inspection in one.inspections]} for one in checked]}


def _table(checked: list[Checked], leaks: list[Finding], options: Options, seconds: float) -> list[str]:
    lines = [line for one in checked for line in _list_lines(one, options)]
    lines += [f"warning: {finding.what}\n  {finding.remedy}" for finding in leaks]
    total = sum(len(one.inspections) for one in checked)
    bad = sum(not one.good for each_list in checked for one in each_list.inspections)
    verdict = "sound" if all(_sound(one) for one in checked) else "NOT sound"
    return [*lines, f"{verdict}: {total} samples, {bad} bad; {seconds / total:.2g} s a sample"]


def _list_lines(checked: Checked, options: Options) -> Iterable[str]:
    read = [one for one in checked.inspections if one.views]
    yield f"{checked.listing.path}: {len(checked.inspections)} samples, lines: {checked.listing.paths}"
    if read:
        words = Counter((one.rig_words, one.rig[:12]) for one in read)
        (rig, fingerprint), count = words.most_common(1)[0]
        yield f"  rig        {rig}; {fingerprint}" + (f"; and {len(words) - 1} others" if len(words) > 1 else "")
        sizes = sorted({one.size for one in read})
        yield f"  pictures   {', '.join(map(str, sizes))} px; the object is cut by the frame in " \
              f"{sum(map(bool, (one.cut for one in read)))} samples"
        yield f"  object     {_largest(one.object_at for one in read)} from the origin at most; " \
              f"look-at {_largest(one.looked_at for one in read)}"
    if hulls := [one for one in read if one.explained]:
        worst = min(hulls, key=lambda one: one.least)
        view = worst.views[worst.explained.index(worst.least)]
        middle = statistics.median(one.least for one in hulls)
        yield f"  silhouettes agree to {worst.least:.3f} at worst ({worst.name}, view {view}), {middle:.3f} in the " \
              f"middle; threshold {options.threshold:g}"
    for finding in checked.findings:
        yield _line("list", finding)
    told = [(one.name, finding) for one in checked.inspections for finding in one.findings]
    told.sort(key=lambda pair: not pair[1].error)
    yield from (_line(name, finding) for name, finding in told[:_LINES])
    if len(told) > _LINES:
        yield f"  … and {len(told) - _LINES} more (--json has all)"


def _largest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2f}" if known else "unknown"


def _line(name: str, finding: Finding) -> str:
    return f"  {'error' if finding.error else 'warning'}  {name}: {finding.what}\n    {finding.remedy}"
