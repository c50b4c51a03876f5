"""A rank that sleeps for ever, at the true thresholds: who is told, how soon, and what they see."""
from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.contract import RunDir
from cluster.events import AttemptStarted, Fired
from cluster.journal import read_events
from tests.e2e.conftest import _cleaned
from tests.e2e.lab import Lab
from tests.helpers import wait_until
from tests.testbed.slurmbed import SlurmBed

HANGS = """
import os, time
import small_stage, tiny_stage
from jobs.runtime import run_job

whole = small_stage.SmallStage.loss


def loss(self, batch, step):
    if step == 30 and os.environ["RANK"] == "1":
        time.sleep(100000)
    return whole(self, batch, step)


small_stage.SmallStage.loss = loss
run_job(tiny_stage.main, int(os.environ["RANK"]))
"""
STAGE = "about: one rank sleeps for ever\ntorchrun: hang_stage.py\nresources: {gpus: 0, procs: 2}\nresume: launch\n"


@pytest.fixture
def person(project: Path, tmp_path: Path) -> Iterator[Lab]:
    (project / "hang_stage.py").write_text(HANGS)
    (project / "configs" / "stages" / "hang.yaml").write_text(STAGE)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"notify: [{{command: [tee, -a, {tmp_path}/told], on: [stall]}}]\n")
    yield from _cleaned(Lab(project, tmp_path, cluster=cluster), None)


def hangs(lab: Lab) -> None:
    (lab.project / "hang_stage.py").write_text(HANGS)
    (lab.project / "configs" / "stages" / "hang.yaml").write_text(STAGE.replace("procs: 2", "procs: 1"))


def reported(lab: Lab, *nodes: str) -> tuple[str, RunDir, Fired]:
    """A job of two nodes, one rank on each, of which the second sleeps -> its finding, which came in time."""
    job = lab.submit("hang", *nodes, "--config", str(lab.project / "configs/runs/tiny/quick.yaml"), "--set", "steps=200")
    lab.wait_state(job, "RUNNING", timeout_s=150)
    run = RunDir(lab.seen_here(lab.run_dir(job)))
    (fired,) = wait_until(lambda: [one for one in read_events(run)[0] if isinstance(one, Fired)], 150)
    lines = [json.loads(line) for line in run.attempt(0).metrics.read_text().splitlines()]
    pace = statistics.median(after["t"] - before["t"] for before, after in zip(lines, lines[1:]))
    took = fired.t - lines[-1]["t"]
    print(f"reported {took:.1f} s after the last step; {fired.what}")
    assert fired.rule == "stalled" and took <= 3 * pace + 30
    return job, run, fired


def shows_both(lab: Lab, job: str, run: RunDir, fired: Fired, second: str) -> None:
    line = HANGS.splitlines().index("        time.sleep(100000)") + 1
    assert f"rank 1 on {second} is in loss (" in fired.what and f"hang_stage.py:{line})" in fired.what
    assert "rank 0 waits in a collective" in fired.what
    assert f"hang_stage.py\", line {line} in loss" in (run.attempt(0).evidence / "node-1.stalled.txt").read_text()
    seen = lab.launch("doctor", job, code=1).stdout
    assert "attempts/000/evidence/stalled.txt" in seen and "attempts/000/evidence/node-1.stalled.txt" in seen
    assert f"hang_stage.py\", line {line} in loss" in seen and f"rank 1 on {second} is in loss" in seen
    lab.launch("kill", "--now", job)


@pytest.mark.campaign
def test_a_hang_on_another_node_is_reported_with_rank_and_line(lab: Lab) -> None:
    hangs(lab)
    shows_both(lab, *reported(lab, "--node", "gpu01,gpu02"), "gpu02")


@pytest.mark.campaign
def test_a_hang_on_another_node_of_a_cluster(slurm: Lab, slurm_bed: SlurmBed) -> None:
    hangs(slurm)
    job, run, fired = reported(slurm, "--nodes", "2")
    second = next(event.nodes for event in read_events(run)[0] if isinstance(event, AttemptStarted))[1]
    shows_both(slurm, job, run, fired, second)


@pytest.mark.campaign
def test_a_hang_in_a_collective_is_reported_with_rank_and_line(person: Lab, tmp_path: Path) -> None:
    job = person.submit("hang", "--config", str(person.project / "configs/runs/tiny/quick.yaml"), "--set", "steps=200")
    run = RunDir(Path(person.status(job)["run_dir"]))
    (fired,) = wait_until(lambda: [one for one in read_events(run)[0] if isinstance(one, Fired)], 120)
    lines = [json.loads(line) for line in run.attempt(0).metrics.read_text().splitlines()]
    pace = statistics.median(after["t"] - before["t"] for before, after in zip(lines, lines[1:]))
    assert fired.rule == "stalled" and fired.t - lines[-1]["t"] <= 3 * pace + 30
    line = HANGS.splitlines().index("        time.sleep(100000)") + 1
    assert "rank 1 is in loss (" in fired.what and f"hang_stage.py:{line})" in fired.what
    assert "rank 0 waits in a collective" in fired.what
    assert person.status(job)["state"] == "RUNNING" and person.status(job)["health"] == "sick"
    told = json.loads(wait_until(lambda: (tmp_path / "told").exists() and (tmp_path / "told").read_text()))
    assert (told["kind"], told["job"], told["rule"]) == ("stall", job, "stalled")
    assert "rank 1 is in loss (" in person.launch("show", job).stdout
    seen = person.launch("doctor", job, code=1).stdout
    assert "error: stalled" in seen and "attempts/000/evidence/stalled.txt" in seen and "rank 1 is in loss" in seen
    person.launch("kill", "--now", job)
