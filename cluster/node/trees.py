"""Programs that were started without launch: which processes are one program, and whose job a process is.

Nothing marks them, so a program is its first process, all that descends from it, and what was seen to descend from it
before its parent ended.
"""
from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from signal import SIGKILL

from cluster.contract import ENV_JOB_ID, RunDir
from cluster.node import process
from cluster.node.process import Proc
from cluster.node.stopping import Identity

_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "fish", "ksh", "tcsh", "csh"})
# What only starts another program and waits for it, by the name of its process or a word of its command line.
_RUNNERS = frozenset({"torchrun", "accelerate", "deepspeed", "horovodrun", "mpirun", "mpiexec", "conda", "mamba",
                      "micromamba", "uv", "poetry", "env", "nice", "nohup", "setsid", "stdbuf", "time", "timeout",
                      "xvfb-run"})
_RUNNER_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch",
                   "deepspeed.launcher")

_WORKER = ("from multiprocessing", "from joblib")  # `python -c …` of one


class Tree:
    """The processes of one program. Each look remembers what it saw, so that an orphan is not lost from sight."""

    def __init__(self, root: Identity) -> None:
        self.root = root
        self.known: set[Identity] = {root}

    def living(self) -> list[Proc]:
        table = process.process_table()
        found = {one.pid: one for one in table.values() if one.identity in self.known}
        if self.root[0] in found:
            found |= {one.pid: one for one in table.values() if self._of_its_group(one.pid)}
        children: dict[int, list[Proc]] = {}
        for one in table.values():
            children.setdefault(one.parent, []).append(one)
        waiting = list(found)
        while waiting:
            for one in children.get(waiting.pop(), ()):
                if one.pid not in found:
                    found[one.pid] = one
                    waiting.append(one.pid)
        self.known = {one.identity for one in found.values()} | {self.root}
        return list(found.values())

    def _of_its_group(self, pid: int) -> bool:
        """The group or session that the first process leads is its own; while it lives, nobody else gets that number.
        """
        try:
            return self.root[0] in (os.getpgid(pid), os.getsid(pid))
        except (ProcessLookupError, PermissionError):
            return False


def left_of(run: RunDir) -> list[Proc]:
    """What lives of the program that was adopted as the job of `run`; none for every other job.

    By what its supervisor saw last; a supervisor that has died cannot look any more.
    """
    if not run.adopted.exists():
        return []
    beat = process.read_heartbeat(run.attempt(0)) or {}
    here = (beat.get("hostname"), beat.get("boot_id")) == (process.hostname(), process.boot_id())
    if not here or not beat.get("adopted"):
        return []
    root, *others = [(pid, started) for pid, started in beat["adopted"]]
    tree = Tree(root)
    tree.known.update(others)
    return tree.living()


def leftovers(run: RunDir, token: str) -> list[Proc]:
    """What lives of a job whose supervisor does not: by its token, and what was adopted."""
    return [*process.members(None, token), *left_of(run)]


def sweep(run: RunDir, token: str) -> list[Proc]:
    """SIGKILL until nothing of a job without a supervisor is left. -> what is left after a moment."""
    left = process.sweep(None, token)
    until = time.monotonic() + process.SWEEP_S
    while (more := left_of(run)) and time.monotonic() < until:
        for one in more:
            process.send(one.identity, SIGKILL)
        time.sleep(0.02)
    return [*left, *more]


def root_of(pid: int, table: dict[int, Proc], but: Collection[int] = ()) -> Proc:
    """The first process of the program that `pid` is a part of: its torchrun, its script, what it was forked from.

    `but`: these are no part of it. A script that starts a program with nohup and then has it adopted is what runs this.
    """
    one = table[pid]
    while (parent := table.get(one.parent)) and parent.pid not in but and _mine(parent.pid) and _works_for(one, parent):
        one = parent
    return one


def above(pid: int, table: dict[int, Proc]) -> set[int]:
    """The pid and those of its parents."""
    found = set()
    while pid in table and pid not in found:
        found.add(pid)
        pid = table[pid].parent
    return found


def _works_for(child: Proc, parent: Proc) -> bool:
    words = process.command_of(parent.pid)
    if parent.pid == 1 or not words:
        return False
    own = process.command_of(child.pid)
    worker = own == words or any(word.startswith(_WORKER) for word in own[1:4])  # forked, or spawned
    return worker or _runs_others(parent, words)


def _runs_others(one: Proc, words: Sequence[str]) -> bool:
    program = os.path.basename(words[0])
    if program in _SHELLS:  # with a script or `-c`: nobody types into it
        return any(not word.startswith("-") for word in words[1:])
    names = {program, one.name, *(os.path.basename(word) for word in words[1:3])}
    return bool(names & _RUNNERS) or any(word.startswith(_RUNNER_MODULES) for word in words[1:4])


def _mine(pid: int) -> bool:
    return owner(pid) == os.getuid()


def owner(pid: int) -> int | None:
    """The user id of a process; None: there is no such process."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def job_of(pid: int, table: dict[int, Proc], adopted: dict[int, str]) -> str | None:
    """The id of the job of launch that a process belongs to, as far as it can be seen from here.

    `adopted`: see `adopted_pids`. Of other users' jobs only the command lines of their supervisors can be read.
    """
    at = pid
    while at > 1 and at in table:
        if at in adopted:
            return adopted[at]
        if found := process.environment_of(at).get(ENV_JOB_ID.encode()):
            return found.decode(errors="replace")
        if found := _supervises(table[at]):
            return found
        at = table[at].parent
    return None


def _supervises(one: Proc) -> str | None:
    if _mine(one.pid):
        run = process.supervised_by(one)
        return run.path.name if run else None
    words = process.command_of(one.pid)
    paths = [Path(after) for word, after in zip(words, words[1:]) if word in ("supervise", "allocated")]
    return next((path.name for path in paths if path.parent.name == "runs"), None)


def adopted_pids(table: dict[int, Proc]) -> dict[int, str]:
    """Pid -> job, of the programs that this user has adopted and that a living supervisor watches."""
    runs = [run for one in table.values() if _mine(one.pid) and (run := process.supervised_by(one))]
    return {one.pid: run.path.name for run in runs for one in left_of(run)}
