"""The words that ask for the same again: each command that `launch check` prints is about what it was asked for."""
from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.stages import Request

_HOUR_S = 3600


def words(request: Request) -> tuple[str, ...]:
    """Of a stage, after `launch check` or `launch submit`; what is so by default is left out."""
    given = {"--node": request.node if request.node != "local" else None, "--nodes": request.nodes,
             "--gpus": "shared" if request.share else request.gpus, "--config": request.config,
             "--resume": request.resume if request.resume != "auto" else None, "--time": _duration(request.time_s)}
    lists = {"--set": request.sets, "--sweep": request.sweeps}
    return (request.stage or "", *(word for option, value in given.items() if value is not None
                                   for word in (option, str(value))),
            *(word for option, values in lists.items() for value in values for word in (option, value)))


def check(request: Request) -> str:
    return shlex.join(["launch", "check", *words(request)])


def calibrate(request: Request) -> str:
    return shlex.join(["launch", "submit", *words(request), "--dry-run", "--calibrate"])


def _duration(seconds: float | None) -> str | None:
    if seconds is None or seconds % 1:
        return None if seconds is None else f"{seconds!r}s"
    return f"{seconds // _HOUR_S:.0f}h" if seconds and seconds % _HOUR_S == 0 else f"{seconds:.0f}s"
