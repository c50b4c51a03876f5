"""Who is at work on a row of the index: a client of this computer, by its pid and start time, as one number.

A pid alone would be believed to be at work for ever once another program has got it.
"""
from __future__ import annotations

import os

from cluster.node import process

_PID_BITS = 22  # Linux has no greater pids; ticks of centuries fit above them into what SQLite calls an integer


def me() -> int:
    return _started(os.getpid()) << _PID_BITS | os.getpid()


def alive(client: int) -> bool:
    """Whether this client is still there."""
    pid, started = client & (1 << _PID_BITS) - 1, client >> _PID_BITS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not started or _started(pid) == started


def _started(pid: int) -> int:
    """Clock ticks after boot; 0 where there is no /proc: then the pid has to do."""
    return process.start_time(pid) or 0
