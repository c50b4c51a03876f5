"""Faults drawn by a seed, that hit the jobs of a few nodes: those of one node one after the other, several nodes at once."""
from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.contract import AttemptDir, RunDir
from cluster.events import AttemptEnded, Launched
from tests.testbed.bed import poll
from tests.testbed.testbed import Testbed

from .lab import Started
from .test_faults import SCRATCH, home_full, scratch_full
from .truth import Blur, Death, told

LASTS_S = {"link cut": 30, "frozen": 20, "loss and delay": 20, "power cut": 8, "scratch full": 15, "home full": 8}
ON_NODE = ("supervisor", "rank", "torchrun", "sshd", "frozen", "link cut", "loss and delay", "power cut", "scratch full",
           "memory limit")
FOR_ALL = ("client", "home full")
EVERYWHERE = "everywhere"
PAUSE_S = (4, 12)  # between two faults of a node
VICTIM_S = 40  # so long a fault waits for somebody to hit: jobs are on their way back
# Takes memory until the kernel has ended somebody, who is not this one.
EAT = """
import time
def kills(): return next(line for line in open("/proc/vmstat") if line.startswith("oom_kill "))
open("/proc/self/oom_score_adj", "w").write("-1000")
before, held, until = kills(), [], time.monotonic() + 20
while kills() == before and time.monotonic() < until: held.append(b"x" * (8 << 20))
"""
USED = "cat /sys/fs/cgroup/memory/memory.usage_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.current"


class Fault(NamedTuple):
    kind: str
    node: str
    pause_s: float  # after the one before it there
    pick: float  # 0 to 1: whom it hits, of those that are there


class Done(NamedTuple):
    """A fault that has happened: from when to when (unix seconds), and whom it hit."""

    fault: Fault
    begin: float
    end: float
    hit: str


