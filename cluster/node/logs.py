"""The logs of a job as frames: exact bytes, by byte offsets, every rank, across attempts, also while they are
written.

A frame is one JSON line, and after it the bytes it announces:

    {"f": "000/rank-0", "o": offset, "n": bytes, "next": offset to go on from} + n bytes
    {"keepalive": unix seconds}                    nothing new; the link lives
    {"end": VIEW}                                  the last one

With `grep` a frame holds only the lines that match, and `next` lies behind the lines that did not.
"""
from __future__ import annotations

import json
import os
import re
import select
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.contract import AttemptDir, RunDir
from cluster.errors import ClusterError, Unusable
from cluster.node.agent import failure
from cluster.node.following import Watch
from cluster.node.logfile import Frame, LogFile, last_lines
from cluster.node.view import fill_health
from cluster.states import ENDED_WORDS

KEEPALIVE_S = 5.0
_REST_S = 0.01  # between two looks in any case: a job that prints much is not followed write by write
_RANK_LOG = re.compile(r"rank-(\d+)\.log")

# (seconds, descriptors that cut it short when they are readable) -> whether the reader is still there
Wait = Callable[[float, Sequence[int]], bool]


# --- what is asked ------------------------------------------------------------------------------------------

class _Selection:
    """Which files of a job are wanted; more appear while it runs."""

    def __init__(self, run: RunDir, request: dict[str, Any], pattern: re.Pattern[bytes] | None) -> None:
        self._run, self._pattern = run, pattern
        self._ranks, self._attempts = request.get("ranks", "0"), request.get("attempts", "last")
        self._first: int | None = None
        self._offsets: dict[str, int] = dict(request.get("offsets") or {})
        self._lines: int | None = request.get("lines")
        self._logs: dict[str, LogFile] = {}

    def logs(self) -> list[LogFile]:
        """Every wanted file that exists now, oldest attempt first."""
        for attempt in self._wanted():
            for rank in self._ranks_of(attempt):
                name = f"{attempt.path.name}/rank-{rank}"
                if name not in self._logs:
                    self._logs[name] = LogFile(attempt.rank_log(rank), name, self._offsets.get(name, 0))
        if self._lines is not None and not self._offsets:
            self._keep_last(self._lines)
        self._lines = None  # what appears later is new and wanted whole
        return list(self._logs.values())

    def ended(self, view: dict[str, Any]) -> bool:
        """Whether nothing can be added any more."""
        attempts = self._run.attempts()
        newer = isinstance(self._attempts, int) and any(one.number > self._attempts for one in attempts)
        return newer or view["state"] in ENDED_WORDS

    def check(self, view: dict[str, Any]) -> None:
        """Raises Unusable when nothing was found although there are logs: a rank or an attempt that never
        was.

        No rank at all is what a client asks for that only waits for the end.
        """
        if self._logs or not self._ranks:
            return
        if view["by_hand"]:
            raise Unusable(f"{view['id']} was started by hand: its output went where it was started")
        attempts = self._run.attempts()
        if isinstance(self._attempts, int) and all(one.number != self._attempts for one in attempts):
            raise Unusable(f"{view['id']} has no attempt {self._attempts}",
                           hint=f"it has {len(attempts)}, from 0 on")
        self._ranks, asked = "all", self._ranks
        if there := sorted({rank for attempt in self._wanted() for rank in self._ranks_of(attempt)}):
            raise Unusable(f"{view['id']} has no log of rank {asked}",
                           hint=f"it has the ranks {', '.join(map(str, there))}")

    def _wanted(self) -> list[AttemptDir]:
        attempts = self._run.attempts()
        if isinstance(self._attempts, int):
            return [one for one in attempts if one.number == self._attempts]
        if self._attempts == "all" or not attempts:
            return attempts
        if self._first is None:
            self._first = min([attempts[-1].number, *(int(name.partition("/")[0]) for name in self._offsets)])
        return [one for one in attempts if one.number >= self._first]

    def _ranks_of(self, attempt: AttemptDir) -> list[int]:
        try:
            names = os.listdir(attempt.logs)
        except FileNotFoundError:
            return []
        there = sorted(int(found[1]) for name in names if (found := _RANK_LOG.fullmatch(name)))
        if self._ranks == "all":
            return there
        wanted = [int(self._ranks)] if isinstance(self._ranks, str) else self._ranks
        return [rank for rank in there if rank in wanted]

    def _keep_last(self, lines: int) -> None:
        """Let each rank begin so that `lines` lines (that match) of it are left, over its attempts from the newest
        backwards.
        """
        left: dict[str, int] = {}
        for log in reversed(self._logs.values()):
            rank = log.name.partition("/")[2]
            log.offset, found = last_lines(log, left.get(rank, lines), self._pattern)
            left[rank] = left.get(rank, lines) - found


