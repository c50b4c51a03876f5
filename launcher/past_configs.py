"""The configs with which a job's attempts ran: which one its results come from, and what each restart changed."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from configs.load import ABSENT, diff
from configs.yaml12 import parse

_NAMED = 8  # values of one attempt

Changes = list[dict[str, Any]]  # {key, old, new}; without old or new: it was, or is, not there


def told_config(shown: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """(config.yaml, its attempt) of the attempt that made the newest steps; attempt None: it is the newest config."""
    configs, made_by = shown["configs"], shown["made_by"]
    older = [(number, text) for number, text in configs if made_by is not None and number <= made_by]
    if not older or older[-1][1] == configs[-1][1]:
        return shown["config"], None
    return older[-1][1], made_by


def with_changes(attempts: Sequence[dict[str, Any]], configs: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """The attempts with `changes`: what differs from the config of the one before."""
    changed = {number: changes(before, text) for (_, before), (number, text) in zip(configs, configs[1:])}
    return [one | {"changes": changed.get(one["n"], [])} for one in attempts]


def changes(before: str, after: str) -> Changes:
    """Of two config.yaml. Raises ConfigError."""
    old, new = (parse(text, "config.yaml").data if text.strip() else {} for text in (before, after))
    found = []
    for key, was, now in diff(old, new):
        values = {"old": was, "new": now}
        found.append({"key": key} | {name: value for name, value in values.items() if value is not ABSENT})
    return found


def in_words(one: Mapping[str, Any]) -> str:
    """`attempt 1: training.optimizer.lr 1 -> 0.2`; empty: it ran with the config of the one before."""
    changed = one.get("changes") or []
    told = [f"{change['key']} {_value(change, 'old')} -> {_value(change, 'new')}" for change in changed[:_NAMED]]
    told += [f"and {len(changed) - _NAMED} more"] if len(changed) > _NAMED else []
    return f"attempt {one['n']}: {', '.join(told)}" if told else ""


def _value(change: Mapping[str, Any], which: str) -> str:
    value = change.get(which, "(absent)")
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
