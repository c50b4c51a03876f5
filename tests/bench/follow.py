"""Following a log: how late a line is, how fast a big log comes, what waiting and having read much cost."""
from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.measure import PYTHON, in_turn, median, ms
from tests.bench.places import WORKDIR, Client, Places, piped, poll
from tests.bench.table import Row

_NODE = "gpu03"
_LOG = "attempts/000/logs/rank-0.log"
_LINES = 60
_TALKER = f"""\
import random, time
for _ in range({_LINES}):
    print(f"{{time.time():.6f}}")
    time.sleep(random.uniform(.03, .12))
time.sleep(600)
"""
_LINE = "step 1200/30000 loss 0.012345 lr 3.1e-05 grad_norm 0.5123 samples 38400 it/s 1.71 eta 4:41:02"
_BIG = 500_000_000
_PART = 150_000_000  # of it, for the rate
_SMALL = 50_000_000
_IDLE_S = 8.0


@dataclass(frozen=True)
class Place:
    """One way to a log: with `launch`, and with tail."""

    name: str
    client: Client
    options: tuple[str, ...]  # of submit
    workdir: str
    seen_at: Callable[[str], Path]  # path on the node -> path on this machine
    tail: Callable[[str], list[str]]  # path on the node -> a command that follows it from its first byte
    network: Path | None = None  # of a node of the test bed

    def log(self, job: str) -> str:
        return f"{self.workdir}/runs/{job}/{_LOG}"


