"""What the supervisor waits with: signals, ended children and time, in one place, in one thread."""
from __future__ import annotations

import ctypes
import os
import select
import signal
from types import FrameType

_PR_SET_CHILD_SUBREAPER = 36


class Loop:
    """Made once, in the main thread. Handlers (not SIG_IGN) keep signals from ending the supervisor: a handler is
    reset by exec, so the program starts with the defaults."""

    def __init__(self) -> None:
        self.exits: dict[int, int] = {}  # own child -> exit code, negative: the signal that ended it
        self._own: set[int] = set()
        self.terminated = False  # somebody sent SIGTERM to the supervisor
        self.warned = False  # SIGUSR1: the scheduler will end it soon
        self._read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a signal comes, a child ends or the time is over; True when it was not the time."""
        woken = bool(self._poll.poll(max(0.0, timeout_s) * 1000))
        if woken:
            while _drain(self._read):
                pass
        self.reap()
        return woken

    def watch(self, descriptor: int) -> None:
        self._poll.register(descriptor, select.POLLIN)

    def forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)

    def adopt(self, pid: int) -> None:
        """A child was just started: its exit code is kept. Those of orphans are not, their pids come again."""
        self.exits.pop(pid, None)
        self._own.add(pid)

    def reap(self) -> None:
        """Collect every child that has ended, also the orphans that came back to this subreaper."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._own:
                self._own.discard(pid)
                self.exits[pid] = os.waitstatus_to_exitcode(status)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.terminated = self.terminated or number == signal.SIGTERM
        self.warned = self.warned or number == signal.SIGUSR1


def _drain(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        return b""
