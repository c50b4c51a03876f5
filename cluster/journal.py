"""Append-only journal files: one writer each, any number of readers. Standard library only."""
from __future__ import annotations

import errno
import json
import os
import queue
import threading
from pathlib import Path

from cluster.contract import RunDir
from cluster.events import Event, decode, encode


class Journal:
    """The journal of one attempt. Appending never blocks its caller: a thread writes and syncs in order.

    A disk that is full or hangs therefore never keeps the supervisor from reaping and killing; the lines wait in memory
    and `error` says what the last failure was.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._thread.start()

    def append(self, event: Event) -> None:
        self._queue.put(json.dumps(encode(event)).encode() + b"\n")

    def close(self, timeout_s: float = 10.0) -> bool:
        """Write what is left; False when the disk did not take it in time."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and self.error is None

    def _write_all(self) -> None:
        while (line := self._queue.get()) is not None:
            while not self._write(line) and not self._closing.wait(1.0):
                pass

    def _write(self, line: bytes) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                whole = (b"" if _ends_whole(descriptor) else b"\n") + line
                if os.write(descriptor, whole) < len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            self.error = error
            return False
        self.error = None
        return True


def _ends_whole(descriptor: int) -> bool:
    """Whether the file is empty or ends with a newline: a torn line of a full disk must not swallow the next one."""
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def read_journal(path: Path) -> tuple[list[Event], int]:
    """The events of one journal -> (events, number of lines that do not parse). A missing file has none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    events: list[Event] = []
    broken = 0
    for line in raw.split(b"\n"):
        if line.strip():
            try:
                events.append(decode(json.loads(line)))
            except (ValueError, AttributeError):
                broken += 1
    return events, broken


def read_events(run: RunDir) -> tuple[list[Event], int]:
    """The events of every attempt of a job, oldest attempt first, and how many lines were skipped."""
    events: list[Event] = []
    broken = 0
    for attempt in run.attempts():
        found, bad = read_journal(attempt.journal)
        events += found
        broken += bad
    return events, broken
