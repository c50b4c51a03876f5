"""What several verbs share: a parser in one style, the current directory, durations, the terminal's width."""
from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from launcher.errors import Wrong, nearest

UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the words of a verb as everything else is said: raises Wrong."""

    def error(self, message: str) -> NoReturn:
        hint = f"{self.prog} --help says what it takes"
        if message.startswith(UNKNOWN):
            words = message.removeprefix(UNKNOWN)
            message = f"{words}: not understood"
            close = nearest(words.split(maxsplit=1)[0].partition("=")[0], self._option_string_actions)
            hint = f"nearest: {close}; {hint}" if close else hint
        raise Wrong(message.removeprefix("argument "), hint=hint)


def parser(verb: str, about: str, usage: str | None = None) -> Parser:
    return Parser(prog=f"launch {verb}", description=about, usage=usage, allow_abbrev=False)


def add_progress(p: Parser, where: str) -> None:
    p.add_argument("--progress", action="append", default=[], metavar="step=RE",
                   help=f"how {where} shows step, total or loss: a regular expression with one group; default: tqdm's "
                        "bars, `step 12/600`, `loss 0.5`")


def split_command(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Everything after the first `--` is the command, whatever it looks like."""
    words = list(argv)
    if "--" not in words:
        return words, ()
    at = words.index("--")
    return words[:at], tuple(words[at + 1:])


def count(text: str) -> int:
    """A whole number from 0 on, for `type=` of an option."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if (value := count(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: at least 1")
    return value


def new_file(suffix: str) -> Callable[[str], Path]:
    """A file of this kind that can be written, for `type=` of an option: told before anything is asked."""
    def path(text: str) -> Path:
        found = Path(text)
        if found.suffix.lower() != suffix:
            kind = suffix.removeprefix(".").upper()
            raise argparse.ArgumentTypeError(f"{text!r}: it is written as {kind}, so its name has to end with {suffix}")
        if not (here() / found).parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no directory {str(found.parent)!r} for {found.name}")
        return found
    return path


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
