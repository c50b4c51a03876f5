"""Patterns of `.launchignore`, by the rules of .gitignore."""
from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    regex: re.Pattern[str]  # matches a path, or a directory above it
    keeps: bool  # `!`: takes back what an earlier pattern left out


def read_patterns(text: str) -> list[Pattern]:
    """Raises ValueError for a line that is no pattern."""
    lines = (line.rstrip("\r") for line in text.split("\n"))
    return [_pattern(line.strip()) for line in lines if line.strip() and not line.startswith("#")]


def ignored(path: str, patterns: list[Pattern]) -> bool:
    """Whether the relative path `a/b/c` is left out; the last pattern that matches decides."""
    return next((not pattern.keeps for pattern in reversed(patterns) if pattern.regex.fullmatch(path)), False)


def _pattern(line: str) -> Pattern:
    keeps, body = line.startswith("!"), line.removeprefix("!")
    only_directories, body = body.endswith("/"), body.rstrip("/")
    anywhere, body = "/" not in body, body.removeprefix("/")
    below = "/.*" if only_directories else "(?:/.*)?"
    try:
        above = "(?:.*/)?" if anywhere else ""
        return Pattern(re.compile(above + _translate(body) + below, re.DOTALL), keeps)
    except re.error as error:
        raise ValueError(f"{line!r} is no pattern: {error}") from None


_TOKEN = re.compile(r"/\*\*/|^\*\*/|/\*\*$|\*|\?|\[!?[^\]]+\]|\\.|.", re.DOTALL)
_MEANING = {"/**/": "/(?:.*/)?", "**/": "(?:.*/)?", "/**": "/.*", "*": "[^/]*", "?": "[^/]"}


def _translate(body: str) -> str:
    parts = []
    for token in _TOKEN.findall(body):
        if token in _MEANING:
            parts.append(_MEANING[token])
        elif len(token) > 2 and token[0] == "[":
            parts.append("[" + token[1:-1].replace("\\", "\\\\").replace("!", "^", token[1] == "!") + "]")
        else:
            parts.append(re.escape(token[-1]))
    return "".join(parts)
