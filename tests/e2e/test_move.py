"""A job goes on on another node: with a common workdir nothing travels, without one what it needs is brought there."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.contract import RunDir, merged_metrics
from tests.helpers import wait_until
from tests.testbed.testbed import Testbed

from .lab import Lab

APART = "/scratch/launch"
STAGE = "about: counts, and saves every five steps\npython: walker.py\nresume: launch\nrestart: {max_restarts: 0}\n"
WALKER = """
import hashlib, json, os, pathlib, signal, time
run, attempt = pathlib.Path(os.environ["LAUNCH_RUN_DIR"]), int(os.environ["LAUNCH_ATTEMPT"])
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
before = os.environ["LAUNCH_RESUME"]
step = int(pathlib.Path(before, "state").read_text()) if before else 0
lines = open(run / f"attempts/{attempt:03d}/metrics.jsonl", "a", buffering=1)

def say(**what):
    lines.write(json.dumps({"t": time.time(), "step": step, "total": 90000, **what}) + "\\n")

def save():
    place = run / f"checkpoints/step-{step:08d}-a{attempt:03d}"
    aside = place.with_name(".new")
    aside.mkdir()
    (aside / "state").write_text(str(step))
    files = {"state": {"size": len(str(step)), "sha256": hashlib.sha256(str(step).encode()).hexdigest()}}
    (aside / "manifest.json").write_text(json.dumps({
        "version": 1, "job": run.name, "attempt": attempt, "step": step, "resumed_from": None, "files": files}))
    aside.rename(place)

say(event="resumed")
while not stops:
    time.sleep(0.05)
    step += 1
    say(loss=1.0 / step)
    if step % 5 == 0:
        save()
if step % 5:
    save()
say(event="stopped")
"""


@pytest.fixture(autouse=True)
def walker(project: Path) -> None:
    (project / "walker.py").write_text(WALKER)
    (project / "configs/stages/walker.yaml").write_text(STAGE)


@pytest.fixture
def apart(testbed: Testbed, project: Path, tmp_path: Path) -> Iterator[Lab]:
    """alice's laptop, and two nodes of which each has a workdir of its own."""
    home = tmp_path / "laptop"
    home.mkdir()
    cluster = testbed.cluster_yaml(home / "cluster.yaml", "alice", ["gpu01", "gpu02"], APART)
    yield Lab(project, home, "gpu01", cluster, bed=testbed)
    testbed.sweep()
    for node in ("gpu01", "gpu02"):
        testbed.sh(node, "rm -rf /scratch/launch")


def trained(lab: Lab) -> str:
    job = lab.submit("walker")
    wait_until(lambda: (lab.status(job)["checkpoint_step"] or 0) >= 5, 60, "a checkpoint")
    return job


def another(lab: Lab, name: str, known: bool) -> Lab:
    """A second laptop; `known`: with what the first one knew at this moment."""
    home = lab.home.parent / name
    home.mkdir()
    if known:
        shutil.copytree(lab.home / "state", home / "state")
    return Lab(lab.project, home, lab.node, lab.cluster, bed=lab.bed)


def metrics(lab: Lab, node: str, job: str) -> list[int]:
    """The steps of the merged series, by what lies on the node."""
    assert lab.bed
    copy = lab.home / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    for line in lab.bed.sh(node, f"cd {APART}/runs/{job} && ls attempts").split():
        target = copy / "attempts" / line / "metrics.jsonl"
        target.parent.mkdir(parents=True)
        target.write_text(lab.bed.read(node, f"{APART}/runs/{job}/attempts/{line}/metrics.jsonl"))
    return [line["step"] for line in merged_metrics(RunDir(copy)) if "loss" in line]


def test_a_job_is_brought_to_a_node_with_a_workdir_of_its_own_and_back(apart: Lab, testbed: Testbed) -> None:
    job = trained(apart)
    testbed.sh("gpu01", f"echo made here >{APART}/runs/{job}/artifacts/note", user="alice")
    before, stranger = another(apart, "before", known=True), another(apart, "stranger", known=False)
    said = apart.launch("restart", job, "--node", "gpu02").stderr
    assert f"moving {job} from gpu01 to gpu02" in said and "gives up its place on gpu01" in said, said
    view = apart.wait_state(job, "RUNNING")
    assert view["node"] == "gpu02" and view["attempt"] == 1 and view["resume_step"] >= 5, view
    assert f"attempt 1, from step {view['resume_step']}" in said and "left where it was: " in said
    assert "artifacts/note" in said and "older checkpoint" in said
    wait_until(lambda: (apart.status(job)["step"] or 0) > view["resume_step"] + 2, 30, "more steps")
    moved = json.loads(testbed.read("gpu01", f"{APART}/runs/{job}/moved_to.json"))
    assert (moved["node"], moved["run_dir"]) == ("gpu02", f"{APART}/runs/{job}")
    assert not [line for line in testbed.processes() if line.startswith("gpu01")]
    followed = before.status(job)
    assert (followed["node"], followed["state"]) == ("gpu02", "RUNNING")
    (found,) = json.loads(stranger.launch("status", "--rescan", "--all", "--json").stdout)
    assert (found["id"], found["node"], found["state"]) == (job, "gpu02", "RUNNING")
    apart.launch("restart", job, "--node", "gpu01")
    view = apart.wait_state(job, "RUNNING")
    assert view["node"] == "gpu01" and view["attempt"] == 2
    assert testbed.read("gpu01", f"{APART}/runs/{job}/artifacts/note") == "made here\n"
    apart.launch("kill", job)
    steps = metrics(apart, "gpu01", job)
    assert steps == list(range(steps[0], steps[0] + len(steps))), steps
    view = apart.status(job)
    assert (view["state"], view["checkpoint_step"]) == ("CANCELLED", steps[-1])


def test_where_the_directory_is_seen_nothing_travels(lab: Lab, testbed: Testbed) -> None:
    job = trained(lab)
    run_dir = lab.status(job)["run_dir"]
    said = lab.launch("restart", job, "--node", "gpu02").stderr
    assert "gpu02 sees its run directory: nothing travels" in said
    view = lab.wait_state(job, "RUNNING")
    assert (view["node"], view["run_dir"], view["attempt"]) == ("gpu02", run_dir, 1) and view["resume_step"] >= 5
    assert not [name for name in testbed.sh("head", "ls -a /home/alice/launch/runs").split() if name.startswith(".seen")]
    lab.launch("kill", job)
    assert lab.status(job)["state"] == "CANCELLED"


def test_a_node_that_does_not_answer_keeps_its_job_and_what_would_be_lost_is_said(apart: Lab, testbed: Testbed) -> None:
    job = trained(apart)
    step = apart.status(job)["step"]
    with testbed.sshd_killed("gpu01"):
        refused = apart.launch("restart", job, "--node", "gpu02", code=3)
    words = " ".join(refused.stderr.split())
    assert "gpu01 cannot be reached" in words and "which would be lost" in words and "checkpoint at step" in words, words
    assert int(words.split("is there: step ")[1].split(",")[0]) >= step
    assert testbed.sh("gpu02", f"ls {APART}/runs 2>/dev/null || :") == ""
    apart.launch("kill", "--now", job)
