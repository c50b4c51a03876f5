"""What a job printed: exact bytes of one rank, or lines of several, also across lost links.

The node reads the state first, then drains the files, then says that it is the end: the tail is never missed.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import Unreachable

if TYPE_CHECKING:
    from cluster.backends.base import Backend

_BACK_OFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
_LONGEST_LINE = 64 << 10  # of several ranks: a longer one is shown in parts


@dataclass(frozen=True)
class Which:
    """Which part of a job's logs. `lines`: only the last so many of each rank; `grep`: a regular expr."""

    ranks: Literal["0", "all"] | tuple[int, ...] = "0"
    attempt: Literal["last", "all"] | int = "last"
    lines: int | None = None
    follow: bool = False
    grep: str | None = None


@dataclass(frozen=True)
class Piece:
    attempt: int
    rank: int
    data: bytes


@dataclass
class LogReader:
    """Iterate over it for the pieces; afterwards `final` is the node's last word about the job (a VIEW).

    While following, a lost link is taken up again where it broke, with one line to `tell`. A link that never
    stood raises Unreachable.
    """

    backend: Backend
    run_dir: str
    which: Which
    tell: Callable[[str], None] = lambda text: None
    wait: Callable[[float], None] = time.sleep
    final: dict[str, Any] | None = None
    _offsets: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Piece]:
        losses, stood = 0, False
        while self.final is None:
            try:
                for piece in self._read():
                    if losses and stood:
                        losses = 0
                    stood = True
                    if piece:
                        yield piece
            except Unreachable as error:
                if not (self.which.follow and stood):
                    raise
                if losses == 0:
                    self.tell(f"the link is lost ({error.what}); the job goes on, trying again")
                self.wait(_BACK_OFF_S[min(losses, len(_BACK_OFF_S) - 1)])
                losses += 1

    def _read(self) -> Iterator[Piece | None]:
        """The pieces of one connection; None for a sign of life."""
        which = self.which
        ranks = list(which.ranks) if isinstance(which.ranks, tuple) else which.ranks
        lines = None if self._offsets else which.lines
        with closing(self.backend.logs(
                self.run_dir, ranks=ranks, attempts=which.attempt, follow=which.follow, lines=lines,
                offsets=dict(self._offsets), grep=which.grep)) as frames:
            for header, body in frames:
                if "f" in header:
                    attempt, _, rank = header["f"].partition("/rank-")
                    self._offsets[header["f"]] = header.get("next", header["o"] + header["n"])
                    yield Piece(int(attempt), int(rank), body) if body else None
                elif "end" in header:
                    self.final = header["end"]
                    return
                else:
                    yield None
        raise Unreachable("it ended in the middle")


def settled(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces as they would stand on a terminal in the end: of each progress bar (`\\r`) its last state alone."""
    open_lines: dict[tuple[int, int], bytes] = {}
    for piece in pieces:
        source = (piece.attempt, piece.rank)
        whole, newline, rest = (open_lines.pop(source, b"") + piece.data).rpartition(b"\n")
        if b"\r" in whole:
            whole = b"\n".join(map(_last_state, whole.split(b"\n")))
        if b"\r" in rest:
            rest = _last_state(rest) + b"\r"[:rest.endswith(b"\r")]
        if len(rest) > _LONGEST_LINE:
            newline, rest = newline + rest, b""
        elif rest:
            open_lines[source] = rest
        yield Piece(piece.attempt, piece.rank, whole + newline)
    for source, rest in open_lines.items():
        yield Piece(*source, _last_state(rest))


def _last_state(line: bytes) -> bytes:
    """What a line shows that was written over and over: its last part that is not blank."""
    if b"\r" not in line:
        return line
    before, _, last = line.rstrip(b"\r").rpartition(b"\r")
    while before and not last.strip():
        before, _, last = before.rpartition(b"\r")
    return last


def merged(pieces: Iterable[Piece]) -> Iterator[bytes]:
    """Whole lines of several ranks, each after `[rank 1] `; an unfinished one at the end gets a newline."""
    open_lines: dict[tuple[int, int], bytes] = {}
    for piece in pieces:
        source = (piece.attempt, piece.rank)
        text = open_lines.pop(source, b"") + piece.data
        lines, rest = _split(text)
        if rest:
            open_lines[source] = rest
        yield b"".join(_prefix(piece.rank) + line for line in lines)
    for (_, rank), rest in sorted(open_lines.items()):
        yield _prefix(rank) + rest + (b"" if rest.endswith((b"\n", b"\r")) else b"\n")


def _split(text: bytes) -> tuple[list[bytes], bytes]:
    """Complete lines, and the rest. `\\r` ends a line (a progress bar), but the last may become `\\r\\n`."""
    lines = text.splitlines(keepends=True)
    rest = b"" if not lines or lines[-1].endswith(b"\n") else lines.pop()
    if len(rest) > _LONGEST_LINE:
        return [*lines, rest + b"\n"], b""
    return lines, rest


def _prefix(rank: int) -> bytes:
    return b"[rank %d] " % rank