def drawn(seed: int, count: int, nodes: Sequence[str]) -> list[Fault]:
    """Each kind once as far as it goes, then any; each node as often as the others."""
    draw = random.Random(seed)
    for_all = [*FOR_ALL, *draw.choices(FOR_ALL, k=count)][:max(1, count // 6)]
    local = [*draw.sample(ON_NODE, len(ON_NODE)), *draw.choices(ON_NODE, k=count)][:count - len(for_all)]
    where = [nodes[number % len(nodes)] for number in range(len(local))]
    draw.shuffle(where)
    plan = [*zip(local, where), *((kind, EVERYWHERE) for kind in for_all)]
    return [Fault(kind, node, round(draw.uniform(*PAUSE_S), 1), round(draw.random(), 3)) for kind, node in plan]


@contextmanager
def own_scratch(bed: Testbed, nodes: Sequence[str]) -> Iterator[None]:
    """Each node's scratch is a small file system of its own; one that was switched off needs it again."""
    with ExitStack() as stack:
        for node in nodes:
            for place in SCRATCH:
                stack.callback(bed.exec, node, "umount", "-l", place)
            mount_scratch(bed, node)
        yield


def mount_scratch(bed: Testbed, node: str) -> None:
    for place in SCRATCH:
        bed.exec(node, "mount", "-t", "tmpfs", "-o", "size=16m,mode=1777", "scratch", place)


@dataclass
class BadLuck:
    """What happens to the jobs of a bed, and who was hit."""

    bed: Testbed
    jobs: dict[str, tuple[str, RunDir]]  # id -> its node, where the tests see it
    names: dict[str, str]
    followers: list[tuple[str, Started]]  # (job, client that follows its log)
    over: threading.Event
    done: list[Done] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    turn: threading.Lock = field(default_factory=threading.Lock)

    def blurs(self) -> list[Blur]:
        return [Blur(None if done.fault.node == EVERYWHERE else done.fault.node, done.begin, done.end)
                for done in self.done if done.fault.kind in ("home full", "frozen", "power cut", "memory limit")]

    def lane(self, faults: Sequence[Fault]) -> None:
        """The faults of one node, one after the other."""
        for fault in faults:
            if self.over.wait(fault.pause_s):
                return
            begin = time.time()
            hit = self._lasting(fault) if fault.kind in LASTS_S else self._strike(fault)
            self.done.append(Done(fault, begin, time.time(), hit))
            print(f"{time.strftime('%H:%M:%S')} {fault.node}: {fault.kind}: {hit}", flush=True)

    # --- what lasts -------------------------------------------------------------------------------------------

    def _lasting(self, fault: Fault) -> str:
        bed, node = self.bed, fault.node
        how: dict[str, Callable[[], AbstractContextManager[object]]] = {
            "link cut": lambda: bed.link_down(node), "frozen": lambda: bed.frozen(node),
            "loss and delay": lambda: bed.slow_link(node, delay_ms=25, loss_percent=2),
            "power cut": lambda: self._power_cut(node), "scratch full": lambda: scratch_full(bed, node),
            "home full": lambda: home_full(bed)}
        with ExitStack() as stack, self.turn:  # the bed keeps its own notes in the file system that is full
            stack.enter_context(how[fault.kind]())
            if fault.kind == "home full":
                self.over.wait(LASTS_S[fault.kind])
            else:
                self._others_turn(LASTS_S[fault.kind])
            stack.close()
        return f"{LASTS_S[fault.kind]} s"

    def _others_turn(self, seconds: float) -> None:
        self.turn.release()
        self.over.wait(seconds)
        self.turn.acquire()

    @contextmanager
    def _power_cut(self, node: str) -> Iterator[None]:
        running = [(job, attempt.number) for job in self._on(node) if (attempt := self._live(job))]
        with self.bed.power_cut(node):
            self.deaths += [Death(job, attempt, time.time()) for job, attempt in running]
            yield
        mount_scratch(self.bed, node)

    # --- kill -9 of somebody ----------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> str:
        hits: list[str] = []
        poll(lambda: hits.append(self._hit(fault)) or hits[-1] != "" or self.over.is_set(), VICTIM_S)
        return hits[-1] or "nobody was there"

    def _hit(self, fault: Fault) -> str:
        if fault.kind == "client":
            return self._client(fault.pick)
        if fault.kind == "sshd":
            done = self.bed.exec(fault.node, "pkill", "-9", "-u", "alice", "sshd", check=False)
            return "all connections" if done.returncode == 0 else ""
        there = [(job, attempt) for job in self._on(fault.node) if (attempt := self._live(job))]
        if fault.kind in ("torchrun", "memory limit"):
            there = [(job, attempt) for job, attempt in there if attempt.agent_log.exists()]
        if not there:
            return ""
        job, attempt = there[int(fault.pick * len(there))]
        if fault.kind == "memory limit":
            return self._no_memory(fault.node)
        who, pid = self._victim(fault, attempt)
        if not pid or self.bed.exec(fault.node, "kill", "-9", str(pid), check=False).returncode:
            return ""
        if fault.kind == "supervisor":
            self.deaths.append(Death(job, attempt.number, time.time()))
        return f"{self.names[job]}, {who}"

    def _client(self, pick: float) -> str:
        living = [(job, started) for job, started in self.followers if started.process.poll() is None]
        if not living:
            return ""
        job, started = living[int(pick * len(living))]
        started.process.kill()
        return f"who followed {self.names[job]}"

    def _no_memory(self, node: str) -> str:
        limit = int(self.bed.sh(node, USED)) + (32 << 20)
        with self.bed.memory_limit(node, str(limit)):
            self.bed.exec(node, sys.executable, "-c", EAT)
        return f"{limit >> 20} MB"

    def _victim(self, fault: Fault, attempt: AttemptDir) -> tuple[str, int]:
        if fault.kind == "supervisor":
            return "its supervisor", json.loads(attempt.heartbeat.read_bytes())["pid"]
        if fault.kind == "torchrun":
            return "torchrun", next(one.pid for one in self._events(attempt) if isinstance(one, Launched))
        ranks = sorted(attempt.ranks.glob("[0-9]*.json"))
        if not ranks:
            return "", 0
        path = ranks[int(fault.pick * len(ranks))]
        return f"rank {path.stem}", json.loads(path.read_bytes())["pid"]

    # --- who is there -----------------------------------------------------------------------------------------

    def _on(self, node: str) -> list[str]:
        return [job for job, (where, _) in self.jobs.items() if where == node]

    def _live(self, job: str) -> AttemptDir | None:
        """The attempt that runs."""
        attempts = self.jobs[job][1].attempts()
        if not attempts or any(death[:2] == (job, attempts[-1].number) for death in self.deaths):
            return None
        events = self._events(attempts[-1])
        begun = any(isinstance(event, Launched) for event in events)
        return attempts[-1] if begun and not any(isinstance(event, AttemptEnded) for event in events) else None

    def _events(self, attempt: AttemptDir) -> list:
        return told(RunDir(attempt.path.parents[1])).get(attempt.number, [])
