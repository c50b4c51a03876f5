"""Many jobs that do nothing: how many come to their end in a second, and what each costs with all that serves it."""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.bench.measure import PYTHON, CommandFailed, ms, spend
from tests.bench.places import GPU_NODES, NOOP, Client, Places, Remote, Unavailable
from tests.bench.table import Row

_ROUNDS = 4
_AT_ONCE = 5  # commands for nodes
# Runs a command, then waits for all that it left behind: supervisors, jobs, helpers. Prints seconds, seconds of CPU.
_TO_THE_LAST = """\
import ctypes, json, os, resource, subprocess, sys, time
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
began = time.monotonic()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
try:
    while True:
        os.wait()
except ChildProcessError:
    took_s = time.monotonic() - began
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([took_s, used.ru_utime + used.ru_stime]))
"""
_EACH = 'for one in $(seq "$1"); do "$2" submit --cwd "$3" -- true; done'
_SUBMITIT = """\
import sys, submitit
executor = submitit.LocalExecutor(folder=sys.argv[1])
executor.update_parameters(timeout_min=1)
for _ in range(int(sys.argv[2])):
    executor.submit(submitit.helpers.CommandFunction(["true"]))
"""


@dataclass(frozen=True)
class Batch:
    """So many jobs, from the first command to the end of the last process."""

    jobs: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0  # of the commands and of all that they started

    @property
    def per_s(self) -> float:
        return self.jobs / self.wall_s

    def __str__(self) -> str:
        return f"{self.per_s:.1f}/s (cpu {ms(self.cpu_s / self.jobs)} each)"

    def __add__(self, other: Batch) -> Batch:
        return Batch(self.jobs + other.jobs, self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


def local(places: Places, jobs: int = 1000, by_hand: int = 40, reference: int = 80) -> Iterator[Row]:
    """1,000 jobs on this computer as sweeps, some by a command each, some by submitit's LocalExecutor, in turn."""
    client, folder = places.local("many", NOOP), places.folder / "submitit-many"
    swept = each = theirs = Batch()
    for _ in range(_ROUNDS):
        swept += _swept(client, jobs // _ROUNDS)
        each += _one_by_one(client, by_hand // _ROUNDS)
        theirs += _submitit(folder, reference // _ROUNDS)
    beside = f"submitit: {theirs}"
    yield Row(f"{swept.jobs:,} jobs as sweeps", str(swept), beside, swept.per_s / theirs.per_s)
    yield Row(f"{each.jobs} jobs, a command each", str(each), beside, each.per_s / theirs.per_s)
    table = client.launch("status", "--all", "--json")
    yield Row("  status --all of them", str(table))
    yield _completed([one["state"] for one in json.loads(table.stdout)], swept.jobs + each.jobs)


def over_nodes(places: Places, jobs: int = 50) -> Iterator[Row]:
    """50 jobs over five nodes, a command for each, beside as many cold `ssh node true`; five at a time."""
    remote = places.remote()
    nodes = [GPU_NODES[number % len(GPU_NODES)] for number in range(jobs)]
    for node in GPU_NODES:  # the agent is carried there once
        remote.client.launch(*_noop(node))
    before = {one["id"] for one in _known(remote)}
    ours = _over(remote, nodes, lambda: _all_submitted(remote, nodes))
    theirs = _over(remote, nodes, lambda: _all_reached(remote, nodes))
    yield Row(f"{jobs} jobs over {len(GPU_NODES)} nodes", str(ours), f"ssh true: {theirs}", ours.per_s / theirs.per_s)
    yield _completed([one["state"] for one in _known(remote) if one["id"] not in before], jobs)


def _completed(states: Sequence[str], expected: int) -> Row:
    count = states.count("COMPLETED")
    return Row("  completed", f"{count:,} of {expected:,}", goal="all", met=count == expected)


def _swept(client: Client, count: int) -> Batch:
    return _batch(count, client.argv("submit", "noop", "--sweep", f"point={','.join(map(str, range(count)))}"), client)


def _one_by_one(client: Client, count: int) -> Batch:
    return _batch(count, ["sh", "-ec", _EACH, "sh", str(count), *client.argv(), str(client.project)], client)


def _submitit(folder: Path, count: int) -> Batch:
    """Raises CommandFailed when not every job has left a result."""
    before = len(list(folder.glob("*_result.pkl")))
    batch = _batch(count, [PYTHON, "-c", _SUBMITIT, str(folder), str(count)])
    if (ran := len(list(folder.glob("*_result.pkl"))) - before) != count:
        raise CommandFailed(f"{ran} of {count} jobs of submitit have left a result")
    return batch


def _batch(count: int, argv: Sequence[str], client: Client | None = None) -> Batch:
    place = {"env": client.env, "cwd": client.project} if client else {}
    wall_s, cpu_s = json.loads(spend([PYTHON, "-c", _TO_THE_LAST, *argv], **place).stdout)
    return Batch(count, wall_s, cpu_s)


def _over(remote: Remote, nodes: Sequence[str], work: Callable[[], float]) -> Batch:
    """With `work`, which says what CPU the clients took; that of the nodes is added."""
    before, began = _cpu_of_nodes(remote), time.monotonic()
    clients_s = work()
    wall_s = time.monotonic() - began
    return Batch(len(nodes), wall_s, clients_s + _cpu_of_nodes(remote) - before)


def _all_submitted(remote: Remote, nodes: Sequence[str]) -> float:
    """Every job has ended when this returns."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        spent = list(pool.map(lambda node: remote.client.launch(*_noop(node)), nodes))
    waited = remote.client.launch("wait", *(one.stdout.strip() for one in spent))
    return sum(one.cpu_s for one in [*spent, waited])


def _all_reached(remote: Remote, nodes: Sequence[str]) -> float:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return sum(pool.map(lambda node: spend(remote.ssh(node, "true")).cpu_s, nodes))


def _noop(node: str) -> tuple[str, ...]:
    return ("submit", "--node", node, "--cwd", "/tmp", "--", "true")


def _known(remote: Remote) -> list[dict]:
    return json.loads(remote.client.launch("status", "--all", "--json", codes=(0, 3)).stdout)


def _cpu_of_nodes(remote: Remote) -> float:
    """Seconds of CPU of everything that ran on the nodes so far. Raises Unavailable."""
    for base in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        stats = [base / remote.bed.root.name / node / "cpu.stat" for node in GPU_NODES]
        if all(stat.exists() for stat in stats):
            used = (dict(line.split() for line in stat.read_text().splitlines()) for stat in stats)
            return sum(int(one["usage_usec"]) for one in used) / 1e6
    raise Unavailable("the CPU of the nodes is counted by cgroup v2, which this machine does not have")
