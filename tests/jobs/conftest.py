from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.contract import RunDir
from jobs.runtime import Job
from jobs.world import World


@pytest.fixture
def alone() -> World:
    """A world of one rank."""
    return World(0, 1, torch.device("cpu"))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return job_in(tmp_path / "run")


def job_in(run: Path, attempt: int = 0, resume: Path | None = None) -> Job:
    directory = RunDir(run)
    made = directory.attempt(attempt)
    made.path.mkdir(parents=True)
    return Job(run.name, directory, made, directory.checkpoints, resume)


@pytest.fixture(autouse=True)
def same_random_numbers_after() -> Iterator[None]:
    """Trainers seed torch; the next test must not notice."""
    state = torch.random.get_rng_state()
    yield
    torch.random.set_rng_state(state)
