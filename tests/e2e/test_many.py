"""Many jobs at once: what a look at all of them, and a kill of all of them, asks of the cluster and of the nodes."""
from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.helpers import wait_until
from tests.testbed.slurmbed import GPU_NODES, LOGIN, Calls, SlurmBed

from .lab import Lab

LATER = ("--set", "resources.sbatch.begin=now+1hour")  # in the queue, and nothing runs
FORGET_S = 90  # MinJobAge of the bed is 30 s, and the controller looks once a minute
SSHD_LOG = "/var/log/sshd.log"


@contextmanager
def sessions(bed: SlurmBed, nodes: Sequence[str]) -> Iterator[Counter[str]]:
    """How many commands alice's ssh started on each node meanwhile, filled in at the end."""
    found: Counter[str] = Counter()
    before = {node: bed.read(node, SSHD_LOG).count("\n") for node in nodes}
    yield found
    for node in nodes:
        fresh = bed.read(node, SSHD_LOG).splitlines()[before[node]:]
        found[node] = sum("Starting session" in line and " for alice " in line for line in fresh)


def points(count: int) -> tuple[str, ...]:
    return ("hold", "--sweep", f"point={','.join(map(str, range(count)))}")


def states(lab: Lab, *words: str) -> Counter[str]:
    return Counter(one["state"] for one in json.loads(lab.launch("status", "--json", *words).stdout))


def arrays(calls: Calls) -> list[str]:
    """The calls of sbatch that queued something."""
    return [line for line in calls.lines() if line.startswith("sbatch ") and "--test-only" not in line]


def asked_once(lab: Lab, bed: SlurmBed, calls: Calls, nodes: Sequence[str]) -> list[str]:
    """`launch status`, which asks the cluster and each of its nodes once -> the lines of its table.

    One whose answer would be no proof is repeated: it knew SLURM's words of the two seconds before, or a busy machine
    did not answer in three.
    """
    for _ in range(6):
        with sessions(bed, [LOGIN, *nodes]) as started:
            calls.forget()
            began = time.monotonic()
            said = lab.launch("status")
            took_s = time.monotonic() - began
            counted = calls.count()
        assert max(started.values()) <= 1, started
        assert counted["squeue"] <= 1 and counted["sacct"] <= 1 and set(counted) <= {"squeue", "sacct"}, counted
        table = said.stdout.splitlines()[1:]
        print(f"launch status of {len(table)} jobs: {took_s:.1f} s, {dict(counted)}")
        if "could not be asked" not in said.stderr and counted["squeue"]:
            return table
    raise AssertionError(said.stderr)


def killed_at_once(lab: Lab, bed: SlurmBed, calls: Calls, names: Sequence[str], nodes: Sequence[str]) -> None:
    """One question to the cluster and to each node ends them all, and one more is the look at what is left."""
    with sessions(bed, [LOGIN, *nodes]) as started:
        calls.forget()
        began = time.monotonic()
        lab.launch("kill", *names, timeout_s=280)
        took_s = time.monotonic() - began
        counted = calls.count()
    print(f"launch kill of {' '.join(names)}: {took_s:.1f} s, {dict(counted)}")
    assert all(started[node] <= 2 for node in started), started
    assert counted["scancel"] <= 4, calls.lines()
    assert set(states(lab, *names)) == {"CANCELLED"}
    assert lab.left_over() == []


@pytest.fixture
def calls(slurm_bed: SlurmBed) -> Iterator[Calls]:
    with slurm_bed.calls() as calls:
        yield calls


def test_a_status_asks_the_cluster_and_each_node_once(slurm: Lab, slurm_bed: SlurmBed, calls: Calls) -> None:
    nodes = GPU_NODES[-2:]
    done = slurm.submit("--", "true")
    slurm.launch("wait", done)
    calls.forget()
    sweep = slurm.submit(*points(3), *LATER)
    assert len(arrays(calls)) == 1, calls.lines()
    running = slurm.submit("--", "sleep", "600")
    others = [slurm.submit(*points(2), "--node", node) for node in nodes]
    slurm.wait_state(running, "RUNNING")
    rows = asked_once(slurm, slurm_bed, calls, nodes)
    assert len(rows) == 3 + 1 + 2 * len(nodes), rows
    assert sum("PENDING" in row and sweep in row for row in rows) == 3 and done not in "".join(rows)
    killed_at_once(slurm, slurm_bed, calls, [sweep, running, *others], nodes)


@pytest.mark.campaign
def test_five_hundred_jobs_of_slurm_and_fifty_of_ssh_nodes(slurm: Lab, slurm_bed: SlurmBed, calls: Calls) -> None:
    began = time.monotonic()
    sweep = slurm.launch("submit", "--node", "lab", *points(500), *LATER, timeout_s=300).stdout.strip()
    print(f"a sweep of 500 points: {time.monotonic() - began:.1f} s")
    assert len(arrays(calls)) == 1, calls.lines()
    others = [slurm.submit(*points(10), "--node", node) for node in GPU_NODES]
    assert len(asked_once(slurm, slurm_bed, calls, GPU_NODES)) == 550
    cancelled_behind_our_back(slurm_bed, 20)
    asked_once(slurm, slurm_bed, calls, GPU_NODES)
    wait_until(lambda: states(slurm, sweep) == {"CANCELLED": 20, "PENDING": 480}, 120, "their end is known")
    killed_at_once(slurm, slurm_bed, calls, [sweep, *others], GPU_NODES)


def cancelled_behind_our_back(bed: SlurmBed, count: int) -> None:
    """By scancel, so long ago that squeue does not show them any more."""
    (number,) = {one.id.partition("_")[0] for one in bed.queue("alice")}
    bed.slurm("scancel", f"{number}_[0-{count - 1}]")
    wait_until(lambda: len(bed.slurm("squeue", "-h", "-r", "-t", "all", "-j", number).splitlines()) == 500 - count,
               FORGET_S, "squeue forgets them")
