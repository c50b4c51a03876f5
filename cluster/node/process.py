"""Processes of this host: who they are, which of them belong to a job, and how they are ended for certain.

A process is its pid and its start time, never the pid alone. Linux only: everything is read from /proc.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.contract import ENV_TOKEN, AttemptDir, RunDir
from cluster.states import Heard

SWEEP_S = 2.0  # how long processes may take to be gone after SIGKILL before they count as survivors
_SWEEP_STEP_S = 0.02
_NEWBORN_S = 10.0  # an attempt without a heartbeat is taken for one that is just being started for this long
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


@dataclass(frozen=True)
class Proc:
    """One line of the process table. `started` is field 22 of /proc/PID/stat: clock ticks after boot."""

    pid: int
    started: int
    parent: int
    state: str
    rss_mb: float
    name: str

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.started


def agent_command(*args: str) -> list[str]:
    """The command line that runs this agent with `args`: from the directory or zip it was carried in, else as the
    installed module.

    `-I`: a job's PYTHONPATH and current directory must not decide which modules the agent loads.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    carried = os.path.isfile(root) or os.path.isfile(os.path.join(root, "__main__.py"))
    return [sys.executable, "-I", *(["-S", root] if carried else ["-m", "cluster.node"]), *args]


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def hostname() -> str:
    return os.uname().nodename


