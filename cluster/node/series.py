"""What a job says of itself, as one series: its metrics, or its output by the progress rules of its stage file."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster.contract import AttemptDir, RunDir, merged
from cluster.node.findings import Line
from cluster.node.unread import CUT

_LINE_MAX = 4096  # a regular expression never sees more of a line
_LOG_MAX = 16 << 20  # bytes of a log that are read at most, the newest
_SEPARATORS = re.compile(rb"[\r\n]+")


def of_attempt(attempt: AttemptDir, rules: Mapping[str, str], budget: int | None = None) -> list[Line]:
    """Its metrics; where it wrote none, what its rules find in its output. `budget`: bytes read at most, of which a
    quarter are the first ones."""
    found = [line for line in _json_lines(attempt.metrics, budget) if isinstance(line.get("step"), int)]
    return found or (_by_rules(attempt.rank_log(0), rules, budget or _LOG_MAX) if rules else [])


def whole(run: RunDir, rules: Mapping[str, str], budget: int | None = None) -> tuple[list[Line], list[list[Line]]]:
    """-> (the merged series, the lines of each attempt). With a budget: of the newest attempts."""
    attempts = run.attempts()
    lines = [of_attempt(attempt, rules, budget) for attempt in (attempts[-_ATTEMPTS:] if budget else attempts)]
    return merged(lines), lines


_ATTEMPTS = 3  # that are looked at within a budget


def from_log(run: RunDir) -> bool:
    """Whether the series can only come from the output."""
    return not any(attempt.metrics.exists() for attempt in run.attempts())


def written(run: RunDir) -> float | None:
    """Unix s of the last sign of life of the newest attempt."""
    attempts = run.attempts()
    times = [path.stat().st_mtime for attempt in attempts[-1:] for path in (attempt.metrics, attempt.rank_log(0))
             if path.exists()]
    return times[0] if times else None  # a log that goes on while the metrics stand still is no step


def by_rules(output: bytes, rules: Mapping[str, str]) -> list[Line]:
    """The lines of metrics that regular expressions of one group find in a program's output.

    `step` begins a line; what else is found until the next step belongs to it (val/loss, lr, applied, attempted, …). A
    text that `skipped` matches is an update that was skipped.
    """
    expressions = {name: re.compile(rule) for name, rule in rules.items()}
    found: list[Line] = []
    cuts: dict[str, Line] = {}
    for raw in _SEPARATORS.split(output):
        text = raw[:_LINE_MAX].decode(errors="replace")
        matches = {name: match for name, expression in expressions.items() if (match := expression.search(text))}
        _take(found, {name: match[1] for name, match in matches.items()})
        for name, match in matches.items():
            if found and name not in cuts and (meant := _cut(match)):
                cuts[name] = {"event": CUT, "rule": name, "at": found[-1]["step"], "read": match[1], "meant": meant}
    return [*found, *(one | {"step": found[-1]["step"]} for one in cuts.values())]


def _cut(match: re.Match[str]) -> str | None:
    """The whole number where the group holds a part of it; None: it holds all of it."""
    if match[1] is None:
        return None
    (begin, end), text = match.span(1), match.string
    before, after = _BEGINNING.search(text[max(0, begin - _DIGITS):begin]), _REST.match(text[end:end + _DIGITS])
    meant = (before[0] if before else "") + match[1] + (after[0] if after else "")
    read, whole = _number(match[1]), _number(meant)
    return meant if isinstance(read, float) and isinstance(whole, float) and read != whole else None


_DIGITS = 24  # of a number at most
_BEGINNING = re.compile(r"(?:\d[\d.]*|(?<![\w.)\]-])-)$")  # the 1 of 12, the sign of -3
_REST = re.compile(r"(?:\d|\.\d|[eE][+-]?\d|,\d{3}(?!\d))[\d.]*(?:[eE][+-]?\d+)?")


def _take(found: list[Line], values: Mapping[str, str | None]) -> None:
    """Add what one line of text says."""
    numbers = {name: number for name, word in values.items() if (number := _number(word)) is not None}
    step = numbers.pop("step", None)
    if isinstance(step, float):
        at = int(step)
    elif not found:
        return
    else:
        at = found[-1]["step"]
    if "skipped" in values:
        found.append({"step": at, "event": "skipped", "skipped": numbers.get("skipped")})
        return
    counts = {name: int(value) for name, value in numbers.items()
              if name in ("total", "applied", "attempted") and isinstance(value, float)}
    if step is not None and not (found and found[-1]["step"] == at and "event" not in found[-1]):
        found.append({"step": at, **numbers, **counts})
    elif numbers:
        newest = next((line for line in reversed(found) if "event" not in line), None)
        if newest is None:
            found.append({"step": at, **numbers, **counts})
        else:
            newest.update(numbers | counts)


def _number(word: str | None) -> float | str | None:
    """Not finite: as the word that metrics have for it."""
    try:
        value = float((word or "").replace(",", ""))
    except ValueError:
        return None
    return str(value) if value != value or value in (float("inf"), float("-inf")) else value


def _by_rules(path: Path, rules: Mapping[str, str], budget: int) -> list[Line]:
    return [line for block in _blocks(path, budget) for line in by_rules(block, rules)]


def _json_lines(path: Path, budget: int | None) -> Iterator[Line]:
    for block in _blocks(path, budget):
        for raw in block.split(b"\n"):
            try:
                value = json.loads(raw)
            except ValueError:
                continue  # torn, or cut by the border of a block
            if isinstance(value, dict):
                yield value


def _blocks(path: Path, budget: int | None) -> Sequence[bytes]:
    """The file; of one larger than the budget its beginning and its end."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if budget is None or size <= budget:
                return [file.read()]
            head = file.read(budget // 4)
            file.seek(size - (budget - len(head)))
            return [head[:head.rfind(b"\n") + 1], file.read()]
    except FileNotFoundError:
        return []
