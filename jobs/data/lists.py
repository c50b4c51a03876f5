"""What the data tools are given (a list file, a data set's folder, a sample), and how they walk through it: several
processes, results in the order of the list, one progress line, memory that does not grow with the pictures.
"""
from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from jobs.data.samples import CAMERAS, read_list
from jobs.runtime import JobError

METADATA = "metadata.json"
LISTS = "data_*.txt"
_WORTH_A_PROCESS = 32  # samples; starting a process costs as much as looking at about this many
_MOST_BY_DEFAULT = 4
_SHOW_EVERY_S = (0.5, 30.0)  # on a terminal, in a log
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Entry:
    """One line of a list file."""

    name: str  # as it stands there
    directory: Path | None  # None: there is none


@dataclass(frozen=True)
class Listing:
    path: Path  # the list file, or the one sample's directory
    entries: list[Entry]
    paths: str  # how its lines were meant


def listings(given: Path, limit: int | None = None) -> list[Listing]:
    """The lists of a data set: `given` is a list file, a folder with data_*.txt in it, or one sample's folder.

    `limit`: only the first samples of each. Raises JobError.
    """
    if (given / CAMERAS).is_file():
        return [Listing(given, [Entry(given.name, given)], "the folder itself")]
    files = sorted(given.glob(LISTS)) if given.is_dir() else [given]
    if not files:
        raise JobError(f"{given}: neither a list ({LISTS}) nor {CAMERAS} is in it",
                       "name a list file, the folder of a data set, or the folder of one sample")
    found = []
    for file in files:
        lines, paths = read_list(file)
        found.append(Listing(file, [Entry(*line) for line in lines[:limit]], paths))
    return found


def source_of(entry: Entry, pattern: str | None = None) -> str:
    """The real frame a sample comes from: `source_frame` of its metadata.json, else what `pattern` (a regular
    expression with one group) finds in its name, else its name. Raises JobError for a name without a match."""
    if entry.directory is not None and (entry.directory / METADATA).is_file():
        try:
            said = json.loads((entry.directory / METADATA).read_bytes())
        except ValueError as error:
            raise JobError(f"{entry.directory / METADATA} is not JSON: {error}", "write the sample again") from None
        if isinstance(said, dict) and "source_frame" in said:
            return str(said["source_frame"])
    if pattern is None:
        return entry.directory.name if entry.directory else entry.name
    if found := re.search(pattern, entry.name):
        return found.group(1)
    raise JobError(f"sample {entry.name}: --source {pattern!r} finds nothing in its name",
                   "give a pattern that fits every sample, such as 'frame_(\\d+)'")


def each(work: Callable[[T], R], items: Sequence[T], workers: int | None, what: str) -> Iterator[R]:
    """work(item) for each item, in order; `work` is a function of a module (it crosses to other processes).

    workers: None for as many as the computer has cores, up to four; 1 for none besides this one. An error of
    `work` comes out here. Raises JobError when a process was killed.
    """
    cores = len(os.sched_getaffinity(0))
    if workers is None:
        workers = min(_MOST_BY_DEFAULT, cores) if len(items) >= _WORTH_A_PROCESS else 1
    progress = _Progress(what, len(items))
    if workers <= 1:
        yield from progress.over(map(work, items))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in a broken state
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from progress.over(pool.map(work, items, chunksize=4))
        except BrokenProcessPool:
            raise JobError(f"{what}: a worker process was killed, probably for want of memory",
                           "use fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


class _Progress:
    """A line on stderr: how many, how fast, how long still."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._tty = sys.stderr.isatty()

    def over(self, results: Iterator[R]) -> Iterator[R]:
        began = shown = time.monotonic()
        every = _SHOW_EVERY_S[0 if self._tty else 1]
        for done, result in enumerate(results, 1):
            yield result
            now = time.monotonic()
            if now - shown >= every or (done == self._total and shown > began):
                shown = now
                self._show(done, done / (now - began))
        if self._tty and shown > began:
            print(file=sys.stderr)

    def _show(self, done: int, rate: float) -> None:
        left = time.strftime("%H:%M:%S", time.gmtime((self._total - done) / rate))
        line = f"{self._what}: {done}/{self._total}  {rate:.1f}/s  {left} left"
        print(f"\r{line}\x1b[K" if self._tty else line, end="" if self._tty else "\n", file=sys.stderr, flush=True)
