"""What the rules look at, and what they find."""
from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from cluster.node import thresholds as limit

Line = dict[str, Any]
Points = list[tuple[int, float]]  # (step, value)
Severity = Literal["error", "warning", "info"]

PAGE = "docs/doctor.md"
_WORDS = ("nan", "inf", "-inf")
_LEAF = re.compile(r"( *)([\w./-]+):(?: +(.*?))? *$")
_BATCH = ("batch_size", "batch_per_rank", "batch_per_gpu", "batch", "batch_size_per_gpu", "train_batch_size")


@dataclass(frozen=True)
class Finding:
    rule: str
    severity: Severity
    what: str  # with its numbers
    why: str  # it matters
    cause: str  # the likely one
    fix: str  # a command
    first: int | None = None  # steps: where
    last: int | None = None
    level: float | None = None  # of the loss: what it is held against, for a drawing

    @property
    def page(self) -> str:
        return f"{PAGE}#{self.rule}"


@dataclass(frozen=True)
class Attempt:
    """One attempt as its journal and files tell it; times in unix s, None: not written."""

    number: int
    started: float | None = None
    launched: float | None = None
    ended: float | None = None
    resume_step: int | None = None
    reason: str = ""
    detail: str = ""
    lines: Sequence[Line] = ()  # its own metrics, `resumed` lines too
    by: str = ""  # who started it, as cluster.events.AttemptStarted has it
    final: bool = False  # its job ended with it
    made: float | None = None  # when its directory was filled: before it waited for GPUs
    seen: float | None = None  # last heartbeat of one without an ending


