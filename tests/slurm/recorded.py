"""Reads tests/slurm/records."""
from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("records")


@dataclass(frozen=True)
class Answer:
    """What a tool says. `hang_s`: it says nothing for so long first."""

    stdout: str = ""
    stderr: str = ""
    code: int = 0
    hang_s: float = 0.0


def answer(name: str) -> Answer:
    """A recorded answer, such as `squeue.controller-down`. Raises KeyError."""
    lines = _blocks("answers")[name]
    marked = {mark: "".join(f"{line[2:]}\n" for line in lines if line.startswith(f"{mark} ")) for mark in ">!="}
    return Answer(marked[">"], marked["!"], int(marked["="]))


def command(name: str) -> list[str]:
    """The words of the command that was answered so."""
    return next(line[2:] for line in _blocks("answers")[name] if line.startswith("$ ")).split()


def queued(name: str, **changed: str) -> dict[str, str]:
    """A job as squeue shows it, such as `pending.resources`, with some fields changed. Raises KeyError.

    It belongs to who runs the tests unless that is changed.
    """
    own = {"UserID": str(os.getuid()), "UserName": getpass.getuser()}
    return _row("squeue", name, own | changed)


def accounted(name: str, **changed: str) -> dict[str, str]:
    """A job as sacct shows it, such as `out-of-memory`, with some fields changed. Raises KeyError."""
    return _row("sacct", name, changed)


def names(kind: str) -> list[str]:
    """The names in records/KIND.txt: answers, squeue or sacct."""
    return list(_blocks(kind))


def _row(kind: str, name: str, changed: dict[str, str]) -> dict[str, str]:
    row = dict(line.split("=", 1) for line in _blocks(kind)[name])
    if unknown := set(changed) - set(row):
        raise KeyError(f"no field {sorted(unknown)[0]} in the records of {kind}")
    return row | changed


@cache
def _blocks(kind: str) -> dict[str, list[str]]:
    text = FOLDER.joinpath(f"{kind}.txt").read_text()
    blocks = [block.splitlines() for block in text.strip("\n").split("\n\n")]
    return {title[2:]: lines for title, *lines in blocks}
