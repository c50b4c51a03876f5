from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from jobs.loader import Order
from jobs.world import World, mixed_seed


def indices(step: int, rank: int = 0, ranks: int = 1, batch: int = 2, samples: int = 5) -> list[int]:
    return [draw.index for draw in Order(samples, batch, World(rank, ranks, torch.device("cpu")), 3).draws(step)]


def test_every_epoch_sees_every_sample_once_and_batches_run_on_across_epochs() -> None:
    seen = [index for step in range(10) for index in indices(step)]
    for epoch in range(4):
        assert sorted(seen[5 * epoch:5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:10] or seen[5:10] != seen[10:15]


def test_ranks_share_one_order() -> None:
    together = [index for rank in range(3) for index in indices(1, rank, 3, batch=1)]
    assert together == [i for step in (3, 4, 5) for i in indices(step, batch=1)]


def test_a_seed_is_a_function_of_its_parts() -> None:
    assert mixed_seed("a", 1, 2) == mixed_seed("a", 1, 2)
    assert len({mixed_seed("a", 1, 2), mixed_seed("a", 12), mixed_seed("b", 1, 2), mixed_seed("a", 2, 1)}) == 4


def test_an_error_ends_a_rank_whatever_its_loader_processes_do(tmp_path: Path) -> None:
    """They ignore SIGTERM; the rank must not wait for them, or its peers wait for it forever."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LAUNCH_RUN_DIR": str(tmp_path), "FAULT": "RAISE:0:7"}
    done = subprocess.run([sys.executable, "-m", "tests.jobs.small_stage"], env=env, text=True, timeout=60,
                          cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: planned at pass 7"