def latency(places: Places) -> Iterator[Row]:
    """From a line's printing to its arrival at the follower's reader, ours and tail -F on the same lines."""
    for place in _both(places):
        with place.client.running(*place.options, "--", PYTHON, "-c", _TALKER) as job:
            ours: list[float] = []
            theirs: list[float] = []
            _wait_for_log(place, job)
            tailing = piped(place.tail(place.log(job)))
            with place.client.started("logs", job, "--follow") as launch, tailing as tail:
                threads = [threading.Thread(target=_read_delays, args=each)
                           for each in ((launch, ours), (tail, theirs))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(30)
                launch.kill(), tail.kill()
        yield _late(place, ours, theirs)


def _late(place: Place, ours: list[float], theirs: list[float]) -> Row:
    if not ours or not theirs:
        return Row(f"{place.name}, line seen after", f"{len(ours)} lines", f"tail: {len(theirs)}", met=False)
    mine, other = median(ours), median(theirs)
    worst = sorted(ours)[int(len(ours) * 0.95)]
    return Row(f"{place.name}, line seen after", f"{ms(mine)} (95 %: {ms(worst)})", f"tail -F: {ms(other)}",
               mine / other, "<= 2x tail -F + 50 ms", mine <= 2 * other + 0.05)


def rate_and_memory(places: Places) -> Iterator[Row]:
    """A log of 500 MB: MB/s beside tail -F, and the memory of all our processes after 50 and after 500 MB."""
    for place in _both(places):
        words = ("sh", "-c", f"yes '{_LINE}' | head -c {_BIG}")
        job = place.client.submit(*place.options, "--", *words)
        place.client.wait(job)
        follow = place.client.argv("logs", job, "--follow")
        tail = place.tail(place.log(job))
        ours, theirs = in_turn(3, lambda: _rate(follow, place.client), lambda: _rate(tail, None))
        mine, other = median(ours), median(theirs)
        yield Row(f"{place.name}, {_PART / 1e6:.0f} MB read at", f"{mine:.0f} MB/s",
                  f"tail -F: {other:.0f} MB/s", mine / other, ">= .7x", mine >= 0.7 * other)
        small, big = _memory(follow, place.client, place.network)
        yield Row(f"{place.name}, memory after {_BIG / 1e6:.0f} MB", f"{big / 1e6:.0f} MB",
                  f"after {_SMALL / 1e6:.0f} MB: {small / 1e6:.0f} MB", big / small, "constant (<= 1.1x)",
                  big <= 1.1 * small)
        place.seen_at(place.log(job)).unlink()  # the test bed's disk is memory


def idle(places: Places) -> Iterator[Row]:
    """What following a silent job costs, the client's and the node's processes together."""
    for place in _both(places):
        with place.client.running(*place.options, "--", "sh", "-c", "echo begin; exec sleep 600") as job:
            with place.client.started("logs", job, "--follow") as launch:
                launch.stdout.read(1)
                ours = _family(launch, place.network)
                before, began = _cpu(ours), time.monotonic()
                time.sleep(_IDLE_S)  # what is measured is this time
                share = (_cpu(ours) - before) / (time.monotonic() - began)
        yield Row(f"{place.name}, idle follower", f"{share * 100:.2f} % of a core", goal="~0 (<= .5 %)",
                  met=share <= 0.005)


def _both(places: Places) -> Iterator[Place]:
    client = places.local("follow")
    yield Place("local", client, ("--cwd", str(client.project)), str(client.state / "work"), Path,
                lambda path: ["tail", "-n", "+1", "-F", path])
    remote = places.remote()
    yield Place("ssh", remote.client, ("--node", _NODE, "--cwd", "/tmp"), WORKDIR,
                lambda path: remote.on_host(_NODE, path),
                lambda path: remote.ssh(_NODE, "tail", "-n", "+1", "-F", path),
                remote.bed.root / "net" / _NODE)


def _wait_for_log(place: Place, job: str) -> None:
    log = place.seen_at(place.log(job))
    poll(f"line in {log}", lambda: str(log.exists() and log.stat().st_size or ""))


def _read_delays(process: subprocess.Popen[bytes], delays: list[float]) -> None:
    """Lines that were there before the follower are late by its start, and left out: the first third."""
    for number in range(_LINES):
        line = process.stdout.readline()
        if not line:
            return
        if number >= _LINES // 3:
            delays.append(time.time() - float(line))


def _rate(argv: list[str], client: Client | None) -> float:
    """MB/s from the first byte on."""
    with _process(argv, client) as process:
        first = len(process.stdout.read(1 << 16))
        began = time.perf_counter()
        read = _read(process, _PART - first)
        return read / 1e6 / (time.perf_counter() - began)


def _memory(argv: list[str], client: Client, network: Path | None) -> tuple[int, int]:
    """Peak bytes of all processes of a follower, after 50 MB and after all."""
    with _process(argv, client) as process:
        read = _read(process, _SMALL)
        family = _family(process, network)
        small = _rss(family)
        read += _read(process, _BIG - read - (1 << 20))
        return small, _rss(family)


def _process(argv: list[str], client: Client | None):  # noqa: ANN202 - what piped() gives
    return piped(argv, env=client.env, cwd=client.project) if client else piped(argv)


def _read(process: subprocess.Popen[bytes], count: int) -> int:
    left = count
    while left > 0 and (block := process.stdout.read(min(left, 1 << 20))):
        left -= len(block)
    return count - left


def _family(process: subprocess.Popen[bytes], network: Path | None) -> list[psutil.Process]:
    """The follower, its children, and the agents that answer it on the node with this network."""
    own = psutil.Process(process.pid)
    agents = [one for one in psutil.process_iter(["cmdline"])
              if "stream" in (one.info["cmdline"] or ()) and network and _is_in(one, network)]
    return [own, *own.children(recursive=True), *agents]


def _is_in(process: psutil.Process, network: Path) -> bool:
    try:
        return os.stat(f"/proc/{process.pid}/ns/net").st_ino == network.stat().st_ino
    except FileNotFoundError:
        return False


def _cpu(family: list[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in family)


def _rss(family: list[psutil.Process]) -> int:
    """Sum of the highest resident sizes so far."""
    return sum(_peak(one.pid) for one in family if one.is_running())


def _peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
