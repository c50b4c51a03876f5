"""How much a run has to do, what of its config decides how long a step of it takes, and the few steps that measure it.

Known of every run file with a schema: of those that train by `training.max_steps`, `training.validation` and
`checkpoint`, of phase 2 by its `sources`.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import NO_VALUE
from configs.keys import look_up
from configs.load import Resolved

# What changes no step's length: how many there are, numbers that the arithmetic is the same for, where things lie.
_NO_MATTER = re.compile(
    r"(.*\.)?(max_steps|every_steps|max_samples|seed|on_bad|background|log_every_steps|max_consecutive_skips)"
    r"|training\.(optimizer|schedule)\..*|(checkpoint|wandb|quality|matte|sources|fit)\..*"
    r"|mode|val_share|turntable_frames|init_from")
_WEIGHTS = re.compile(r"(.*\.)?(checkpoint|pretrained)")  # paths that say how large a network is
_REFERENCE = re.compile(r"\$\{([^{}.]+)\.([^{}]+)\}")
_UPDATES, _FEWEST = 6, 12  # of a calibration: the first of them are slower


@dataclass(frozen=True)
class Volume:
    """What a run has to do."""

    work: dict[str, Any]  # key -> value of all that decides how long a step takes
    steps: int | None = None
    evaluations: int = 0
    val_samples: int | None = None  # at most so many in each
    checkpoints: int = 0  # on the disk at a time: the last ones, the best one and one that is being written
    validation: str = ""  # the key of the list they are from
    source: str = ""  # the key of the list whose samples are the steps
    each_view: bool = False  # every view of them is one
    limit: int | None = None  # of these


def volume_of(run: Resolved, works: Mapping[str, str]) -> Volume | None:
    """None: a free-form run file. `works`: label -> fingerprint, of the jobs that this one takes from."""
    if run.typed is None:
        return None
    work = dict(_work(run, works))
    if "sources" in run.data:
        sources = run.data["sources"]
        return Volume(work, source="sources.path", each_view=sources["view"] == "all", limit=sources["limit"])
    steps = _number(run, "training.max_steps")
    if steps is None:
        return Volume(work)
    every, saves = _number(run, "training.validation.every_steps"), _number(run, "checkpoint.every_steps")
    keeps = _number(run, "checkpoint.keep_last") or 0
    return Volume(
        work, steps, 2 + (steps - 1) // every if every else 0, _number(run, "training.validation.max_samples"),
        min(keeps + 2, 1 + (steps - 1) // saves) if saves else 0,
        "training.validation.path" if _number(run, "training.validation.every_steps") else "")


def calibration_sets(run: Resolved, ranks: int) -> list[str]:
    """`--set` values that make it as short as can be measured; its steps are as long as ever."""
    if "sources" in run.data:
        count = (run.data["batch"] or run.data["max_batch"]) * ranks
        accepts = {"min_coverage": 0, "max_coverage": 1, "min_difference": 0, "min_explained": 0, "max_rejected": 1}
        return [f"sources.limit={min(count, run.data['sources']['limit'] or count)}",
                *(f"quality.{key}={value}" for key, value in accepts.items())]
    total = _number(run, "training.max_steps")
    if total is None:
        return []
    steps = min(total, max(_FEWEST, _UPDATES * (_number(run, "training.accumulation") or 1)))
    values = {"training.max_steps": steps, "training.validation.every_steps": steps,
              "checkpoint.every_steps": steps, "training.log_every_steps": 1, "training.validation.max_samples": 2}
    return [f"{key}={value}" for key, value in values.items()
            if look_up(run.data, tuple(key.split("."))) is not NO_VALUE]


def _work(run: Resolved, works: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for key, value in _leaves(run.data, ""):
        if _NO_MATTER.fullmatch(key):
            continue
        if key in run.path_keys and not _WEIGHTS.fullmatch(key):
            value = "given"
        if isinstance(value, str) and (taken := _REFERENCE.fullmatch(value)):
            value = f"{works.get(taken[1], taken[1])}.{taken[2]}"
        yield key, value


def _leaves(data: Any, key: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(data, dict):
        yield key, data
        return
    for name, value in data.items():
        yield from _leaves(value, f"{key}.{name}" if key else name)


def _number(run: Resolved, key: str) -> int | None:
    found = look_up(run.data, tuple(key.split(".")))
    return found if isinstance(found, int) else None
