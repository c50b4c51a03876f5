"""Which keys of a config are others than those that weights were made with, and what to set. Imports no torch."""
from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from configs.errors import ConfigError
from configs.yaml12 import read

_ATTEMPT = re.compile(r"step-\d+-a(\d+)")


@dataclass(frozen=True)
class Differs:
    what: str  # each key, its value here and there
    fix: str  # the --set that make them the same


def differing(values: Mapping[str, tuple[Any, Any]]) -> Differs | None:
    """key -> (here, there); None: they are the same."""
    other = {key: both for key, both in sorted(values.items()) if both[0] != both[1]}
    if not other:
        return None
    what = "; ".join(f"{key} is {_text(here)} here and {_text(there)} in the weights"
                     for key, (here, there) in other.items())
    words = [word for key, (_, there) in other.items() for word in ("--set", f"{key}={_text(there)}")]
    return Differs(what, shlex.join(words))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def model_in(config: Path) -> dict[str, Any]:
    """The keys below `model:` of a run file, dotted; empty: it cannot be read, or has none."""
    try:
        data = read(config).data if config.is_file() else None
    except ConfigError:
        return {}
    return leaves(data.get("model"), "model") if isinstance(data, dict) else {}


def other_model(checkpoint: Path, here: Mapping[str, Any]) -> Differs | None:
    """`here` as of `model_in`, held against the attempt that wrote the checkpoint. None: they are the same, or it lies
    in no run directory."""
    run, written = RunDir(checkpoint.parent.parent), _ATTEMPT.fullmatch(checkpoint.name)
    there = model_in(run.attempt(int(written[1])).config) if written else {}
    there = there or model_in(run.config)
    return differing({key: (here[key], there[key]) for key in here.keys() & there.keys()})


def leaves(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {name: leaf for word, below in value.items() for name, leaf in leaves(below, f"{key}.{word}").items()}
