"""What `launch` costs, beside its goals: ours and a reference are measured in turn, in the same run.

    python -m tests.bench                all of them, about ten minutes
    python -m tests.bench follow help    those whose name contains one of these words
    python -m tests.bench --list

A figure is a median unless it says otherwise. A missed goal is printed as such and is no error: machines and
neighbours differ, and what a figure means is for a person to judge. Exit code 1: something could not be
measured because a command failed.
"""
from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable

from tests.bench import fanout, follow, many, numerics, slurm, startup, submit, supervision
from tests.bench.measure import CommandFailed
from tests.bench.places import Places, Unavailable
from tests.bench.table import Row, header, line

Benchmark = Callable[[Places], Iterable[Row]]
BENCHMARKS: dict[str, Benchmark] = {
    "help": startup.help_page,
    "status-jobs": startup.status_with_history,
    "dead-node": startup.status_with_a_dead_node,
    "submit-local": submit.local,
    "submit-ssh": submit.over_ssh,
    "jobs-local": many.local,
    "jobs-nodes": many.over_nodes,
    "follow-latency": follow.latency,
    "follow-rate": follow.rate_and_memory,
    "follow-idle": follow.idle,
    "fifty-nodes": fanout.fifty_nodes,
    "slurm-submit": slurm.submitted,
    "slurm-sweep": slurm.a_sweep,
    "slurm-status": slurm.status_of_many,
    "slurm-down": slurm.status_without_controller,
    "completion": supervision.completion_seen,
    "supervisor": supervision.own_cost,
    "rasterizer": numerics.rasterizer,
    "checkpoint": numerics.checkpoint,
}


def main(words: list[str]) -> int:
    if words == ["--list"]:
        print("\n".join(BENCHMARKS))
        return 0
    chosen = [name for name in BENCHMARKS if not words or any(word in name for word in words)]
    if not chosen:
        print(f"no benchmark is named like {' or '.join(words)}; there are: {', '.join(BENCHMARKS)}",
              file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # takes down what is up
    print(header())
    rows: list[Row] = []
    with Places() as places:
        broken = [name for name in chosen if not _run(name, places, rows)]
    judged = [row for row in rows if row.met is not None]
    print(f"\n{sum(bool(row.met) for row in judged)} of {len(judged)} goals met")
    if broken:
        print(f"could not be measured: {', '.join(broken)}")
    return int(bool(broken))


def _run(name: str, places: Places, rows: list[Row]) -> bool:
    """Print and collect the rows of one benchmark -> whether it could be measured, or need not be here."""
    began, whole = time.monotonic(), True
    print(f"\n{name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}", flush=True)
    try:
        for row in BENCHMARKS[name](places):
            rows.append(row)
            print(line(row), flush=True)
    except Unavailable as why:
        print(f"  not measured: {why}", flush=True)
    except (CommandFailed, TimeoutError) as why:
        whole = False
        print(f"  FAILED: {why}", flush=True)
    print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
    return whole


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
