"""A person, a project with stages of its own, and the nodes of the test bed."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed.slurmbed import SlurmBed
from tests.testbed.testbed import Testbed

from .lab import ENDED, Lab, LoginLab

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
    yield from _cleaned(Lab(project, home, "gpu05", cluster, bed=testbed), testbed)


LOGIN = "SLURM from its login node"
PLACES = ("local", "ssh", LOGIN, "SLURM from a laptop")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, slurm_bed: SlurmBed, project: Path, tmp_path: Path) -> Iterator[Lab]:
    """A person who aims at each kind of place in turn."""
    kind = request.param
    if kind == "local":
        yield from _cleaned(Lab(project, tmp_path), None)
    elif kind == LOGIN:
        yield from _cleaned(logged_in(slurm_bed, project), slurm_bed)
    else:
        node = "gpu05" if kind == "ssh" else "lab"
        yield from _cleaned(laptop(slurm_bed, project, tmp_path / "laptop", node), slurm_bed)


@pytest.fixture
def slurm(slurm_bed: SlurmBed, project: Path, tmp_path: Path) -> Iterator[Lab]:
    """alice's laptop, aiming at the SLURM cluster `lab` through its login node."""
    yield from _cleaned(laptop(slurm_bed, project, tmp_path / "laptop", "lab"), slurm_bed)


def laptop(bed: SlurmBed, project: Path, home: Path, node: str) -> Lab:
    home.mkdir()
    cluster = home / "cluster.yaml"
    cluster.write_text(bed.slurm_cluster("alice", ssh_nodes=NODES))
    return Lab(project, home, node, cluster, bed=bed)


def logged_in(bed: SlurmBed, project: Path) -> LoginLab:
    """A shell on the head: project, cluster.yaml and index are in the home that the nodes share."""
    home = Path("/home/alice/person")
    there = bed.root / home.relative_to("/")
    shutil.copytree(project, there / "project")
    (there / "cluster.yaml").write_text(bed.slurm_cluster("alice", login="here"))
    bed.exec("head", "chown", "-R", "alice:", str(home))
    return LoginLab(home / "project", home, "lab", home / "cluster.yaml", bed=bed)


def _cleaned(person: Lab, bed: Testbed | None) -> Iterator[Lab]:
    """Whatever still runs at the end is killed."""
    yield person
    jobs = json.loads(person.launch("status", "--json", "--all").stdout)
    if left := [job["id"] for job in jobs if job["state"] not in ENDED]:
        person.launch("kill", "--now", *left, code=None)
    if bed:
        bed.sh("head", "rm -rf /home/alice/launch /home/alice/person")


def on_this_machine(bed: Testbed, path: str | Path) -> Path:
    """Where the tests see a path below the shared /home of the nodes."""
    return bed.root / Path(path).relative_to("/")