# --- the frames ---------------------------------------------------------------------------------------------

def frames(request: dict[str, Any], wait: Wait) -> Iterator[Frame]:
    """What the request asks for, then (with `follow`) what is added until the job has ended and everything
    was sent.

    The state is read first and the files are drained after it, so that the tail is never missed. Raises
    ClusterError.
    """
    if request.get("op") == "fetch":  # the files that another node takes over travel as frames too
        from cluster.node import handover
        yield from handover.frames(request)
        return
    if request.get("op") == "pull":
        from cluster.node import fetch
        yield from fetch.frames(request)
        return
    run = RunDir(Path(request["run_dir"]))
    pattern = _compiled(request.get("grep"))
    selection = _Selection(run, request, pattern)
    watch = Watch(run, bool(request.get("follow")))
    try:
        spoke = time.monotonic()
        for log in selection.logs():
            if log.offset:  # so that a reader who is cut off before the first byte knows where to go on
                yield log.frame(log.offset, b"")
        while True:
            looked = time.monotonic()
            view = watch.look()
            over = not request.get("follow") or selection.ended(view)
            sent = 0
            for log in selection.logs():
                limit = log.size()
                while frame := log.read(limit, pattern, over):
                    sent += 1
                    yield frame
            now = time.monotonic()
            if over:
                selection.check(view)
                fill_health([view])
                yield {"end": view}, b""
                return
            if sent:
                spoke = now
            elif now - spoke >= KEEPALIVE_S:
                spoke = now
                yield {"keepalive": time.time()}, b""
            if not wait(watch.patience_s, watch.descriptors):
                return
            if not wait(looked + _REST_S - time.monotonic(), ()):
                return
    finally:
        watch.close()


def _compiled(grep: str | None) -> re.Pattern[bytes] | None:
    try:
        return re.compile(os.fsencode(grep)) if grep is not None else None
    except re.error as error:
        raise Unusable(f"--grep {grep!r} is no regular expression: {error}") from None


# --- two ways to be read ------------------------------------------------------------------------------------

def sleep(seconds: float, descriptors: Sequence[int]) -> bool:
    """For a reader in the same process, who just stops reading."""
    select.select(descriptors, [], [], max(0.0, seconds))
    return True


def serve(request: dict[str, Any], mark: bytes) -> int:
    """Write the mark and the frames to stdout until the end, or until nobody reads them any more."""
    out = 1

    def wait(seconds: float, descriptors: Sequence[int]) -> bool:
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(out, 0)
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        events = dict(poll.poll(max(0.0, seconds) * 1000))
        return not events.get(out) and not (events.get(0) and os.read(0, 4096) == b"")

    try:
        _write(out, mark + b"\n")
        try:
            for header, body in frames(request, wait):
                _write(out, json.dumps(header).encode() + b"\n")
                _write(out, body)
        except ClusterError as error:
            _write(out, json.dumps(failure(error)).encode() + b"\n")
    except (BrokenPipeError, ConnectionResetError):
        return 1
    return 0


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view):]