def read_process(pid: int) -> Proc | None:
    """None: there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            raw = file.readall()
    except _GONE:
        return None
    head, _, tail = raw.rpartition(b")")  # the name may contain anything, parentheses too
    fields = tail.split()
    return Proc(pid, int(fields[19]), int(fields[1]), fields[0].decode(), int(fields[21]) * _PAGE_MB,
                head.partition(b"(")[2].decode(errors="replace"))


def start_time(pid: int) -> int | None:
    """Clock ticks after boot, or None when the process is gone (a zombie is gone)."""
    found = read_process(pid)
    return found.started if found and found.state not in "ZX" else None


def alive(pid: int, started: int) -> bool:
    return start_time(pid) == started


def process_table() -> dict[int, Proc]:
    """Every process that is not a zombie."""
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {one.pid: one for one in found if one and one.state not in "ZX"}


def environment_of(pid: int) -> dict[bytes, bytes]:
    """What the process was started with; empty when it may not be read, is gone, or was overwritten."""
    pairs = (entry.partition(b"=") for entry in _started_with(pid))
    return {name: value for name, found, value in pairs if found}


def _started_with(pid: int) -> list[bytes]:
    """NAME=value, each; see `environment_of`."""
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            return file.readall().split(b"\0")
    except (*_GONE, OSError):
        return []


def command_of(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (*_GONE, OSError):
        return []
    return [os.fsdecode(word) for word in raw.rstrip(b"\0").split(b"\0")]


def members(root_pid: int | None, token: str, spare: Collection[int] = ()) -> list[Proc]:
    """The processes of a job: descendants of its supervisor `root_pid` (a child subreaper, so double-forked and setsid
    ones are among them) and processes of this user that were started with its LAUNCH_TOKEN.

    Not among them: the supervisor itself, zombies, this process, the trees of `spare`, the trees of other jobs'
    supervisors that were started from inside the job, and that of a newer attempt's supervisor on this host.
    """
    table = process_table()
    children = _children(table)
    holders = [one for one in table.values() if _holds(one.pid, token)]
    own = {one.pid: one for one in (*_below(root_pid, children), *holders)} if root_pid else {p.pid: p for p in holders}
    for holder in holders:
        own |= {one.pid: one for one in _below(holder.pid, children)}
    barred = {os.getpid(), root_pid, *spare} | {pid for pid in own if is_other_supervisor(own[pid])}
    barred |= {one.pid for one in _above(holders, table) if one.pid not in own and _supervises(one, token)}
    for pid in list(barred):
        if pid not in (root_pid, os.getpid()):
            barred |= {one.pid for one in _below(pid, children)}
    return [one for pid, one in own.items() if pid not in barred]


def descendants(root_pid: int, spare: Collection[int] = ()) -> list[Proc]:
    """Cheaper than `members`: without a look at environments."""
    children = _children(process_table())
    barred = {one.pid for pid in spare for one in _below(pid, children)} | set(spare)
    return [one for one in _below(root_pid, children) if one.pid not in barred]


def dead_children(pid: int, spare: Collection[int] = ()) -> list[Proc]:
    """Children of `pid` that have ended and were not collected yet: to a person who looks, they are still there."""
    found = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [one for one in found if one and one.parent == pid and one.state in "ZX" and one.pid not in spare]


def _children(table: dict[int, Proc]) -> dict[int, list[Proc]]:
    children: dict[int, list[Proc]] = {}
    for one in table.values():
        children.setdefault(one.parent, []).append(one)
    return children


def _below(pid: int | None, children: dict[int, list[Proc]]) -> Iterator[Proc]:
    waiting = list(children.get(pid, ())) if pid else []
    while waiting:
        one = waiting.pop()
        yield one
        waiting += children.get(one.pid, ())


def _above(processes: Collection[Proc], table: dict[int, Proc]) -> list[Proc]:
    found: dict[int, Proc] = {}
    for one in processes:
        while (parent := table.get(one.parent)) and parent.pid not in found:
            found[parent.pid] = one = parent
    return list(found.values())


def _holds(pid: int, token: str) -> bool:
    return f"{ENV_TOKEN}={token}".encode() in _started_with(pid)


def is_other_supervisor(process: Proc) -> bool:
    """Whether this is the living supervisor of a job: its command line names a run directory whose heartbeat agrees.

    One that is so young that its job has no heartbeat yet is believed.
    """
    return supervised_by(process) is not None


def supervised_by(process: Proc) -> RunDir | None:
    """The run directory of the job that this process supervises; see `is_other_supervisor`."""
    words = command_of(process.pid)
    verb = next((at for at, word in enumerate(words[:-1]) if word in ("supervise", "allocated")), None)
    if verb is None:
        return None
    run = RunDir(Path(words[verb + 1]))
    try:
        if not run.spec.is_file():
            return None
        attempts = run.attempts()
    except OSError:
        return None
    if words[verb + 2:verb + 3] == ["--node"]:
        beat = _read_object(run.member(int(words[verb + 3])))
    else:
        beat = read_heartbeat(attempts[-1]) if attempts else None
    is_it = beat is None or (beat.get("pid"), beat.get("pid_started")) == process.identity
    return run if is_it else None


def _supervises(process: Proc, token: str) -> bool:
    """Whether this supervisor of the job with that token is the one whose attempt is the newest."""
    run = supervised_by(process)
    try:
        return run is not None and json.loads(run.spec.read_bytes())["token"] == token
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_heartbeat(attempt: AttemptDir) -> dict | None:
    return _read_object(attempt.heartbeat)


def _read_object(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def heard(attempt: AttemptDir) -> Heard | None:
    """Whether the supervisor of `attempt` lives; None when its heartbeat names another host, so nobody here can say."""
    beat = read_heartbeat(attempt)
    if beat is None:
        born = attempt.path.stat().st_mtime
        return Heard(alive=time.time() - born < _NEWBORN_S, last=born)
    if beat.get("hostname") != hostname():
        return None
    if beat.get("boot_id") != boot_id():
        return Heard(alive=False, last=beat["t"], rebooted=True)
    return Heard(alive=alive(beat["pid"], beat["pid_started"]), last=beat["t"])


def send(identity: tuple[int, int], number: signal.Signals) -> bool:
    """Signal exactly the process with this pid and start time; False when it is gone or not ours."""
    pid, started = identity
    try:
        handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except ProcessLookupError:
        return False
    except OSError:  # a kernel before 5.3: what is left of the race is microseconds
        handle = None
    try:
        if not alive(pid, started):
            return False
        if handle is not None and hasattr(signal, "pidfd_send_signal"):
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        if handle is not None:
            os.close(handle)
    return True


def sweep(root_pid: int | None, token: str, spare: Collection[int] = (), timeout_s: float = SWEEP_S) -> list[Proc]:
    """SIGKILL everything that belongs to the job until nothing is left. -> what is left when the time is over."""
    deadline = time.monotonic() + timeout_s
    while left := members(root_pid, token, spare):
        if time.monotonic() > deadline:
            return left
        for one in left:
            send(one.identity, signal.SIGKILL)
        time.sleep(_SWEEP_STEP_S)
    return []
