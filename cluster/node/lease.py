"""Leases on the GPUs of this host: among all its users, without root, without a daemon.

    launch-gpu-UUID.lock              its flock is the lease: exclusive, or shared by jobs with `gpus: shared`
    launch-gpu-UUID.UID-PID.holder    who has it, in words for people
    launch-gpu-UID-PID.asking         who wants some; its flock is held until it has them
    launch-gpu-UID-PID.waiting        the same, once it is known that it must wait

They lie in /dev/shm: local to the host, empty after a boot. A lock file is opened read-only: of a file that somebody
else made in a sticky directory the kernel may refuse more (fs.protected_regular). What a file says is believed while
the process it names lives: same pid, same start, and the file's owner is the process's. The kernel gives a lock back
the moment its process dies.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.node import process
from cluster.node.gpu_users import clock, user_name
from cluster.node.gpus import Gpu
from cluster.spec import JobSpec

DIRECTORY = Path("/dev/shm")
_PREFIX = "launch-gpu-"
_MODE = 0o644
_DECIDE_S = 60.0  # who wants GPUs knows by then whether it must wait
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True)
class Claim:
    """What a job wants of the GPUs of one host, and who asks for it."""

    job: str
    count: int
    allowed: tuple[int, ...] | None = None  # by index; None: any of them
    shared: bool = False

    @classmethod
    def of(cls, spec: JobSpec) -> Claim:
        return cls(spec.id, spec.gpus, spec.gpu_choice, spec.gpu_share)

    def allows(self, index: int) -> bool:
        return self.allowed is None or index in self.allowed

    def meets(self, other: Claim) -> bool:
        """Whether both could want the same GPU. Those that share do not wait for each other."""
        if self.shared and other.shared:
            return False
        return self.allowed is None or other.allowed is None or bool({*self.allowed} & {*other.allowed})


@dataclass(frozen=True)
class Holder:
    """A job that has a GPU, as its supervisor says."""

    uuid: str
    claim: Claim
    user: str
    pid: int  # of the supervisor
    since: float  # unix seconds

    def told(self) -> str:
        """`alice job phase3-7kq2x9 pid 4100 since 14:02`."""
        shares = " (shared)" if self.claim.shared else ""
        return f"{self.user} job {self.claim.job}{shares} pid {self.pid} since {clock(self.since)}"


@dataclass(frozen=True)
class Ticket:
    """A job that wants GPUs and has none yet. `order`: who comes first; `waits`: it cannot have them now."""

    claim: Claim
    user: str
    pid: int
    since: float  # unix seconds
    order: tuple[int, int, int]
    path: Path
    waits: bool

    def told(self) -> str:
        """`bob job phase1-x3k9p2 waits for 4 GPUs since 13:58`."""
        count = "a share of one" if self.claim.shared else f"{self.claim.count} GPU{'s' * (self.claim.count > 1)}"
        return f"{self.user} job {self.claim.job} waits for {count} since {clock(self.since)}"


# --- what is said in the files ------------------------------------------------------------------------------

def holders() -> dict[str, list[Holder]]:
    """Of each leased GPU who has it, by UUID. Touches no lock."""
    found: dict[str, list[Holder]] = {}
    for path, said in _believed("*.holder"):
        with contextlib.suppress(KeyError, TypeError):
            one = Holder(said["uuid"], _claim(said["claim"]), _owner(path), said["pid"], said["since"])
            found.setdefault(one.uuid, []).append(one)
    return found


def tickets() -> list[Ticket]:
    """Everybody who wants GPUs, the first first."""
    found = {}
    for path, said in (*_believed("*.asking"), *_believed("*.waiting")):  # in this order: one becomes the other
        with contextlib.suppress(OSError, KeyError, TypeError):
            owner = path.stat().st_uid
            order = (said["at"], owner, said["pid"])
            waits = path.suffix == ".waiting" or time.time() > said["since"] + _DECIDE_S
            found[order] = Ticket(_claim(said["claim"]), user_name(owner), said["pid"], said["since"], order, path,
                                  waits)
    return [found[order] for order in sorted(found)]


def _claim(raw: dict[str, Any]) -> Claim:
    claim = Claim(**raw)
    return replace(claim, allowed=None if claim.allowed is None else tuple(claim.allowed))


def _believed(pattern: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What files of living processes say. Ours of dead ones are removed; those of others stay until they come by."""
    for path in sorted(DIRECTORY.glob(_PREFIX + pattern)):
        with contextlib.suppress(OSError):
            said, owner = _read(path)
            if said is not None and _lives(said, owner):
                yield path, said
            elif owner == os.getuid():
                path.unlink()


def _read(path: Path) -> tuple[dict[str, Any] | None, int]:
    with open(os.open(path, _OPEN), "rb") as file:
        owner = os.fstat(file.fileno()).st_uid
        try:
            said = json.loads(file.read(1 << 16))
        except ValueError:
            said = None
    return (said if isinstance(said, dict) else None), owner


def _lives(said: dict[str, Any], owner: int) -> bool:
    try:
        same = os.stat(f"/proc/{int(said['pid'])}").st_uid == owner
        return same and process.alive(said["pid"], said["started"])
    except (OSError, KeyError, TypeError, ValueError):
        return False


def _owner(path: Path) -> str:
    try:
        return user_name(path.stat().st_uid)
    except OSError:
        return "?"


def _mine(claim: Claim) -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "started": process.start_time(pid), "since": time.time(), "claim": asdict(claim)}


