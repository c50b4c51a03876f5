"""What it costs to be looked after, and how soon an end is known."""
from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.bench.measure import PYTHON, median, ms
from tests.bench.places import WORKDIR, Client, Places, piped, poll
from tests.bench.table import Row

_NODE = "gpu04"
_ROUNDS = 5
_WATCHED_S = 12.0
_WAITER = "import os, select, sys; select.select([os.pidfd_open(int(sys.argv[1]))], [], [])"


def completion_seen(places: Places) -> Iterator[Row]:
    """From the last breath of a job to the end of a `launch wait` that was there before."""
    client = places.local("completion")
    project, work = str(client.project), client.state / "work"
    seen = [_seen(client, work, "--cwd", project) for _ in range(_ROUNDS)]
    yield _row("local", [ours for ours, _ in seen], [bare for _, bare in seen])
    remote = places.remote()
    workdir = remote.on_host(_NODE, WORKDIR)
    seen = [_seen(remote.client, workdir, "--node", _NODE, "--cwd", "/tmp") for _ in range(_ROUNDS)]
    yield _row("ssh", [ours for ours, in seen], [])


def own_cost(places: Places) -> Iterator[Row]:
    """The supervisor of a job that sleeps."""
    client = places.local("supervisor")
    with client.running("--cwd", str(client.project), "--", "sleep", "600") as job:
        process = psutil.Process(_supervisor(Path(client.status(job)["run_dir"])))
        time.sleep(2)  # its start is not what is asked
        before, began = sum(process.cpu_times()[:2]), time.monotonic()
        time.sleep(_WATCHED_S)
        share = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)
        memory = process.memory_full_info()
    yield Row("supervisor of a sleeping job, CPU", f"{share * 100:.2f} % of a core", goal="< 1 %",
              met=share < 0.01)
    yield Row("supervisor of a sleeping job, RSS", f"{memory.rss / 1e6:.1f} MB",
              f"of its own (USS): {memory.uss / 1e6:.1f} MB", goal="< 30 MB", met=memory.rss < 30e6)


def _row(where: str, ours: list[float], bare: list[float]) -> Row:
    reference = f"Python that waits for the pid: {ms(median(bare))}" if bare else "-"
    return Row(f"{where}, end seen after", f"{ms(median(ours))} (worst {ms(max(ours))})", reference,
               median(ours) / median(bare) if bare else None, "<= 50 ms", median(ours) <= 0.05)


def _seen(client: Client, workdir: Path, *options: str) -> list[float]:
    """Seconds until `launch wait` has ended; here also until a Python that waits for the same process has."""
    seconds = random.uniform(1.5, 2.5)  # in step with no polling interval
    job = client.submit(*options, "--", "sh", "-c", f"sleep {seconds:.3f}; exec date +%s.%N")
    attempt = workdir / "runs" / job / "attempts/000"
    waiting = [client.started("wait", job)]
    if options[0] != "--node":
        pid = json.loads(poll("rank", lambda: _text(attempt / "ranks/0.json")))["pid"]
        waiting.append(piped([PYTHON, "-c", _WAITER, str(pid)]))
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(_end_of, [stack.enter_context(one) for one in waiting]))
    last = float(poll("last word", lambda: _text(attempt / "logs/rank-0.log")))
    return [end - last for end in ends]


def _end_of(process: subprocess.Popen[bytes]) -> float:
    process.wait()  # with a timeout it would look only every 50 ms
    return time.time()


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _supervisor(run_dir: Path) -> int:
    return json.loads((run_dir / "attempts/000/heartbeat.json").read_text())["pid"]
