"""Slow work in a process of its own: hashing checkpoints, asking nvidia-smi, activating an environment.

A fork, so that it starts in a millisecond and its memory is not the supervisor's; it dies with the supervisor.
"""
from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from cluster.node.loop import Loop
from cluster.node.rank import die_with_parent


class AsideFailed(Exception):
    """The work raised something unforeseen or was killed; the message holds its traceback."""


class Aside:
    """`function(*args)` in a child process; its result must be JSON."""

    def __init__(self, loop: Loop, function: Callable[..., Any], *args: Any) -> None:
        self._loop = loop
        self._read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._received = bytearray()
        self._open = True
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _work(write, parent, function, args)
        os.close(write)
        loop.adopt(self.pid)
        loop.watch(self._read)

    def done(self) -> bool:
        """Take in what has arrived. Never blocks."""
        while self._open:
            try:
                block = os.read(self._read, 1 << 16)
            except BlockingIOError:
                return False
            self._received += block
            if not block:
                self._close()
        return True

    def result(self) -> Any:
        """Raises AsideFailed. Only after `done`."""
        try:
            answer = json.loads(self._received)
        except ValueError:
            raise AsideFailed("the helper process was killed") from None
        if "failed" in answer:
            raise AsideFailed(answer["failed"])
        return answer["result"]

    def kill(self) -> None:
        if self._open:
            self._close()
            if self.pid not in self._loop.exits:
                os.kill(self.pid, signal.SIGKILL)

    def _close(self) -> None:
        self._loop.forget(self._read)
        os.close(self._read)
        self._open = False


def _work(write: int, parent: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The child: never returns, and never runs what the parent left on its stack."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # SLURM sends the supervisor's signals to all below it
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: None)  # this too; what is started here has the default again
        die_with_parent(signal.SIGKILL, parent)
        os.set_blocking(write, True)
        try:
            answer = {"result": function(*args)}
        except Exception as error:  # the one place where it can be reported
            import traceback
            answer = {"failed": "".join(traceback.format_exception(error)).strip()}
        with open(write, "w", encoding="utf-8") as pipe:
            json.dump(answer, pipe)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)
