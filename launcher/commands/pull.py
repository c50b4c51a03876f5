"""launch pull: fetch what a job has made."""
from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher import api, views
from launcher.commands._common import here, parser, tell
from launcher.errors import Interrupted
from launcher.pull import Pulled, size_of

_PATTERNS = """
PATTERN: samples or *.ply: that name anywhere below artifacts/, or at the top of the run directory (config.yaml,
checkpoints); 'attempts/*/logs': a path, ** is any number of directories; checkpoints.best, checkpoints.last: that
checkpoint. A directory means all that is in it. Without a pattern: artifacts/.
"""
_DRAW_S = 0.1
_RATE_S = 0.5  # the speed is measured over the latest stretch of at least this


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    bar = Bar() if sys.stderr.isatty() else None
    try:
        done = api.pull(args.job, args.pattern, out=args.output, force=args.force, tell=tell,
                        progress=bar.draw if bar else lambda here, total, path: None, start=here())
    except KeyboardInterrupt:
        raise Interrupted("\nnot all has arrived", hint=f"go on with it: {_again(args)}") from None
    finally:
        if bar:
            bar.clear()
    for words in done.left_out:
        tell(f"left out: {views.visible(words)}")
    for path, why in done.problems.items():
        tell(f"error: {views.visible(path)}: {why}")
    print(views.as_json(dataclasses.asdict(done)) if args.json else _said(done))
    return 0 if not done.problems else 4 if len(done.differing) == len(done.problems) else 1


def _said(done: Pulled) -> str:
    count = len(done.files)
    place = os.path.relpath(done.directory)
    before = f", {done.already} of them were here already" if done.already else ""
    return (f"{done.job}: {count} file{'' if count == 1 else 's'}, {size_of(done.bytes)} in {views.visible(place)}"
            f"{before}; sha256 verified")


def _again(args) -> str:
    words = ["launch", "pull", args.job, *([args.pattern] if args.pattern else []),
             *(["-o", str(args.output)] if args.output else []), *(["--force"] if args.force else [])]
    return shlex.join(words)


class Bar:
    """One line on a terminal: how much is here, how fast it comes, how long it takes, which file."""

    def __init__(self) -> None:
        self._drawn = 0.0
        self._marks: list[tuple[float, int]] = []

    def draw(self, arrived: int, total: int, path: str) -> None:
        now = time.monotonic()
        if now - self._drawn < _DRAW_S and arrived < total:
            return
        self._drawn = now
        self._marks = [*self._marks[-int(5 / _DRAW_S):], (now, arrived)]
        text = bar(arrived, total, self._rate(), path)
        sys.stderr.write("\r" + views.cut(text, (os.get_terminal_size(2).columns or 80) - 1) + "\x1b[K")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._marks:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _rate(self) -> float | None:
        (since, before), (now, arrived) = self._marks[0], self._marks[-1]
        return (arrived - before) / (now - since) if now - since >= _RATE_S else None


def bar(arrived: int, total: int, rate: float | None, path: str) -> str:
    """`62 %  312 MB of 500 MB  11.2 MB/s  17 s left  artifacts/samples/0001.png`."""
    parts = [f"{100 * arrived // total if total else 100:3d} %", f"{size_of(arrived)} of {size_of(total)}"]
    if rate:
        parts += [f"{size_of(rate)}/s", f"{views.age((total - arrived) / rate)} left"]
    return "  ".join([*parts, views.visible(path)])


def _parser():
    p = parser("pull", "Fetch the artifacts of a job, or other files of its run directory, and verify each. What was "
                       "cut off goes on where it stopped.")
    p.epilog = _PATTERNS
    p.add_argument("job", metavar="JOB", help="an id, the beginning of one, a name, @last")
    p.add_argument("pattern", nargs="?", metavar="PATTERN", help="which files; default: artifacts/")
    p.add_argument("-o", "--output", type=Path, metavar="DIR",
                   help="where to; files there that differ are left alone; default: a directory of the job's name")
    p.add_argument("--force", action="store_true", help="replace files in DIR that differ")
    p.add_argument("--json", action="store_true", help="one object")
    return p
