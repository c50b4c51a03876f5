"""Running a command and saying what it cost."""
from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PYTHON = sys.executable


class CommandFailed(Exception):
    """A command that is measured ended with a wrong exit code, so its figure would mean nothing."""


@dataclass(frozen=True)
class Spent:
    """Seconds. `cpu_s` is user + system of the process and of the children it waited for."""

    wall_s: float
    cpu_s: float
    stdout: str = ""

    def __str__(self) -> str:
        return f"{ms(self.wall_s)} (cpu {ms(self.cpu_s)})"


def spend(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None,
          stdin: Path | None = None, codes: Sequence[int] = (0,)) -> Spent:
    """Run a command to its end. Raises CommandFailed with what it said for another exit code."""
    given = open(stdin or os.devnull, "rb")
    with given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        process = subprocess.Popen(argv, env=env, cwd=cwd, stdin=given, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said, complaint = (_text(file) for file in (out, err))
    if process.returncode not in codes:
        command = " ".join(map(str, argv))
        raise CommandFailed(f"{command} ended with {process.returncode}\n{complaint[-2000:]}")
    return Spent(wall_s, usage.ru_utime + usage.ru_stime, said)


def _text(file: tempfile._TemporaryFileWrapper[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def in_turn(rounds: int, *actions: Callable[[], T]) -> list[list[T]]:
    """Each action `rounds` times, A B A B …, so that a neighbour's load falls on all; one list per action.

    An unmeasured first round warms the file cache.
    """
    found: list[list[T]] = [[] for _ in actions]
    for number in range(rounds + 1):
        for results, action in zip(found, actions):
            result = action()
            if number:
                results.append(result)
    return found


def typical(runs: Sequence[Spent]) -> Spent:
    return Spent(median([run.wall_s for run in runs]), median([run.cpu_s for run in runs]))


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.0095 else f"{seconds * 1000:.1f} ms"
