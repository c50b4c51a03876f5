"""What it costs to be looked after, and how soon an end is known."""
from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.bench.measure import median, ms
from tests.bench.places import Client, Places, poll
from tests.bench.table import Row

_NODE = "gpu04"
_LOG = "attempts/000/logs/rank-0.log"
_ROUNDS = 5
_WATCHED_S = 12.0


def completion_seen(places: Places) -> Iterator[Row]:
    """From the last breath of a job to the end of a `launch wait` that was there before."""
    client = places.local("completion")
    delays = [_delay(client, client.state / "work", "--cwd", str(client.project)) for _ in range(_ROUNDS)]
    yield _seen("local", delays)
    remote = places.remote()
    workdir = remote.on_host(_NODE, "/scratch/alice/launch")
    delays = [_delay(remote.client, workdir, "--node", _NODE, "--cwd", "/tmp") for _ in range(_ROUNDS)]
    yield _seen("ssh", delays)


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


def _seen(where: str, delays: list[float]) -> Row:
    return Row(f"{where}, end seen after", f"{ms(median(delays))} (worst {ms(max(delays))})", goal="<= 50 ms",
               met=median(delays) <= 0.05)


def _delay(client: Client, workdir: Path, *options: str) -> float:
    """The job says when it ends, at a time that no polling interval can be in step with."""
    seconds = random.uniform(1.5, 2.5)
    job = client.submit(*options, "--", "sh", "-c", f"sleep {seconds:.3f}; exec date +%s.%N")
    with client.started("wait", job) as waiting:
        waiting.wait(30)
        ended = time.time()
    log = workdir / "runs" / job / _LOG
    return ended - float(poll(f"line in {log}", lambda: log.read_text().strip()))


def _supervisor(run_dir: Path) -> int:
    return json.loads((run_dir / "attempts/000/heartbeat.json").read_text())["pid"]
