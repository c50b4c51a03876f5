"""The state of a job that is followed, read again only when something says that it changed."""
from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.contract import RunDir
from cluster.node import process
from cluster.node.view import go_on, read_view

if TYPE_CHECKING:
    from cluster.node.changes import Changes
    from cluster.node.queue import Queue

_LOOK_S = 0.04  # between two looks at files whose changes nobody tells us
_SHARED_S = 0.2  # the same, of files that another host writes
_STATE_S = 1.0  # between two looks at the state when nothing hints that it changed
_QUEUE_S = (2.0, 15.0)  # between two looks at SLURM's queue: at first, and later
_SLOWER = 1.5


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


class Watch:
    """`look` whenever `patience_s` is over or one of `descriptors` is readable."""

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