@dataclass(frozen=True)
class Case:
    """One job. `lines` is the merged series of all its attempts, without a step twice."""

    job: str
    lines: Sequence[Line]
    state: str = "COMPLETED"
    now: float = 0.0  # unix s
    # dotted key -> value as it is written, of the attempt that made the newest steps
    config: dict[str, str] = field(default_factory=dict)
    newest: dict[str, str] = field(default_factory=dict)  # the same of the newest attempt; empty: as `config`
    argv: tuple[str, ...] = ()
    world: int = 1  # ranks
    gpus: int = 0  # of all its nodes
    by_hand: bool = False  # launch did not start it and cannot restart it
    attempts: Sequence[Attempt] = ()
    will_step: bool = False  # one of our trainers, whatever it has written yet
    from_log: bool = False  # read by progress rules: no times, rounded numbers
    written: float | None = None  # unix s of the last sign of life
    gpu_use: Sequence[tuple[float, int]] = ()  # newest attempt: unix s, % that its busiest GPU worked
    reason: str = ""
    detail: str = ""

    @cached_property
    def steps(self) -> list[Line]:
        return [line for line in self.lines if "event" not in line]

    @cached_property
    def evaluations(self) -> list[Line]:
        return [line for line in self.lines if line.get("event") == "eval"]

    @cached_property
    def skips(self) -> list[Line]:
        return [line for line in self.lines if line.get("event") == "skipped"]

    @cached_property
    def applied(self) -> int | None:
        """Updates; None: it counts none."""
        return next((line["applied"] for line in reversed(self.lines) if isinstance(line.get("applied"), int)), None)

    @property
    def total(self) -> int | None:
        return next((line["total"] for line in reversed(self.lines) if isinstance(line.get("total"), int)), None)

    @property
    def step(self) -> int | None:
        return self.lines[-1]["step"] if self.lines else None

    @property
    def whole(self) -> bool:
        """Whether it went to its last step."""
        return self.total is not None and self.step is not None and self.step >= self.total

    @property
    def over(self) -> bool:
        """Whether a restart would find nothing left to train."""
        return self.whole or self.state == "COMPLETED"

    @property
    def runs(self) -> bool:
        return self.state == "RUNNING"

    @cached_property
    def batches(self) -> list[int]:
        """What a contrastive loss may be taken over, by the config and the command; empty: nobody says."""
        said = [value for key, value in self.config.items() if key.rpartition(".")[2] in _BATCH]
        words = [word for one in self.argv for word in one.split("=", 1)]
        said += [value for name, value in zip(words, words[1:]) if name.lstrip("-").replace("-", "_") in _BATCH]
        found = [int(value) for value in said if value.isdecimal()]
        return sorted({times * batch for batch in found for times in (1, self.world) if times * batch > 1})

    def key(self, *words: str) -> str | None:
        """The config's key that ends with one of these words, the shortest of several."""
        found = [key for key in self.config if key.rpartition(".")[2] in words]
        return min(found, key=lambda key: (key.count("."), len(key)), default=None)

    def number(self, word: str) -> float | None:
        key = self.key(*_SYNONYMS.get(word, (word,)))
        return as_number(self.config[key]) if key else None

    def restart(self, anew: bool = False, **changes: float) -> str:
        """The command that starts it again with other values, of those keys that its config has. `anew`: not from its
        checkpoints. Where that is the same once more, or launch cannot do it: a command that only looks, or `kill`."""
        words: list[str] = []
        for word, value in changes.items():
            if key := self.key(*_SYNONYMS.get(word, (word,))):
                words += ["--set", f"{key}={_as_written(self.config[key], word, value)}"]
        if self.by_hand or not words and (changes or self.over and not anew):
            return self.again_or("logs")
        return shlex.join(["launch", "restart", self.job, *(["--resume", "never"] if anew else []), *words])

    def gentler(self, anew: bool = False) -> str:
        """The same with a lower learning rate and a longer warm-up. `anew`: its weights are lost; one that is over
        begins anew in any case."""
        changes: dict[str, float] = {}
        if rate := self.number("lr"):
            changes["lr"] = min(rate / limit.GENTLER_RATE, limit.SANE_RATE)
        steps, warmup = self.total or self.number("steps") or 0, self.number("warmup")
        longer = max(limit.LONGER_WARMUP, 2 * (warmup or 0))
        longer = min(longer, max(1, steps // limit.WARMUP_PART)) if steps else longer
        if warmup and warmup >= 1 and (longer > warmup or 0 < steps <= warmup):
            changes["warmup"] = longer
        return self.restart(anew or self.over, **changes) if changes else self.again_or("logs")

    def again_or(self, command: str) -> str:
        """`launch kill JOB` of one that runs and wastes its place; else `command`."""
        return f"launch kill {self.job}" if self.runs else f"launch {command} {self.job}"


_SYNONYMS = {"lr": ("lr", "learning_rate", "base_lr"), "warmup": ("warmup", "warmup_steps", "warmup_updates"),
             "steps": ("max_steps", "total_steps", "steps"), "batch": _BATCH,
             "workers": ("loader_workers", "num_workers", "dataloader_num_workers")}


def _as_written(before: str, word: str, value: float) -> str:
    """A count stays a whole number where the config has one."""
    return f"{value:.0f}" if word != "lr" and before.lstrip("+-").isdecimal() else f"{value:.3g}"


def as_number(value: Any) -> float | None:
    """None: no number, or one that is not finite."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if type(value) in (float, int) and math.isfinite(value) else None


def is_broken(value: Any) -> bool:
    """Whether a metric is not finite; JSON lacks such numbers, so they come as words."""
    return value in _WORDS or isinstance(value, float) and not math.isfinite(value)


def points(lines: Iterable[Line], key: str) -> Points:
    """The finite values of one metric."""
    return [(line["step"], value) for line in lines
            if type(value := line.get(key)) in (float, int) and math.isfinite(value)]


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def median(values: Iterable[float]) -> float:
    found = sorted(values)
    return found[len(found) // 2]


def recent(found: Points, count: int) -> float:
    return mean(value for _, value in found[-count:])


def _json_leaves(key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {key: value if isinstance(value, str) else json.dumps(value)}
    return {name: leaf for word, inner in value.items()
            for name, leaf in _json_leaves(f"{key}.{word}" if key else word, inner).items()}


def leaves(text: str) -> dict[str, str]:
    """The scalars of a config.yaml as launch writes it (block style; JSON by hand), by dotted key. A node has no YAML
    parser."""
    if text.lstrip().startswith("{"):
        return _json_leaves("", json.loads(text))
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        if not (match := _LEAF.fullmatch(line)):
            continue
        depth = len(match[1])
        while above and above[-1][0] >= depth:
            above.pop()
        if match[3]:
            found[".".join([*(key for _, key in above), match[2]])] = match[3].strip("'\"")
        else:
            above.append((depth, match[2]))
    return found
