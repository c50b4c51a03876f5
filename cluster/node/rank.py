"""The shims that become the program: they set up what must be in force before its first instruction, then exec.

    rank ROLE ATTEMPT_DIR CWD PROGRAM ARG…

ROLE `agent`: torchrun. It dies (SIGKILL) with the supervisor; its output is logs/agent.log.
ROLE `torchrun`: one rank below torchrun, numbered by RANK. It is told (SIGTERM) when torchrun dies, so that it saves.
ROLE a number: that rank, directly below the supervisor.

A rank's stdout and stderr are one file opened with O_APPEND: exact bytes, in order. The shim imports little on purpose:
every rank pays for it.
"""
from __future__ import annotations

import ctypes
import os
import signal
import sys

ENV_PARENT = "LAUNCH_PARENT"  # pid that must be the parent: PDEATHSIG is not delivered for one that is already dead
OOM_SCORE_ADJ = b"500"  # when memory runs out the program goes, not its supervisor
_PR_SET_PDEATHSIG = 1
_RESET = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGXFSZ", "SIGCHLD")


def main(argv: list[str]) -> int:
    """Replaces this process by the program. Returns only when that cannot be done."""
    role, attempt_dir, cwd, *program = argv
    expected = int(os.environ.pop(ENV_PARENT, "0"))
    if role != "torchrun":  # torchrun gives each rank a session itself
        os.setsid()
    name = "agent" if role == "agent" else f"rank-{os.environ['RANK'] if role == 'torchrun' else role}"
    _write_to(os.path.join(attempt_dir, "logs", f"{name}.log"))
    die_with_parent(signal.SIGKILL if role == "agent" else signal.SIGTERM, expected)
    if role == "agent":
        os.environ[ENV_PARENT] = str(os.getpid())
    else:
        _sign_in(os.path.join(attempt_dir, "ranks", f"{name.removeprefix('rank-')}.json"))
    return _become(cwd, program)


def _write_to(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def die_with_parent(number: signal.Signals, expected: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if expected and os.getppid() != expected:
        raise SystemExit(f"error: process {expected}, which started this one, is gone")
    try:
        with open("/proc/self/oom_score_adj", "wb") as file:
            file.write(OOM_SCORE_ADJ)
    except OSError:  # a container may forbid it: the program is then as likely a victim as its supervisor
        pass


def _sign_in(path: str) -> None:
    """Write {pid, started} in one step: exec changes neither."""
    with open("/proc/self/stat", "rb") as file:
        started = int(file.read().rpartition(b")")[2].split()[19])
    aside = f"{path}.{os.getpid()}"
    with open(aside, "w") as file:
        file.write(f'{{"pid": {os.getpid()}, "started": {started}}}\n')
    os.replace(aside, path)


def _become(cwd: str, program: list[str]) -> int:
    for name in _RESET:  # Python ignores some of these itself, and what is ignored stays so across exec
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.chdir(cwd)
        os.execvp(program[0], program)
    except OSError as error:
        sys.stderr.write(f"error: cannot start {program[0]!r} in {cwd}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
