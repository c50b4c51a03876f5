"""Starts what writes env.json: `describe`, by the job's own Python and beside the job."""
from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.contract import ENV_PREFIX


def start(path: Path, python: str, env: Mapping[str, str], facts: dict[str, Any]) -> int:
    """-> the pid of what will have written `path`, `facts` in it too, when it has ended. Raises OSError."""
    own = {name: value for name, value in env.items() if not name.startswith(ENV_PREFIX)}
    pid = _spawn([python, "-c", source(), str(path), json.dumps(facts)], own)
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, 10)  # the job itself is being started now
    return pid


def source() -> str:
    """That of `describe`, wherever our own files are."""
    return __loader__.get_data(os.path.join(os.path.dirname(__file__), "describe.py")).decode()


def _spawn(command: list[str], env: dict[str, str]) -> int:
    """Deaf to the signals of a scheduler, which sends them to all below the supervisor."""
    null = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    deaf = (signal.SIGUSR1, signal.SIGUSR2)
    return os.posix_spawn(command[0], command, env, file_actions=[null], setsigmask=deaf)
