"""Ten jobs on five nodes while thirty things break, several at a time: what a person finds afterwards is whole.

FAULT_SEED draws other faults, FAULT_COUNT more or fewer (below 15: on fewer nodes). The same seed breaks the same things on
the same nodes in the same order, with the same pauses.
"""
from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from cluster.contract import RunDir, list_checkpoints, verify_checkpoint
from cluster.events import AttemptEnded, AttemptStarted, Event, Launched, Reason
from tests.helpers import wait_until
from tests.testbed.testbed import Testbed

from .bad_luck import EVERYWHERE, BadLuck, Done, drawn, own_scratch
from .conftest import NODES
from .lab import ENDED, Lab, Started
from .test_faults import STATUS_S
from .test_slurm import steps_of
from .truth import Answer, Death, told, untrue

SEED = int(os.environ.get("FAULT_SEED", "1"))
COUNT = int(os.environ.get("FAULT_COUNT", "30"))
REPAIRED_S, FOLLOWED_S = 300, 60
STEPS, LINES = 150, 100  # of a training; of a command, one a second
EFFECT_S = 30  # what happens to a job so soon after a fault on its node is its effect
SMI = ("#!/bin/sh\ncase $1 in --query-gpu=*) echo '0, GPU-0, 81559, 4, 550.54, NVIDIA H100'; "
       "echo '1, GPU-1, 81559, 4, 550.54, NVIDIA H100';; esac\n")
PATH = "SetEnv PATH=/var/cards:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
FREE = 'for lock in /dev/shm/launch-gpu-*.lock; do [ ! -e "$lock" ] || flock -n "$lock" true || echo "$lock"; done'
# What a person has to restart by hand: all that a fault may end for good.
NODE_LOST = "node lost"
BY_FAULTS = {"supervisor lost", NODE_LOST, "killed by a signal from outside", "killed by the kernel: out of memory",
             "disk full", "ranks lost each other (NCCL, gloo or rendezvous)"}


@contextmanager
def cards(bed: Testbed, nodes: Sequence[str]) -> Iterator[None]:
    """Two GPUs on each node, by an nvidia-smi that is still there after a power cut."""
    with ExitStack() as stack:
        for node in nodes:
            bed.write(node, "/var/cards/nvidia-smi", SMI, mode="755")
            stack.callback(bed.sh, node, "rm -r /var/cards; rm -f /dev/shm/launch-gpu-*")
            stack.enter_context(bed.sshd_options(node, PATH))
        yield


