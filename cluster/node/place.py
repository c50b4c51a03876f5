"""Where a supervisor lives, and who else has a say there. A bare host; `allocation` is the other place."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.contract import RunDir
from cluster.events import TERMINATED
from cluster.node.aside import Aside
from cluster.node.control import Control, Restart, Stop
from cluster.node.loop import Loop
from cluster.spec import JobSpec

if TYPE_CHECKING:
    from cluster.node.lease import Lease
    from cluster.node.leasing import Neighbours
    from cluster.node.notify import Teller


class Place:
    """A bare host: the supervisor is detached and the only one, by a lock. The time limit is the job's own."""

    facts: dict[str, Any] = {}  # what AttemptStarted says about the place
    allocation = ""  # which one it is, among those that the job was given
    ending_s = math.inf  # so long may an ending take once the program has ended

    def __init__(self, run: RunDir, loop: Loop) -> None:
        self.control = Control(run)
        self.helpers: set[int] = set()  # children of the supervisor that are neither the job nor of one attempt
        self.lease: Lease | None = None  # from the first attempt to the last, unless the job is to have other GPUs
        self.teller: Teller | None = None
        self._run, self._loop = run, loop
        self._ends_at: float | None = None  # time.monotonic
        self._lost: set[int] = set()  # GPUs, by index, whose lock another job has
        self._neighbours: Neighbours | None = None  # on the GPUs

    def begin(self, spec: JobSpec, save_s: float | None) -> None:
        """A person started or restarted the job, its limit begins anew; `save_s`: of its last measured save."""
        self._ends_at = None if spec.time_s is None else time.monotonic() + spec.time_s
        if self.lease and not self.lease.fits(spec):
            self.release()

    def keep_lease(self) -> list[str]:
        """-> what has happened to it, each once."""
        if self.lease is None:
            return []
        if self._neighbours is None:
            from cluster.node.leasing import Neighbours  # a job without GPUs does without
            self._neighbours = Neighbours(self.lease, self._aside)
        lost = set(self.lease.keep()) - self._lost
        self._lost |= lost
        return [f"the lock of GPU {index} was removed from /dev/shm; another job has it now" for index in sorted(lost)
                ] + self._neighbours.news()

    def _aside(self, function: Callable[..., Any], *args: Any) -> Aside:
        aside = Aside(self._loop, function, *args)
        self.helpers.add(aside.pid)
        return aside

    def tells(self, run: RunDir, spec: JobSpec) -> None:
        """From now on people are told what becomes of the job, when somebody is to be told."""
        if spec.notify and self.teller is None:
            from cluster.node.notify import Teller  # most jobs tell nobody
            self.teller = Teller(run, self._aside)

    def tell(self, t: float) -> None:
        """What happened at that time is in the journal."""
        if self.teller:
            self.teller.tell(t)

    def release(self) -> None:
        """Give the GPUs back."""
        if self.lease:
            self.lease.close()
        if self._neighbours:
            self._neighbours.close()
        self.lease = self._neighbours = None

    def requests(self, number: int) -> list[Stop | Restart]:
        """What was asked of attempt `number` since the last question. Never blocks."""
        found = self.control.new_requests()
        if self._loop.terminated:
            self._loop.terminated = False
            found.append(Stop(by=TERMINATED))
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            self._ends_at = None
            found.append(Stop(by="launch", why="time limit"))
        return found

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What the job waits for meanwhile is not of its own time."""
        ends_at, self._ends_at, began = self._ends_at, None, time.monotonic()
        yield
        self._ends_at = None if ends_at is None else ends_at + time.monotonic() - began

    def superseded(self, number: int) -> bool:
        """Whether an attempt newer than `number`, which is this supervisor's, has been begun by another one."""
        return False

    def has_room(self, pause_s: float) -> bool:
        """Whether another attempt can be made here after a pause."""
        return True

    def go_on(self, spec: JobSpec, meanwhile: Callable[[], None]) -> str:
        """Have the scheduler start the next attempt -> why that cannot be, for a person; empty: it will be."""
        return "there is no scheduler here"
