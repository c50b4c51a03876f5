"""Two people and one machine with four GPUs: nobody gets what somebody else has, and everybody hears who has it."""
from __future__ import annotations

import fcntl
import json
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.contract import RunDir
from cluster.events import Launched
from cluster.journal import read_events
from cluster.node import process
from tests.helpers import wait_until
from tests.testbed.bed import as_root
from tests.testbed.testbed import Testbed

from .lab import Lab

NODE, CARDS = "gpu05", 4
PROTECTED = Path("/proc/sys/fs/protected_regular")
DIR = "/run/cards"
SMI = f"#!/bin/sh\ncase $1 in\n--query-gpu=*) cat {DIR}/gpus ;;\n--query-compute-apps=*) cat {DIR}/apps ;;\nesac\n"
MOUNT = ('mkdir -p "$1/up" "$1/work"; mount -t overlay '
         '-o "lowerdir=/usr/local/bin,upperdir=$1/up,workdir=$1/work" cards /usr/local/bin')


@pytest.fixture
def protected() -> Iterator[None]:
    """As distributions have it: nobody may open(O_CREAT) somebody else's file in a sticky directory. One test at a time
    may set it: it is the whole machine's."""
    with open(PROTECTED) as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        before = PROTECTED.read_text().strip()
        _protect("1")
        assert PROTECTED.read_text().strip() == "1"
        yield
        _protect(before)


def _protect(value: str) -> None:
    as_root(["sh", "-ec", f"echo {value} >{PROTECTED}"])


@pytest.fixture
def cards(testbed: Testbed, protected: None) -> Iterator[None]:
    with gpus(testbed, NODE):
        yield


@contextmanager
def gpus(bed: Testbed, node: str) -> Iterator[None]:
    bed.write(node, f"{DIR}/up/nvidia-smi", SMI, mode="755")
    bed.sh(node, MOUNT, DIR)
    use(bed)
    try:
        yield
    finally:
        bed.sh(node, 'umount -l /usr/local/bin; rm -r "$1"; rm -f /dev/shm/launch-gpu-*', DIR)


def use(bed: Testbed, *apps: tuple[int, int, int]) -> None:
    """(index of the GPU, pid, MB) each."""
    used = {index: mb for index, _, mb in apps}
    bed.write(NODE, f"{DIR}/apps", "".join(f"GPU-{index}, {pid}, {mb}, python\n" for index, pid, mb in apps))
    bed.write(NODE, f"{DIR}/gpus", "".join(f"{index}, GPU-{index}, 81559, {used.get(index, 4)}, 550.54, NVIDIA H100\n"
                                           for index in range(CARDS)))


@pytest.fixture
def people(testbed: Testbed, cards: None, project: Path, tmp_path: Path) -> Iterator[dict[str, Lab]]:
    found = {}
    for user in ("alice", "bob"):
        home = tmp_path / user
        home.mkdir()
        cluster = testbed.cluster_yaml(home / "cluster.yaml", user, [NODE], f"/home/{user}/launch")
        found[user] = Lab(project, home, NODE, cluster, bed=testbed)
    yield found
    testbed.sweep()
    testbed.sh("head", "rm -rf /home/alice/launch /home/bob/launch")


