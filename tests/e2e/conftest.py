"""A person, a project with stages of its own, and the nodes of the test bed."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed.testbed import Testbed

from .lab import ENDED, Lab

PROJECT = Path(__file__).parent / "project"
SMALL_STAGE = Path(__file__).parents[1] / "jobs" / "small_stage.py"
NODES = ("gpu01", "gpu02", "gpu03", "gpu04", "gpu05")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    path = tmp_path / "project"
    shutil.copytree(PROJECT, path)
    shutil.copy(SMALL_STAGE, path)
    return path


@pytest.fixture
def lab(testbed: Testbed, project: Path, tmp_path: Path) -> Iterator[Lab]:
    """alice's laptop, aiming at gpu05. Whatever still runs at the end is killed."""
    home = tmp_path / "laptop"
    home.mkdir()
    cluster = testbed.cluster_yaml(home / "cluster.yaml", "alice", NODES, "/home/alice/launch")
    laptop = Lab(project, home, "gpu05", cluster)
    yield laptop
    for job in json.loads(laptop.launch("status", "--json", "--all").stdout):
        if job["state"] not in ENDED:
            laptop.launch("kill", "--now", job["id"], code=None)
    testbed.sh("gpu05", "rm -rf /home/alice/launch")


def on_this_machine(bed: Testbed, path: str | Path) -> Path:
    """Where the tests see a path below the shared /home of the nodes."""
    return bed.root / Path(path).relative_to("/")
