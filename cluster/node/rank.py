"""The last steps before a process of a job becomes its program: what must be in force before its first instruction.

`start` takes them in a child of the supervisor, which has them loaded already: no Python is started for it. The ranks
below torchrun are started by torchrun, so there a shim takes them:

    rank ATTEMPT_DIR CWD PROGRAM ARG…

torchrun (`agent`) dies with the supervisor (SIGKILL); a rank is told (SIGTERM) when its parent dies, so that it saves.
Stdout and stderr are one file opened with O_APPEND: exact bytes, in order. The shim imports little on purpose: every
rank pays for it.
"""
from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

AGENT = "agent"  # how the name of torchrun begins (AttemptDir.agent): its output is logs/<name>.log
OOM_SCORE_ADJ = b"500"  # when memory runs out the program goes, not its supervisor
_ENV_PARENT = "LAUNCH_PARENT"  # pid of the torchrun that a shim must have as its parent
_PR_SET_PDEATHSIG = 1
_OF_SLURM = ("SIGUSR1", "SIGUSR2")  # meant for the supervisor, sent to everybody below it
_RESET = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGXFSZ", "SIGCHLD")


def start(name: str, attempt_dir: str, cwd: str, program: list[str], env: Mapping[str, str]) -> int:
    """Start torchrun (its name) or a rank (its number) as a child -> its pid.

    Only from the main thread: PDEATHSIG is bound to the thread that forks.
    """
    parent = os.getpid()
    # A signal that comes before the program's own handlers must end the child, not be swallowed by the supervisor's.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.set_wakeup_fd(-1)  # it is the supervisor's
            os.setsid()  # torchrun gives each rank a session itself
            code = _become(name, attempt_dir, cwd, program, env, parent)
        except (OSError, SystemExit) as error:
            sys.stderr.write(f"{error}\n")
        finally:
            sys.stderr.flush()
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def main(argv: list[str]) -> int:
    """The shim of a rank below torchrun, numbered by RANK."""
    attempt_dir, cwd, *program = argv
    parent = int(os.environ.pop(_ENV_PARENT, "0"))
    return _become(os.environ["RANK"], attempt_dir, cwd, program, os.environ, parent)


def _become(name: str, attempt_dir: str, cwd: str, program: list[str], env: Mapping[str, str], parent: int) -> int:
    """Replaces this process by the program. Returns only when that cannot be done."""
    is_agent = name.startswith(AGENT)
    _write_to(os.path.join(attempt_dir, "logs", f"{name if is_agent else f'rank-{name}'}.log"))
    die_with_parent(signal.SIGKILL if is_agent else signal.SIGTERM, parent)
    if is_agent:
        env = {**env, _ENV_PARENT: str(os.getpid())}
    else:
        _sign_in(os.path.join(attempt_dir, "ranks", f"{name}.json"))
    return _exec(cwd, program, env)


def _write_to(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def die_with_parent(number: signal.Signals, expected: int) -> None:
    """`expected`: pid of the parent, or 0. PDEATHSIG is not delivered for one that is dead already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if expected and os.getppid() != expected:
        raise SystemExit(f"error: process {expected}, which started this one, is gone")
    try:
        with open("/proc/self/oom_score_adj", "wb") as file:
            file.write(OOM_SCORE_ADJ)
    except OSError:  # a container may forbid it: the program is then as likely a victim as its supervisor
        pass


def _sign_in(path: str) -> None:
    """Write {pid, started, boot_id} in one step: exec changes none of them."""
    with open("/proc/self/stat", "rb") as file:
        started = int(file.read().rpartition(b")")[2].split()[19])
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    aside = f"{path}.{os.getpid()}"
    with open(aside, "w") as file:
        file.write(f'{{"pid": {os.getpid()}, "started": {started}, "boot_id": "{boot_id}"}}\n')
    os.replace(aside, path)


def _exec(cwd: str, program: list[str], env: Mapping[str, str]) -> int:
    for name in _RESET:  # Python ignores some of these itself, and what is ignored stays so across exec
        deaf = name in _OF_SLURM and "SLURM_JOB_ID" in env
        signal.signal(getattr(signal, name), signal.SIG_IGN if deaf else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.chdir(cwd)
        os.execvpe(program[0], program, env)
    except OSError as error:
        sys.stderr.write(f"error: cannot start {program[0]!r} in {cwd}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