class Submit:
    """A person's submit of a job that holds `count` GPUs, as a process of its own."""

    def __init__(self, lab: Lab, user: str, count: int, *options: str) -> None:
        self.lab, self.user, self.count = lab, user, count
        command = lab.command("submit", "--node", NODE, "--gpus", str(count), *options, "--cwd", "/tmp", "--",
                              "sleep", "300")
        self._process = subprocess.Popen(command.argv, cwd=command.cwd, env=command.env, stdin=subprocess.DEVNULL,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def done(self) -> Submit:
        stdout, self.said = self._process.communicate(timeout=90)
        assert "Traceback" not in self.said, self.said
        self.code, self.id = self._process.returncode, stdout.strip()
        assert self.code in (0, 4) and bool(self.id) == (self.code == 0), (self.code, stdout, self.said)
        return self

    @property
    def run(self) -> RunDir:
        return RunDir(self.lab.seen_here(f"/home/{self.user}/launch/runs/{self.id}"))

    @property
    def has(self) -> tuple[str, ...]:
        return next((event.gpus for event in read_events(self.run)[0] if isinstance(event, Launched)), ())

    @property
    def waits(self) -> str:
        return (process.read_heartbeat(self.run.attempt(0)) or {}).get("waits") or ""

    def decided(self) -> None:
        if self.id:
            wait_until(lambda: self.has or self.waits, 30, f"{self.id} has GPUs or says who has them")

    def end(self, bed: Testbed) -> None:
        """Its supervisor is killed, and with it the sleep."""
        beat = process.read_heartbeat(self.run.attempt(0))
        assert beat
        bed.exec(NODE, "kill", f"-{signal.SIGKILL.value}", str(beat["pid"]))


def race(bed: Testbed, people: dict[str, Lab], seed: int) -> str:
    """Both at the same moment -> what was asked for, and what came of it."""
    dice = random.Random(seed)
    asked = {user: dice.randint(1, CARDS) for user in dice.sample(sorted(people), 2)}
    patient = {user: dice.random() < 0.5 for user in people}
    jobs = [Submit(people[user], user, count, *(() if patient[user] else ("--no-wait",)))
            for user, count in asked.items()]
    for job in jobs:
        job.done()
    for job in jobs:
        job.decided()
    story = f"seed {seed}: {asked}, patient {patient}: {[(job.user, job.code, job.has, job.waits) for job in jobs]}"
    winners, losers = [job for job in jobs if job.id and job.has], [job for job in jobs if not (job.id and job.has)]
    held = [uuid for job in winners for uuid in job.has]
    assert len(set(held)) == len(held) == sum(job.count for job in winners), story
    assert len(losers) == (sum(asked.values()) > CARDS), story
    for loser in losers:
        said = loser.waits if loser.id else loser.said
        assert f"{winners[0].user} job {winners[0].id}" in " ".join(said.split()), (story, said)
        assert patient[loser.user] == bool(loser.id), story
    for winner in winners:
        winner.end(bed)
    for loser in losers:
        if loser.id:
            wait_until(lambda: loser.has, 10, f"the GPUs of the killed one are free ({story})")
            loser.end(bed)
    return story


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.campaign)])
def test_two_people_want_the_last_gpus_at_the_same_moment(testbed: Testbed, people: dict[str, Lab], rounds: int) -> None:
    for seed in range(rounds):
        print(race(testbed, people, 100 + seed))


def test_a_foreign_process_blocks_its_gpu_and_no_other(testbed: Testbed, people: dict[str, Lab]) -> None:
    pid = int(testbed.sh(NODE, "setsid python3 -c 'import time; time.sleep(300)' train.py >/dev/null 2>&1 & echo $!",
                         user="bob"))
    use(testbed, (2, pid, 72704))
    alice = people["alice"]
    three = Submit(alice, "alice", 3).done()
    wait_until(lambda: three.has, 30, "three GPUs")
    assert three.has == ("GPU-0", "GPU-1", "GPU-3")
    bob = rf"GPU 2: bob pid {pid} python3? 71 GB since \d\d:\d\d"
    four = Submit(alice, "alice", 1).done()
    four.decided()
    assert re.search(rf"gpu05 GPU 0: alice job {three.id} pid \d+ since .*; {bob}; GPU 3: ", four.waits), four.waits
    assert alice.status(four.id)["state"] == "PENDING" and four.waits in alice.launch("status").stdout.replace("\n", " ")
    refused = alice.launch("submit", "--node", "any", "--gpus", "1", "--cwd", "/tmp", "--", "true", code=4)
    assert re.search(rf"gpu05 cannot take it now: none of its 4 GPUs is free, 1 asked for; .*{bob}", refused.stderr)
    testbed.exec(NODE, "kill", str(pid))
    use(testbed)
    wait_until(lambda: four.has == ("GPU-2",), 15, "the fourth, once nobody computes there")
    for job in (three, four):
        job.end(testbed)
    listed = json.loads(alice.launch("status", "--all", "--json").stdout)
    assert {job["id"] for job in listed} == {three.id, four.id}
