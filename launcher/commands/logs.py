"""launch logs: what a job printed, to the byte."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from launcher import api, sentences
from launcher.commands._common import count, here, parser, tell
from launcher.errors import Interrupted, Wrong
from launcher.jobs import JobStatus
from launcher.logs import LogReader, Piece, Which, merged, settled

_BARS = """
Into a file or a pipe goes every byte of one rank as it was printed. On a terminal, without -f, and of several ranks, a
progress bar that was drawn over and over is shown as it stood in the end. --grep takes each of its states for a line.
"""


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    which = Which(_ranks(args.rank), _attempt(args.attempt), args.lines, args.follow, args.grep)
    reader = api.logs(args.job, which, tell=tell, start=here())
    job, written = copy(reader, args.job)
    if args.follow:
        tell(sentences.fate(job))
    elif not written and args.lines != 0:
        tell(sentences.silent(job, args.grep))
    return 0


def _parser():
    p = parser("logs", "What a job printed: stdout and stderr of its first rank, to the byte.")
    p.epilog = _BARS
    p.add_argument("job", nargs="?", default="@last", metavar="JOB", help="default: @last")
    p.add_argument("-f", "--follow", action="store_true",
                   help="go on until the job has ended; Ctrl-C leaves it alone")
    p.add_argument("-n", dest="lines", type=count, metavar="N", help="only the last N lines; with --grep, that match")
    p.add_argument("--rank", default="0", metavar="R|all",
                   help="another rank, several as 0,2, or all merged by lines")
    p.add_argument("--attempt", default="last", metavar="K|all", help="an earlier attempt, or all of them")
    p.add_argument("--grep", metavar="RE", help="only lines that match; searched on the node")
    return p


def copy(reader: LogReader, job: str) -> tuple[JobStatus, int]:
    """The log to stdout -> the last that was heard of the job, and how many bytes there were.

    Ctrl-C raises Interrupted.
    """
    written = 0
    several = not (reader.which.ranks == "0" or len(reader.which.ranks) == 1)
    pieces = _announced(reader)
    if not reader.which.follow and (several or sys.stdout.isatty()):
        pieces = settled(pieces)
    try:
        for data in merged(pieces) if several else (piece.data for piece in pieces):
            _write(data)
            written += len(data)
    except KeyboardInterrupt:
        known = api.known(job)
        if known.ended or not reader.which.follow:
            raise
        raise Interrupted(
            f"\n{known.id} goes on, on {known.node}",
            hint=f"come back: launch logs -f {known.id}\n  stop it:   launch kill {known.id}") from None
    assert reader.final is not None
    return api.remember(job, reader.final), written


def _announced(reader: Iterable[Piece]) -> Iterator[Piece]:
    """A word at the border of two attempts, when a person looks on."""
    last: int | None = None
    for piece in reader:
        if last not in (None, piece.attempt) and sys.stderr.isatty():
            tell(f"--- attempt {piece.attempt} ---")
        last = piece.attempt
        yield piece


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sys.stdout.fileno(), view):]


def _ranks(text: str) -> str | tuple[int, ...]:
    if text == "all":
        return "all"
    if not all(part.isdecimal() for part in text.split(",")):
        raise Wrong(f"--rank {text!r}: a number, several as 0,2, or all")
    return tuple(int(part) for part in text.split(","))


def _attempt(text: str) -> str | int:
    if text in ("all", "last"):
        return text
    if not text.isdecimal():
        raise Wrong(f"--attempt {text!r}: a number, last or all")
    return int(text)
