"""What several verbs share: a parser in one style, the current directory, durations, the terminal's width."""
from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from launcher.errors import Wrong


def parser(verb: str, about: str, usage: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"launch {verb}", description=about, usage=usage, allow_abbrev=False)


def here() -> Path:
    """The current directory. Raises Wrong when it was deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise Wrong("the current directory is gone", hint="cd to one that exists") from None


def seconds(option: str, text: str | None) -> float | None:
    """`90s`, `30m`, `24h` in seconds. Raises Wrong."""
    if text is None:
        return None
    if text.removesuffix("s").isdecimal():
        return float(text.removesuffix("s"))
    from configs.fields import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise Wrong(str(error), option) from None


def columns() -> int | None:
    """The width to print for; None when nobody looks at it on a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def tell(text: str) -> None:
    """A word to the person beside the result."""
    print(text, file=sys.stderr, flush=True)
