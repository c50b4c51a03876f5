"""The logs of a job as frames: exact bytes, by byte offsets, every rank, across attempts, also while they are
written.

A frame is one JSON line, and after it the bytes it announces:

    {"f": "000/rank-0", "o": offset, "n": bytes, "next": offset to go on from} + n bytes
    {"keepalive": unix seconds}                    nothing new; the link lives
    {"end": VIEW}                                  the last one

With `grep` a frame holds only the lines that match, and `next` lies behind the lines that did not. A line ends with
`\\n`, or with the `\\r` of a progress bar, which then becomes a `\\n`; one longer than BLOCK is searched in parts.
"""
from __future__ import annotations

import json
import os
import re
import select
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cluster.contract import AttemptDir, RunDir
from cluster.errors import ClusterError, NodeFailure, Unusable, explain
from cluster.node import process
from cluster.node.agent import failure
from cluster.node.view import fill_health, go_on, read_view
from cluster.states import ENDED_WORDS

if TYPE_CHECKING:
    from cluster.node.changes import Changes
    from cluster.node.queue import Queue

BLOCK = 256 << 10  # bytes of a frame at most, and of memory
KEEPALIVE_S = 5.0
_LOOK_S = 0.04  # between two looks at files whose changes nobody tells us
_SHARED_S = 0.2  # the same, of files that another host writes
_REST_S = 0.01  # between two looks in any case: a job that prints much is not followed write by write
_STATE_S = 1.0  # between two looks at the state when nothing hints that it changed
_QUEUE_S = (2.0, 15.0)  # between two looks at SLURM's queue: at first, and later
_SLOWER = 1.5
_RANK_LOG = re.compile(r"rank-(\d+)\.log")

Frame = tuple[dict[str, Any], bytes]
# (seconds, descriptors that cut it short when they are readable) -> whether the reader is still there
Wait = Callable[[float, Sequence[int]], bool]


# --- what is asked ------------------------------------------------------------------------------------------

class _Log:
    """One log file and how far it was sent."""

    def __init__(self, path: Path, name: str, offset: int) -> None:
        self.path, self.name, self.offset = path, name, offset

    def read(self, limit: int, pattern: re.Pattern[bytes] | None, whole: bool) -> Frame | None:
        """The next frame below byte `limit`; None: there is nothing (with a pattern: no complete line, unless
        `whole` says that the rest is all there will be).
        """
        want = min(BLOCK, limit - self.offset)
        if want <= 0:
            return None
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                block = file.read(want)
                if pattern and not (whole and self.offset + want == limit):
                    block = _complete_lines(block)
        except OSError as error:
            what, hint = explain(error, f"the log {self.name} cannot be read")
            raise NodeFailure(what, hint=hint) from None
        if not block:
            return None
        self.offset += len(block)
        body = _matching(block, pattern) if pattern else block
        return self.frame(self.offset - len(block), body)

    def frame(self, start: int, body: bytes) -> Frame:
        return {"f": self.name, "o": start, "n": len(body), "next": self.offset}, body

    def size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except FileNotFoundError:
            return 0


def _complete_lines(block: bytes) -> bytes:
    """`block` up to the end of its last line; all of it when it is as long as can be and holds no end of a line."""
    end = max(block.rfind(b"\n"), block.rfind(b"\r", 0, len(block) - 1)) + 1  # a `\r` at its end may become `\r\n`
    return block[:end] if end or len(block) < BLOCK else block


def _matching(block: bytes, pattern: re.Pattern[bytes]) -> bytes:
    return b"".join(_as_line(line) for line in block.splitlines(keepends=True) if _matches(line, pattern))


def _matches(line: bytes, pattern: re.Pattern[bytes]) -> bool:
    """What stands between a `\n` and the first `\r` of a progress bar is no line when it is empty."""
    return line != b"\r" and pattern.search(line.rstrip(b"\r\n")) is not None


def _as_line(line: bytes) -> bytes:
    return line[:-1] + b"\n" if line.endswith(b"\r") else line


class _Selection:
    """Which files of a job are wanted; more appear while it runs."""

    def __init__(self, run: RunDir, request: dict[str, Any], pattern: re.Pattern[bytes] | None) -> None:
        self._run, self._pattern = run, pattern
        self._ranks, self._attempts = request.get("ranks", "0"), request.get("attempts", "last")
        self._first: int | None = None
        self._offsets: dict[str, int] = dict(request.get("offsets") or {})
        self._lines: int | None = request.get("lines")
        self._logs: dict[str, _Log] = {}

    def logs(self) -> list[_Log]:
        """Every wanted file that exists now, oldest attempt first."""
        for attempt in self._wanted():
            for rank in self._ranks_of(attempt):
                name = f"{attempt.path.name}/rank-{rank}"
                if name not in self._logs:
                    self._logs[name] = _Log(attempt.rank_log(rank), name, self._offsets.get(name, 0))
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
            log.offset, found = _last_lines(log, left.get(rank, lines), self._pattern)
            left[rank] = left.get(rank, lines) - found


