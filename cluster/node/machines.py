"""The machines of a SLURM cluster, as sinfo tells them."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.node import slurm_tools
from cluster.node.refusals import refusal

_COLUMNS = "%N|%P|%T|%G|%c|%m|%a|%l"
_ANSWER_S = 20.0


@dataclass(frozen=True)
class Machine:
    """A node of the cluster in one of its partitions."""

    name: str
    partition: str
    default: bool  # of the partition: jobs that name none go there
    cpus: int
    gpus: int
    limit_s: float | None  # the longest time of a job there; None: no limit
    state: str  # in sinfo's words


def machines() -> list[Machine]:
    """Every node once per partition. Raises ClusterError: SLURM could not be asked."""
    try:
        said = slurm_tools.run(["sinfo", "-h", "-a", "-N", "-o", _COLUMNS], _ANSWER_S)
    except slurm_tools.SlurmFailed as error:
        raise refusal(error.words or str(error), {}) from None
    rows = (line.split("|") for line in said.splitlines())
    return [Machine(name, partition.rstrip("*"), partition.endswith("*"), _number(cpus), _gpus(gres), _seconds(limit),
                    state)
            for name, partition, state, gres, cpus, _memory, _up, limit in (row for row in rows if len(row) == 8)]


def answer(_request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """The question `machines` of a client."""
    return {"machines": [asdict(one) for one in machines()]}


def of_partition(found: Sequence[Machine], partition: str | None) -> list[Machine]:
    """Those that a job in `partition` (`a,b`: in one of them; None: the default) could run on."""
    names = partition.split(",") if partition else []
    return [one for one in found if (one.partition in names if names else one.default)]


def _gpus(gres: str) -> int:
    """Of `gpu:h100:8(S:0-1),nvme:1`: 8."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^,:()]+)?:(\d+)", gres))


def _number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def _seconds(text: str) -> float | None:
    """Of sinfo's `[D-]HH:MM:SS`, `MM:SS` or `infinite`."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return days * 86400.0 + hours * 3600 + minutes * 60 + seconds