@dataclass
class Person:
    """Has jobs, looks after them, restarts what will not go on by itself, and follows what the commands print."""

    lab: Lab
    jobs: dict[str, tuple[str, RunDir]] = field(default_factory=dict)  # id -> its node, where the tests see it
    names: dict[str, str] = field(default_factory=dict)
    followers: list[tuple[str, Started]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    restarts: dict[str, Future[None]] = field(default_factory=dict)  # under way
    never_again: set[str] = field(default_factory=set)  # by themselves: a command has no restarts unless it is given some
    surprises: list[str] = field(default_factory=list)  # endings that no fault explains

    def submit(self, nodes: Sequence[str]) -> None:
        count = f"i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i; sleep 1; done"
        for number, node in enumerate(nodes):
            ranks = ["--set", f"resources.procs={2 if number < 2 else 1}"]
            self._take(node, f"train-{node}", "tiny", "--set", "pace_s=0.4", "--set", f"steps={STEPS}", *ranks)
            again = ["--max-restarts", "3"] if number % 2 else []
            job = self._take(node, f"count-{node}", "--gpus", "1", *again, "--", "sh", "-c", count)
            if not again:
                self.never_again.add(job)

    def _take(self, node: str, name: str, *what: str) -> str:
        job = self.lab.submit("--node", node, "--name", name, *what)
        self.jobs[job], self.names[job] = (node, RunDir(self.lab.seen_here(self.lab.run_dir(job)))), name
        return job

    @property
    def commands(self) -> list[str]:
        return [job for job, name in self.names.items() if name.startswith("count")]

    @property
    def trainings(self) -> list[str]:
        return [job for job in self.jobs if job not in self.commands]

    def look_after(self, pool: ThreadPoolExecutor) -> bool:
        """Look once, and do what has to be done; True when all of them have completed."""
        asked = time.time()
        views = json.loads(self.lab.launch("status", *self.jobs, "--json").stdout)
        self.answers += [Answer(asked, time.time(), view) for view in views]
        for view in views:
            job, state = view["id"], view["state"]
            revived = view["reason"] == NODE_LOST and "given up" not in view["detail"]
            goes_on = revived and job not in self.never_again  # this or the next command saw to it
            if state in ENDED - {"COMPLETED"} and not goes_on and job not in self.restarts:
                self.restarts[job] = pool.submit(self._restart, job, view["reason"])
            elif job in self.restarts and self.restarts[job].done():
                self.restarts.pop(job).result()
            if job in self.commands and state not in ENDED and not self._followed(job):
                self.followers.append((job, self.lab.start("logs", job, "--follow", "--attempt", "all")))
        return not self.restarts and all(view["state"] == "COMPLETED" for view in views)

    def _restart(self, job: str, reason: str) -> None:
        said = self.lab.launch("restart", job, code=None)
        last = said.stderr.strip().splitlines()[-1:]
        print(f"{time.strftime('%H:%M:%S')} restart of {self.names[job]} ({reason}): {said.returncode} {last}", flush=True)
        if reason not in BY_FAULTS:
            self.surprises.append(f"{self.names[job]}: {reason}\n{self.lab.logs(job, '--attempt', 'all')[-3000:]}")

    def _followed(self, job: str) -> bool:
        return any(one == job and started.process.poll() is None for one, started in self.followers)

    def followed_to_the_end(self) -> bool:
        return all(started.process.poll() is not None for _, started in self.followers)

    def end_followers(self) -> None:
        for _, started in self.followers:
            if started.process.poll() is None:
                started.process.kill()
            started.process.wait()


def _started(t: float, attempt: int) -> Event:
    return AttemptStarted(t, attempt, "restart", "gpu01", "boot", 7, 1.0, (), None, None)


def _ended(t: float, reason: Reason) -> Event:
    return AttemptEnded(t, reason, "", 0, None, None, None, "end", None)


TOLD = {0: [_started(100, 0), Launched(101, (), (), 8)],  # its supervisor is killed at 200
        1: [_started(300, 1), Launched(301, (), (), 9), _ended(400, Reason.DONE)]}


@pytest.mark.parametrize(("at", "state", "reason", "attempt", "age_s", "true"), [
    (150, "RUNNING", None, 0, 0, True), (150, "FAILED", "supervisor lost", 1, 0, False),
    (250, "RUNNING", None, 0, 0, False), (250, "RUNNING", None, 0, 60, True),
    (250, "FAILED", "supervisor lost", 0, 0, True), (150, "COMPLETED", "done", 1, 0, False),
    (350, "FAILED", "supervisor lost", 0, 0, False), (350, "PENDING", None, 1, 0, False),
    (350, "FAILED", "supervisor lost", 1, 0, False), (450, "RUNNING", None, 1, 0, False),
    (450, "COMPLETED", "done", 1, 0, True), (450, "FAILED", "disk full", 1, 0, False)])
def test_an_untrue_answer_is_found(at: float, state: str, reason: str | None, attempt: int, age_s: float,
                                   true: bool) -> None:
    view = {"id": "one", "node": "gpu01", "state": state, "reason": reason, "attempt": attempt, "last_seen_s": age_s,
            "stale": age_s > 0}
    problem = untrue(Answer(at - 0.5, at, view), TOLD, [Death("one", 0, 200)], [])
    assert (problem == "") is true, problem


@pytest.mark.alone
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_thirty_faults(lab: Lab, testbed: Testbed) -> None:
    nodes = NODES[:max(1, COUNT // 3)]
    plan, began = drawn(SEED, COUNT, nodes), time.monotonic()
    over, person = threading.Event(), Person(lab)
    print(f"seed {SEED}: {len(plan)} faults on {len(nodes)} nodes")
    with cards(testbed, nodes), own_scratch(testbed, nodes):
        person.submit(nodes)
        luck = BadLuck(testbed, person.jobs, person.names, person.followers, over)
        lanes = [[fault for fault in plan if fault.node == node] for node in (*nodes, EVERYWHERE)]
        with ThreadPoolExecutor(len(lanes) + len(person.jobs)) as pool:
            try:
                falling = [pool.submit(luck.lane, faults) for faults in lanes]
                while not all(lane.done() for lane in falling):
                    person.look_after(pool)
                for lane in falling:
                    lane.result()
                wait_until(lambda: person.look_after(pool), REPAIRED_S, "every job has completed")
                wait_until(person.followed_to_the_end, FOLLOWED_S, "who follows has heard of the end")
            finally:
                over.set()
                person.end_followers()
        print(table(luck))
        took = {answer.asked: answer.answered - answer.asked for answer in person.answers}
        slowest = sorted(took.values(), reverse=True)
        print(f"{len(slowest)} looks with status, median {slowest[len(slowest) // 2]:.1f} s, slowest "
              f"{', '.join(f'{seconds:.1f}' for seconds in slowest[:5])} s (wanted {STATUS_S}); "
              f"{time.monotonic() - began:.0f} s in all")
        assert slowest[0] < 5 * STATUS_S
        check_truth(person, luck)
        check_jobs(person)
        check_logs(person)
        assert person.surprises == []
        assert lab.left_over() == []
        assert {node: held for node in nodes if (held := testbed.sh(node, FREE, user="alice"))} == {}


def check_truth(person: Person, luck: BadLuck) -> None:
    events = {job: told(run) for job, (_, run) in person.jobs.items()}
    wrong = [f"{person.names[answer.view['id']]} at {answer.answered:.1f}: {problem}\n  {answer.view}"
             for answer in person.answers
             if (problem := untrue(answer, events[answer.view["id"]], luck.deaths, luck.blurs()))]
    assert not wrong, f"{len(wrong)} answers were untrue:\n" + "\n".join(wrong[:5])


def check_jobs(person: Person) -> None:
    """All the steps once, and every checkpoint as it was written."""
    for job in person.trainings:
        run, name = person.jobs[job][1], person.names[job]
        assert steps_of(run) == list(range(1, STEPS + 1)), name
        kept = list_checkpoints(run.checkpoints)
        assert max(verify_checkpoint(path).step for path in kept) == STEPS, name
        print(f"{name}: {len(run.attempts())} attempts, {len(kept)} checkpoints verify")


def check_logs(person: Person) -> None:
    """Whoever followed had every byte once, as far as it came."""
    for job in person.commands:
        run = person.jobs[job][1]
        logs = [attempt.rank_log(0) for attempt in run.attempts()]
        written = b"".join(log.read_bytes() for log in logs if log.exists())  # no room for a log: it never began
        read = [started.output.read_bytes() for one, started in person.followers if one == job]
        for one in read:
            assert written.startswith(one), f"{person.names[job]}: {len(one)} bytes were followed, not these"
        assert read[-1] == written, f"{person.names[job]}: {len(read[-1])} of {len(written)} bytes were followed"
        assert written.endswith(f"line {LINES}\n".encode())
        print(f"{person.names[job]}: {len(run.attempts())} attempts, {len(written)} bytes, {len(read)} clients")


def table(luck: BadLuck) -> str:
    begin = min(done.begin for done in luck.done)
    rows = [f"{done.begin - begin:5.0f} s  {done.end - done.begin:4.0f} s  {done.fault.node:10}  {done.fault.kind:14}  "
            f"{done.hit}{effect(luck, done)}" for done in sorted(luck.done, key=lambda done: done.begin)]
    return "\n".join(["   when  lasted  node        fault           effect", *rows])


def effect(luck: BadLuck, done: Done) -> str:
    """What the journals of its node say of that time."""
    found = []
    for job, (node, run) in luck.jobs.items():
        for number, events in told(run).items():
            for event in events:
                near = node == done.fault.node and done.begin <= event.t <= done.end + EFFECT_S
                if near and isinstance(event, AttemptEnded) and event.next != "restart":
                    found.append((event.t, f"{luck.names[job]}: {event.reason.value}"))
                elif near and isinstance(event, AttemptStarted):
                    found.append((event.t, f"{luck.names[job]}: attempt {number} by {event.by}"))
    return "".join(f"; {text}" for _, text in sorted(found))
