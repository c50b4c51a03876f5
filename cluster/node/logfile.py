"""One log file as frames: exact bytes by byte offsets, or the lines that match.

A line ends with `\\n`, or with the `\\r` of a progress bar, which then becomes a `\\n`; one longer than BLOCK is
searched in parts.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cluster.errors import NodeFailure, explain

BLOCK = 256 << 10  # bytes of a frame at most, and of memory

Frame = tuple[dict[str, Any], bytes]  # see `logs`


class LogFile:
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


def last_lines(log: LogFile, wanted: int, pattern: re.Pattern[bytes] | None) -> tuple[int, int]:
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