def _last_lines(log: _Log, wanted: int, pattern: re.Pattern[bytes] | None) -> tuple[int, int]:
    """Where the last `wanted` lines of a file (that match) begin -> (offset, lines behind it)."""
    if wanted <= 0 or log.size() == 0:
        return log.size(), 0
    count = 0
    with open(log.path, "rb") as file:
        for begin in _begins(file) if pattern is None else _begins_of_matches(file, pattern):
            count += 1
            if count == wanted:
                return begin, wanted
    return 0, count


def _begins(file: BinaryIO) -> Iterator[int]:
    """Where each line begins, the last first; only `\\n` ends one."""
    position = size = os.fstat(file.fileno()).st_size
    while position > 0:
        start = max(0, position - BLOCK)
        file.seek(start)
        block = file.read(position - start)
        at = len(block) - (position == size and block.endswith(b"\n"))  # behind the last line's end begins none
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            yield start + at + 1
        position = start
    yield 0


def _begins_of_matches(file: BinaryIO, pattern: re.Pattern[bytes]) -> Iterator[int]:
    position, head = os.fstat(file.fileno()).st_size, b""
    while position > 0:
        start = max(0, position - BLOCK)
        file.seek(start)
        block = file.read(position - start) + head
        lines = block.splitlines(keepends=True)
        head = b"" if start == 0 or len(block) > 2 * BLOCK else lines.pop(0)  # it may begin further before
        at = start + len(block)
        for line in reversed(lines):
            at -= len(line)
            if _matches(line, pattern):
                yield at
        position = start


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
    watch = _Watch(run, bool(request.get("follow")))
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


class _Lookout:
    """The queue of a job that is followed: asked anew when its run directory changed, else ever more rarely.

    Asking SLURM takes a moment, and a controller that everybody asks every second goes down.
    """

    def __init__(self) -> None:
        self.queue: Queue | None = None  # of a job that SLURM may still have
        self._asked_at, self._pause_s = 0.0, _QUEUE_S[0]

    def hurry(self) -> None:
        self._pause_s = _QUEUE_S[0]

    def ask(self, workdir: Path, ids: Sequence[str]) -> Queue:
        from cluster.node.queue import Queue
        if self.queue is None or time.monotonic() - self._asked_at > self._pause_s:
            self.queue = Queue.ask(workdir, ids)
            self._asked_at, self._pause_s = time.monotonic(), min(_QUEUE_S[1], self._pause_s * _SLOWER)
        return self.queue


class _Watch:
    """The view of a job, read again only when something says that it changed: a journal, the supervisor, an
    attempt.
    """

    def __init__(self, run: RunDir, follow: bool) -> None:
        self._run = run
        self._lookout = _Lookout()
        self._pid: int | None = None
        self._supervisor: int | None = None  # a pidfd: readable when it ends, which is when the job has ended
        self._changes = _changes() if follow else None
        self._seen = self._signs()
        self._read_at = time.monotonic()
        self._view = read_view(run, self._lookout.ask)
        self._open()

    @property
    def descriptors(self) -> list[int]:
        told = self._changes.descriptor if self._changes else None
        return [one for one in (self._supervisor, told) if one is not None]

    @property
    def patience_s(self) -> float:
        """What a living supervisor of this host and its job write, inotify tells; nothing else is sure to be
        told.
        """
        if len(self.descriptors) == 2:
            return _STATE_S
        return _SHARED_S if self._lookout.queue else _LOOK_S

    def look(self) -> dict[str, Any]:
        if self._changes:
            self._changes.forget()
        signs, now = self._signs(), time.monotonic()
        if signs != self._seen or now - self._read_at > _STATE_S:
            if signs != self._seen:
                self._lookout.hurry()
            self._seen, self._read_at = signs, now
            self._view = read_view(self._run, self._lookout.ask)
            go_on([self._view])
            self._open()
        return self._view

    def close(self) -> None:
        self._let_go()
        if self._changes:
            self._changes.close()

    def _let_go(self) -> None:
        if self._supervisor is not None:
            os.close(self._supervisor)
            self._supervisor = None

    def _signs(self) -> tuple[Any, ...]:
        attempts = self._run.attempts()
        if self._changes:
            last = [attempts[-1].path, attempts[-1].logs] if attempts else []
            for directory in (self._run.path, self._run.path / "attempts", *last):
                self._changes.watch(directory)
        try:
            size = os.stat(attempts[-1].journal).st_size if attempts else 0
        except FileNotFoundError:
            size = 0
        return len(attempts), size, self._supervisor is not None and not _alive(self._supervisor)

    def _open(self) -> None:
        from cluster.node.kill import supervisor_of
        identity = supervisor_of(self._run)
        if identity and identity[0] == self._pid and self._supervisor is not None:
            return
        self._let_go()
        self._pid = identity[0] if identity else None
        if identity:
            try:
                self._supervisor = os.pidfd_open(identity[0])
            except ProcessLookupError:
                return
            if not process.alive(*identity):
                self._let_go()


def _changes() -> Changes:
    from cluster.node.changes import Changes  # loads ctypes, which who only reads does without
    return Changes()


def _alive(pidfd: int) -> bool:
    return not select.select([pidfd], [], [], 0)[0]


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
