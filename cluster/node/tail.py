"""Reading a growing file a little at a time, with bounded memory."""
from __future__ import annotations

import os
from pathlib import Path

BLOCK = 1 << 18
_LINE_MAX = 1 << 16


class Tail:
    """New whole lines of `path` since the last call. The file may not be there yet."""

    def __init__(self, path: Path, separators: bytes = b"\n", block: int = BLOCK) -> None:
        self._path = path
        self._separators = separators
        self._block = block
        self._offset = 0
        self._rest = b""

    def lines(self, skip_to_end: bool = False) -> list[bytes]:
        """At most one block's worth; an empty list when nothing is new. `skip_to_end` leaves out what is older than
        the last block: for a flood of which only the newest matters."""
        try:
            with open(self._path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:  # truncated: begin again
                    self._offset, self._rest = 0, b""
                if skip_to_end and size - self._offset > self._block:
                    self._offset, self._rest = size - self._block, b""
                file.seek(self._offset)
                block = file.read(self._block)
        except OSError:  # not there yet, or a file system that is ill: it will be read when it is well
            return []
        self._offset += len(block)
        return self._split(block)

    def unfinished(self) -> bytes:
        """What stands after the last separator: a progress bar writes its `\\r` before the line, not after it."""
        return self._rest

    def _split(self, block: bytes) -> list[bytes]:
        text = self._rest + block
        for separator in self._separators[1:]:
            text = text.replace(bytes([separator]), self._separators[:1])
        *lines, self._rest = text.split(self._separators[:1])
        self._rest = self._rest[-_LINE_MAX:]
        return [line for line in lines if line]


def last_bytes(path: Path, count: int = BLOCK) -> str:
    """The end of a text file; empty when there is none."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - count))
            return file.read(count).decode(errors="replace")
    except OSError:
        return ""
