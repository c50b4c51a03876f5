from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.contract import RunDir
from jobs.runtime import Job
from jobs.world import World
from tests.helpers import wait_until
from tests.node.conftest import make_job  # noqa: F401

Start = Callable[..., list[int]]


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


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(run, ranks, attempt, resume, fault) -> exit codes; of the small stage, or of `module` with `argv`.
    No process of it may outlive its rank."""
    root = Path(__file__).parents[2]
    forker = subprocess.Popen([sys.executable, "-m", "tests.jobs.ranks"], cwd=root, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert forker.stdin and forker.stdout

    def start_ranks(run: Path, ranks: int, attempt: int = 0, resume: Path | None = None, fault: str = "",
                    **job: Any) -> list[int]:
        assert forker.stdin and forker.stdout
        env = {"LAUNCH_RUN_DIR": str(run), "LAUNCH_JOB_ID": run.name, "LAUNCH_ATTEMPT": str(attempt),
               "LAUNCH_RESUME": str(resume or ""), "FAULT": fault or "NONE", "OUTPUT": f"{run}.out"}
        forker.stdin.write(json.dumps({"ranks": ranks, "env": env, **job}) + "\n")
        forker.stdin.flush()
        codes = json.loads(forker.stdout.readline())
        wait_until(lambda: session(forker.pid) == [forker.pid], what="the loader processes are gone")
        return codes

    yield start_ranks
    forker.stdin.close()
    assert forker.wait(60) == 0
    forker.stdout.close()


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
