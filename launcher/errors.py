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

from cluster.errors import Explained


class LaunchError(Explained):
    """`where` is a file, a job or an option."""


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
