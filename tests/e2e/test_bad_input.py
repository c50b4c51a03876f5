"""A mistake gets one clear message and the right exit code, starts nothing and leaves nothing."""
from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.contract import RunDir, list_checkpoints
from jobs.data import toy as toy_data
from tests.testbed.clients import client_config
from tests.testbed.testbed import Testbed

from .conftest import on_this_machine
from .lab import Lab

CASES = {
    "unknown stage": (["tinny"], 2, "tiny"),
    "unknown node": (["tiny", "--node", "gpu06"], 2, "gpu05"),
    "unknown key": (["tiny", "--set", "pace=1"], 2, "pace_s"),
    "wrong type": (["tiny", "--set", "resources.procs=two"], 2, "two"),
    "unknown run file": (["tiny", "--config", "quik"], 2, "quick"),
    "not a number of GPUs": (["tiny", "--gpus", "some"], 2, "--gpus"),
    "no such checkpoint": (["tiny", "--resume", "/nowhere/step-1"], 2, "/nowhere/step-1"),
    "nothing to run": (["--node", "gpu05", "--"], 2, "--"),
    "unknown option": (["tiny", "--gpu", "1"], 2, "--gpu"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_on_the_command_line(lab: Lab, case: str) -> None:
    argv, code, said = CASES[case]
    where = [] if "--node" in argv else ["--node", lab.node]
    done = lab.launch("submit", *where, *argv, code=code)
    assert said in done.stderr and done.stdout == "", done.stderr
    assert len(done.stderr.splitlines()) <= 6, done.stderr
    assert lab.launch("status", "--all", "--rescan", "--json").stdout.strip() == "[]"


NODE_CASES = {
    "down": (3, "gpu05"),
    "refused": (3, "refused"),
    "no python": (2, "Python"),
    "read-only": (4, "read-only"),
    "full": (4, "space"),
    "unknown key": (3, "ssh"),
    "changed key": (3, "changed"),
}


def break_node(kind: str, lab: Lab, bed: Testbed, tmp_path: Path, stack: ExitStack) -> Lab:
    node = lab.node
    if kind == "down":
        stack.enter_context(bed.link_down(node))
    elif kind == "refused":
        stack.enter_context(bed.sshd_killed(node))
    elif kind == "no python":
        stack.enter_context(bed.without_python(node))
    elif kind in ("read-only", "full"):
        directory = "/home/alice/disk"
        bed.exec(node, "mkdir", directory, user="alice")
        stack.callback(bed.exec, node, "rmdir", directory)
        stack.enter_context(bed.read_only(node, directory) if kind == "read-only" else bed.full_disk(node, directory))
        return aimed(lab, workdir=f"{directory}/launch")
    else:
        how = {"unknown": [node]} if kind == "unknown key" else {"wrong_key": [node]}
        config = client_config(bed, "alice", tmp_path, **how)
        return aimed(lab, ssh_config=str(config))
    return lab


def aimed(lab: Lab, workdir: str | None = None, ssh_config: str | None = None) -> Lab:
    assert lab.cluster
    cluster = yaml.safe_load(lab.cluster.read_text())
    if workdir:
        cluster["nodes"][lab.node]["workdir"] = workdir
    if ssh_config:
        cluster["ssh_config"] = ssh_config
    path = lab.cluster.with_name("broken.yaml")
    path.write_text(yaml.safe_dump(cluster))
    return replace(lab, cluster=path)


@pytest.mark.parametrize("kind", NODE_CASES)
def test_a_node_that_cannot(lab: Lab, testbed: Testbed, tmp_path: Path, kind: str) -> None:
    code, said = NODE_CASES[kind]
    with ExitStack() as stack:
        broken = break_node(kind, lab, testbed, tmp_path, stack)
        done = broken.launch("submit", "tiny", "--node", lab.node, code=None)
        assert done.returncode == code, done.stderr
        assert said.lower() in done.stderr.lower() and lab.node in done.stderr and done.stdout == "", done.stderr
        assert len(done.stderr.splitlines()) <= 8, done.stderr
    assert [job for job in json.loads(lab.launch("status", "--all", "--rescan", "--json").stdout)] == []
    assert testbed.sh(lab.node, "ls -A /home/alice/launch/runs 2>/dev/null || true") == ""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    toy_data.make(tmp_path / "toy", samples=2, val=1, size=16, seed=0)
    return tmp_path / "toy"


def test_a_bad_sample_ends_the_job_with_its_name(lab: Lab, testbed: Testbed, toy: Path) -> None:
    """The defects one by one are tested beside the reader (tests/jobs); here: what a person sees of one."""
    cameras = next(toy.glob("*/opencv_cameras.json"))
    content = json.loads(cameras.read_text())
    content["frames"][3]["w2c"][0][3] = float("nan")
    cameras.write_text(json.dumps(content))
    on_node = testbed.root / "home/alice/toy"
    shutil.copytree(toy, on_node)
    try:
        done = lab.launch("submit", "phase3", "--config", "demo", "--node", lab.node, "--follow", "--max-restarts", "3",
                          "--set", "training.dataset.path=/home/alice/toy/data_train.txt",
                          "--set", "training.validation.path=/home/alice/toy/data_val.txt", code=1)
    finally:
        shutil.rmtree(on_node)
    assert cameras.parent.name in done.stdout + done.stderr
    (job,) = json.loads(lab.launch("status", "--all", "--json").stdout)
    assert job["state"] == "FAILED" and job["attempt"] == 0
    assert cameras.parent.name in lab.launch("show", job["id"]).stdout
    assert "Traceback" not in done.stdout
    assert list_checkpoints(RunDir(on_this_machine(testbed, job["run_dir"])).checkpoints) == []
