"""Mistakes and failures on the person's side of the launcher, each with its exit code. Standard library only.

    LaunchError
      ├─ Wrong       2  what was asked for cannot be meant: no such job, a name that is taken, a bad path
      ├─ TooBig      2  the snapshot is larger than its limit
      ├─ Refused     4  would lose work
      └─ Failed      1  it was tried and did not work out

`cluster.errors.ClusterError` and `configs.errors.ConfigError` have an `exit_code` too; `cli.main` prints them
all alike.
"""
from __future__ import annotations

from collections.abc import Iterable


class LaunchError(Exception):
    """`what` is the matter, `where`, and a `hint`: what to do next."""

    exit_code = 1

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what)

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        return f"{where}{self.what}" + (f"\n  {self.hint}" if self.hint else "")


class Wrong(LaunchError):
    exit_code = 2


class TooBig(Wrong):
    pass


class Refused(LaunchError):
    exit_code = 4


class Failed(LaunchError):
    exit_code = 1


class Interrupted(LaunchError):
    """Ctrl-C while only looking on: the job is left alone."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    import difflib

    close = difflib.get_close_matches(word, list(known), 1)
    return close[0] if close else None