def _tell(path: Path, said: dict[str, Any]) -> int:
    """Write the file in one step -> a descriptor of it that holds its lock."""
    aside = path.with_name(f".{path.name}.{time.monotonic_ns()}")
    descriptor = _made(aside, os.O_WRONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, json.dumps(said).encode())
        os.rename(aside, path)
    except OSError:
        os.close(descriptor)
        aside.unlink(missing_ok=True)
        raise
    return descriptor


def _made(path: Path, how: int) -> int:
    """A new file that everybody can read. Raises FileExistsError."""
    mask = os.umask(0o022)  # a supervisor's own would keep the others out
    try:
        return os.open(path, how | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
    finally:
        os.umask(mask)


# --- taking and waiting -------------------------------------------------------------------------------------

class Spot:
    """A place in the line of those who want GPUs; `leave` it."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._path = DIRECTORY / f"{_PREFIX}{os.getuid()}-{os.getpid()}.asking"
        self._order = (time.clock_gettime_ns(time.CLOCK_BOOTTIME), os.getuid(), os.getpid())
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):  # a full /dev/shm: it takes its chance
            self._descriptor = _tell(self._path, _mine(claim) | {"at": self._order[0]})

    def ahead(self) -> list[Ticket]:
        """Those before this one that want what it wants."""
        return [one for one in tickets() if one.order < self._order and one.claim.meets(self._claim)]

    def must_wait(self) -> None:
        """Let the others know."""
        if self._path.suffix == ".asking" and self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._path = self._path.rename(self._path.with_suffix(".waiting"))

    def leave(self) -> None:
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


class Lease:
    """GPUs that this process has until it dies or closes it."""

    def __init__(self, claim: Claim, gpus: Iterable[Gpu], locks: dict[str, int]) -> None:
        self.claim = claim
        self.gpus = tuple(sorted(gpus, key=lambda gpu: gpu.index))
        self._locks = locks  # UUID -> descriptor
        for gpu in self.gpus:
            self._say(gpu.uuid)

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(gpu.uuid for gpu in self.gpus)

    def fits(self, spec: JobSpec) -> bool:
        """Whether it is what that job would take."""
        claim = Claim.of(spec)
        asked = (claim.count, claim.shared) == (self.claim.count, self.claim.shared)
        return asked and all(claim.allows(gpu.index) for gpu in self.gpus)

    def keep(self) -> list[int]:
        """Make good what somebody removed (a logout may, of its user: RemoveIPC of systemd-logind) -> the GPUs, by
        index, that another job has taken meanwhile."""
        lost = []
        for gpu in self.gpus:
            path = lock_path(gpu.uuid)
            if _same(self._locks[gpu.uuid], path):
                continue
            if (again := lock(path, self.claim.shared)) is None:
                lost.append(gpu.index)
                continue
            os.close(self._locks[gpu.uuid])
            self._locks[gpu.uuid] = again
            self._say(gpu.uuid)
        return lost

    def close(self) -> None:
        for uuid, descriptor in self._locks.items():
            _holder_path(uuid).unlink(missing_ok=True)
            os.close(descriptor)
        self._locks = {}

    def _say(self, uuid: str) -> None:
        with contextlib.suppress(OSError):  # nobody will know who it is; it has the lock all the same
            os.close(_tell(_holder_path(uuid), _mine(self.claim) | {"uuid": uuid}))


def lock_path(uuid: str) -> Path:
    return DIRECTORY / f"{_PREFIX}{_safe(uuid)}.lock"


def lock(path: Path, shared: bool) -> int | None:
    """The lock, as a descriptor, when nobody has it. Raises OSError: it cannot even be opened."""
    while True:
        descriptor = _opened(path)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _same(descriptor, path):
            return descriptor
        os.close(descriptor)  # of a file that was removed between the two


def lock_all(uuids: Collection[str], shared: bool) -> dict[str, int]:
    """Those of the locks that nobody has, asked for in the order of their UUIDs. Raises OSError."""
    taken: dict[str, int] = {}
    with contextlib.ExitStack() as undo:
        undo.callback(unlock, taken)
        for uuid in sorted(uuids):
            if (descriptor := lock(lock_path(uuid), shared)) is not None:
                taken[uuid] = descriptor
        undo.pop_all()
    return taken


def unlock(taken: dict[str, int], but: Collection[str] = ()) -> None:
    for uuid in [uuid for uuid in taken if uuid not in but]:
        os.close(taken.pop(uuid))


def await_change(locks: Sequence[str], shared: bool, pids: Sequence[tuple[int, int]], timeout_s: float) -> None:
    """Until one of the locks can be had, or one of the processes has gone. Blocks: for a process of its own."""
    import select
    import threading

    read, write = os.pipe()
    poll = select.poll()
    poll.register(read, select.POLLIN)
    for pid, started in pids:
        with contextlib.suppress(OSError):  # it has gone: a look at once
            if hasattr(os, "pidfd_open"):
                poll.register(os.pidfd_open(pid), select.POLLIN)
        if not process.alive(pid, started):
            return
    for path in locks:
        threading.Thread(target=_await_lock, args=(path, shared, write), daemon=True).start()
    poll.poll(timeout_s * 1000)


def _await_lock(path: str, shared: bool, write: int) -> None:
    """And give it back at once: it is the supervisor who takes it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, _OPEN)
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        os.close(descriptor)
    os.write(write, b"x")


def _opened(path: Path) -> int:
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, _OPEN)
        with contextlib.suppress(FileExistsError):
            return _made(path, os.O_RDONLY)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _holder_path(uuid: str) -> Path:
    return DIRECTORY / f"{_PREFIX}{_safe(uuid)}.{os.getuid()}-{os.getpid()}.holder"


def _safe(uuid: str) -> str:
    return re.sub(r"[^\w-]", "_", uuid)  # it becomes a file name
