"""How a job comes to its GPUs: who is before it, who has them, who computes on them without asking anybody.

A GPU is free when its lock is, no process uses it and its memory is not in use; who wants it first, gets it first. The
driver is asked at the start, when what was in the way has gone, and every five minutes; meanwhile the job sleeps until
a lock is given back or a process has ended.
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import ClusterError, Unusable
from cluster.node import gpus, process
from cluster.node.aside import Aside, AsideFailed
from cluster.node.gpu_users import GpuUser, gigabytes, gpu_users
from cluster.node.gpus import Gpu
from cluster.node.lease import Claim, Holder, Lease, Spot, await_change, holders, lock_all, lock_path, unlock

WAKE_S = 15.0  # from one look at who is in the way to the next, at most
LOOK_S = 300.0  # from one question to the driver to the next, while nothing seems to happen
SOON_S = 2.0  # memory without a process may be that of one that has just ended
PINNED_MB = 512  # more than this without a process is somebody's


@dataclass(frozen=True)
class Seen:
    """What the driver said."""

    gpus: tuple[Gpu, ...]
    users: tuple[GpuUser, ...]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Seen:
        users = (GpuUser(**one | {"command": tuple(one["command"])}) for one in raw["users"])
        return cls(tuple(Gpu(**one) for one in raw["gpus"]), tuple(users))


def look() -> dict[str, Any]:
    """A question to the driver, as JSON; `problem`: there is no answer."""
    try:
        found = gpus.list_gpus()
        users = gpu_users() if found else []
    except ClusterError as error:
        return {"problem": str(error)}
    return {"gpus": [asdict(gpu) for gpu in found], "users": [asdict(one) for one in users]}


@dataclass(frozen=True)
class Obstacle:
    """Why a GPU cannot be had now: a job has its lock, a process uses it, or (neither) its memory is in use."""

    gpu: Gpu
    text: str
    process: tuple[int, int] | None = None  # pid and start
    leased: bool = False

    def told(self) -> str:
        return f"GPU {self.gpu.index}: {self.text}"


def disturbed(gpu: Gpu, users: Sequence[GpuUser], mates: Collection[int] = ()) -> Obstacle | None:
    """Whoever uses the GPU without a lease. `mates`: supervisors of the jobs that share it; theirs is no obstacle."""
    for one in users:
        who = None if one.started is None else (one.pid, one.started)
        if one.uuid == gpu.uuid and (who is None or process.alive(*who)) and not (mates and below(one.pid, mates)):
            return Obstacle(gpu, one.told(), who)
    if gpu.used_mb > PINNED_MB and not mates and not any(one.uuid == gpu.uuid for one in users):
        return Obstacle(gpu, f"{gigabytes(gpu.used_mb)} in use, by no process that the driver shows")
    return None


def below(pid: int, roots: Collection[int]) -> bool:
    """Whether the process is one of `roots` or was started, however indirectly, by one of them."""
    seen = 0
    while pid > 1 and seen < 1000:
        if pid in roots:
            return True
        found = process.read_process(pid)
        pid, seen = (found.parent if found else 0), seen + 1
    return False


def in_the_way(found: Sequence[Gpu], users: Sequence[GpuUser], shared: bool = False) -> dict[str, str]:
    """Of each GPU that could not be had now who has it, by UUID; no lock is touched."""
    having = holders()
    told = {}
    for gpu in found:
        there = having.get(gpu.uuid, [])
        mates = _mates(there) if shared else set()
        if there and not mates:
            told[gpu.uuid] = there[0].told()
        elif obstacle := disturbed(gpu, users, mates):
            told[gpu.uuid] = obstacle.text
    return told


def _mates(there: Sequence[Holder]) -> set[int]:
    return {one.pid for one in there} if all(one.claim.shared for one in there) else set()


class Leasing:
    """`step` now and then, until there is a `lease` or a `problem`; then `close`."""

    def __init__(self, claim: Claim, node: str, aside: Callable[..., Aside]) -> None:
        self.lease: Lease | None = None
        self.problem = ""  # why it will never have them
        self.text = ""  # who is in the way, for a person
        self.pause_s = WAKE_S  # whatever it waits for wakes the loop
        self._claim, self._node, self._aside = claim, node, aside
        self._spot = Spot(claim)
        self._seen: Seen | None = None
        self._fresh = False  # nothing can have happened since then
        self._asking: Aside | None = None  # the driver
        self._sleeping: Aside | None = None
        self._look_at = 0.0  # time.monotonic of the next question to the driver, if nothing happens before
        self._again_s = SOON_S

    @property
    def over(self) -> bool:
        return self.lease is not None or bool(self.problem)

    def close(self) -> None:
        """Leave the line; the lease, if there is one, stays."""
        self._spot.leave()
        for aside in (self._asking, self._sleeping):
            if aside:
                aside.kill()

    def step(self) -> None:
        """Never blocks."""
        if self._asking and self._asking.done():
            self._hear(self._asking)
            self._asking = None
        if self._sleeping and self._sleeping.done():
            self._sleeping = None
        if self.over or self._asking or self._sleeping:
            return
        if self._seen is None:
            self._asking = self._aside(look)
        else:
            self._go_on(self._seen)

    def _hear(self, asked: Aside) -> None:
        try:
            said = asked.result()
        except AsideFailed as error:
            said = {"problem": f"the GPUs cannot be looked at: {error}"}
        if problem := said.get("problem"):
            self.problem = "" if self._seen else problem  # a driver that has answered before is asked again
            self._sleep((), (), SOON_S)
            return
        self._seen, self._fresh = Seen.from_json(said), True
        try:
            gpus.usable(self._seen.gpus, self._claim.count, self._claim.allowed)
        except Unusable as error:
            self.problem = str(error)

    def _go_on(self, seen: Seen) -> None:
        if ahead := self._spot.ahead():
            if waiting := [one for one in ahead if one.waits]:
                self._must_wait(f"{self._node}: {waiting[-1].told()} and comes first")
            self._sleep([str(ahead[-1].path)], (), WAKE_S)
            return
        try:
            self._try(seen)
        except OSError as error:
            self.problem = f"{error.filename}: {error.strerror}: the lock of this GPU; its owner can remove it"

    def _try(self, seen: Seen) -> None:
        wanted = [gpu for gpu in seen.gpus if self._claim.allows(gpu.index)]
        taken = lock_all([gpu.uuid for gpu in wanted], self._claim.shared)
        having = holders()
        mates = {gpu.uuid: _mates(having.get(gpu.uuid, ())) if gpu.uuid in taken else set() for gpu in wanted}
        obstacles = {gpu.uuid: disturbed(gpu, seen.users, mates[gpu.uuid]) if gpu.uuid in taken
                     else _leased(gpu, having) for gpu in wanted}
        free = [gpu for gpu in wanted if not obstacles[gpu.uuid]]
        enough = len(free) >= self._claim.count
        if enough and self._fresh:
            self._take(free, taken, mates)
            return
        unlock(taken)
        found = [one for one in obstacles.values() if one]
        if self._fresh:
            self._plan_look(found)
        if enough or time.monotonic() >= self._look_at:
            self._asking = self._aside(look)
        else:
            self._wait_for(found)

    def _take(self, free: Sequence[Gpu], taken: dict[str, int], mates: Mapping[str, set[int]]) -> None:
        """A job that shares goes where others share already, while half of the memory there is left."""
        together = [gpu for gpu in free if mates[gpu.uuid] and gpu.used_mb * 2 < gpu.memory_mb]
        chosen = gpus.choose(together or free, self._claim.count, None)
        unlock(taken, but=[gpu.uuid for gpu in chosen])
        self.lease, self.text = Lease(self._claim, chosen, taken), ""

    def _plan_look(self, found: Sequence[Obstacle]) -> None:
        """What has neither a lock nor a process to watch may be gone soon, or never."""
        unseen = any(not (one.leased or one.process) for one in found)
        self._look_at = time.monotonic() + (self._again_s if unseen else LOOK_S)
        self._again_s = min(LOOK_S, self._again_s * 2) if unseen else SOON_S

    def _wait_for(self, found: Sequence[Obstacle]) -> None:
        self._must_wait(f"{self._node} {'; '.join(one.told() for one in found)}")
        self._sleep([str(lock_path(one.gpu.uuid)) for one in found if one.leased],
                    [one.process for one in found if one.process], min(WAKE_S, self._look_at - time.monotonic()))

    def _must_wait(self, text: str) -> None:
        self.text = text
        self._spot.must_wait()

    def _sleep(self, locks: Sequence[str], processes: Sequence[tuple[int, int]], longest_s: float) -> None:
        self._fresh = False
        self._sleeping = self._aside(await_change, locks, self._claim.shared, processes, max(0.0, longest_s))


def _leased(gpu: Gpu, having: Mapping[str, Sequence[Holder]]) -> Obstacle:
    there = having.get(gpu.uuid)
    return Obstacle(gpu, there[0].told() if there else "a job that does not say whose it is", leased=True)


# --- while it runs ------------------------------------------------------------------------------------------

def strangers(uuids: Sequence[str], mine: int) -> list[list[Any]]:
    """Who uses these GPUs besides the jobs that have them -> [[pid, start, words]]. `mine`: this job's supervisor."""
    having = holders()
    found = []
    for one in gpu_users():
        mates = {mine, *(holder.pid for holder in having.get(one.uuid, ()))}
        if one.uuid in uuids and not below(one.pid, mates):
            found.append([one.pid, one.started, one.told()])
    return found


class Neighbours:
    """Looks every five minutes whether somebody computes on the GPUs of a job that runs."""

    def __init__(self, lease: Lease, aside: Callable[..., Aside]) -> None:
        self._lease, self._aside = lease, aside
        self._next = time.monotonic() + LOOK_S
        self._asking: Aside | None = None
        self._known: set[tuple[int, int | None]] = set()

    def news(self) -> list[str]:
        """Those not told of before. Never blocks."""
        if self._asking is None and time.monotonic() >= self._next:
            self._next = time.monotonic() + LOOK_S
            self._asking = self._aside(strangers, self._lease.uuids, os.getpid())
        if self._asking is None or not self._asking.done():
            return []
        try:
            found = self._asking.result()
        except AsideFailed:  # a driver that hangs; the next look is in five minutes
            found = []
        self._asking = None
        fresh = [one for one in found if (one[0], one[1]) not in self._known]
        self._known |= {(pid, started) for pid, started, _ in fresh}
        return [f"{text} uses a GPU that this job has leased" for _, _, text in fresh]

    def close(self) -> None:
        if self._asking:
            self._asking.kill()
