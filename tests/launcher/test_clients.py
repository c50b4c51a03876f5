"""A client that is gone is not taken for at work because another program has its pid now."""
from __future__ import annotations

import os
import subprocess

from launcher import clients


def test_a_client_is_its_pid_and_its_start() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    assert clients.alive(clients.me()) and not clients.alive(gone.pid)
    assert not clients.alive(1 << 32 | os.getpid())  # of a process that began long before this one
    assert clients.alive(os.getpid())  # where a start time cannot be read, the pid has to do
