"""Being told that something in a directory changed, at once and for nothing: inotify, which Python's library lacks.

It sees what this host writes, also to NFS; what another host writes there it does not see.
"""
from __future__ import annotations

import ctypes
import os
from pathlib import Path

_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x80, 0x100


class Changes:
    """`descriptor` is readable when a file of a watched directory was written, made or replaced. It is None where the
    kernel gives none (a limit per user), and then somebody has to look now and then."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.descriptor: int | None = descriptor if descriptor >= 0 else None
        self._watched: set[Path] = set()

    def watch(self, directory: Path) -> None:
        """One that is not there yet is taken up by a later call."""
        if self.descriptor is None or directory in self._watched:
            return
        mask = _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE
        if self._libc.inotify_add_watch(self.descriptor, os.fsencode(directory), mask) >= 0:
            self._watched.add(directory)

    def forget(self) -> None:
        """Take back what was told so far: call it before looking at the files, never after."""
        try:
            while self.descriptor is not None and os.read(self.descriptor, 1 << 16):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
