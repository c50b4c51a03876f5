"""The words that all schemas share: bounded numbers, paths, durations, resources."""
from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Weight = Annotated[float, Meta(ge=0)]
Text = Annotated[str, Meta(min_length=1)]
# A path on the node. Relative in a run file: below the node's `data:`; by --set: below the current directory.
DataPath = Annotated[str, Meta(min_length=1, extra={"path": True})]
Gpus = Count | Literal["shared"]

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `30m`, `24h`, `7d`, `1h30m` or SLURM's `[D-]HH:MM:SS`. Raises ValueError."""
    if clock := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return days * 86400.0 + hours * 3600 + minutes * 60 + seconds
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    whole = "".join(number + unit for number, unit in parts) == text
    if not parts or not whole or not all(unit for _, unit in parts[:-1]):
        raise ValueError(f"{text!r} is no duration: write 90s, 30m, 24h, 7d, 1h30m or HH:MM:SS")
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


class Strict(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The base of all that is read from a file."""


def check_duration(key: str, text: object) -> None:
    """Raises ValueError naming the key when `text` is a text but no duration."""
    if isinstance(text, str):
        try:
            parse_duration(text)
        except ValueError as error:
            raise ValueError(f"`{key}`: {error}") from None


Sbatch = dict[str, str | int | bool]  # options of sbatch by their long names; true: one without a value
_NOT_OF_SBATCH = {  # options that launch gives itself -> what to write instead
    "time": "--time or `resources: {time: …}`", "nodes": "--nodes or `resources: {nodes: …}`",
    "ntasks": "`resources: {procs: …}`", "ntasks-per-node": "`resources: {procs: …}`", "job-name": "--name",
    "array": "--sweep", "dependency": "--after", "output": "launch logs", "error": "launch logs", "open-mode": None,
    "signal": None, "kill-on-invalid-dep": None, "chdir": None, "wrap": None, "parsable": None, "test-only": None,
    "wait": "launch wait",
}


def check_sbatch(options: object) -> None:
    """Raises ValueError for an option that launch itself gives to sbatch, or that is written as a short one."""
    for name in options if isinstance(options, dict) else ():
        long = name.lstrip("-").replace("_", "-")
        if len(long) < 2:
            raise ValueError(f"`sbatch`: {name!r}: options stand here by their long names, as in account or mem")
        if long in _NOT_OF_SBATCH:
            instead = f"; use {_NOT_OF_SBATCH[long]}" if _NOT_OF_SBATCH[long] else ""
            raise ValueError(f"`sbatch`: {name}: launch itself gives this to sbatch{instead}")


class Resources(Strict):
    """What one job takes on each of its nodes. `procs`: ranks when `gpus` is 0, otherwise one rank per GPU."""

    gpus: Gpus = 0
    procs: Positive = 1
    nodes: Positive = 1
    time: str | None = None  # a limit, as in 24h; null: none. SLURM: of one allocation, the job goes on in the next
    sbatch: Sbatch = {}  # where SLURM runs it: account, qos, constraint, mem, cpus-per-task, …

    def __post_init__(self) -> None:
        check_duration("time", self.time)
        check_sbatch(self.sbatch)


class ResourcesOverride(Strict):
    """`resources:` of a run file: what differs from its stage's."""

    gpus: Gpus | UnsetType = UNSET
    procs: Positive | UnsetType = UNSET
    nodes: Positive | UnsetType = UNSET
    time: str | None | UnsetType = UNSET
    sbatch: Sbatch | UnsetType = UNSET

    def __post_init__(self) -> None:
        check_duration("time", self.time)
        check_sbatch(self.sbatch)


def check_pattern(key: str, pattern: str, around: str = "the number") -> None:
    """Raises ValueError: not a regular expression with exactly one group around what it is to find."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"`{key}`: no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"`{key}`: needs exactly one group ( ) around {around}, here: {groups}")
