"""A job that was lost when all of its work was done: it completes, and nothing is started for that."""
from __future__ import annotations

import json

import pytest

from cluster.contract import RunDir, merged_metrics
from cluster.events import AttemptEnded, AttemptStarted
from cluster.journal import read_events
from tests.helpers import wait_until
from tests.testbed.slurmbed import SlurmBed
from tests.testbed.testbed import Testbed

from .lab import Lab

STAYS = "import time\nimport tiny_stage\ntiny_stage.main()\ntime.sleep(100000)\n"
STAGE = "about: does not end by itself\ntorchrun: stays.py\nresources: {gpus: 0, procs: 1}\nresume: launch\n"


def all_done(lab: Lab, *where: str) -> tuple[str, RunDir]:
    (lab.project / "stays.py").write_text(STAYS)
    (lab.project / "configs" / "stages" / "stays.yaml").write_text(STAGE)
    quick = str(lab.project / "configs/runs/tiny/quick.yaml")
    job = lab.submit("stays", *where, "--config", quick, "--set", "steps=20")
    wait_until(lambda: lab.status(job)["state"] == "RUNNING", 150, "it runs")
    run = RunDir(lab.seen_here(lab.run_dir(job)))
    wait_until(lambda: any(line.get("event") == "done" for line in merged_metrics(run)), 90, "all is done")
    return job, run


@pytest.mark.campaign
def test_on_a_node_that_is_started_again(lab: Lab, testbed: Testbed) -> None:
    job, run = all_done(lab)
    with testbed.power_cut("gpu05"):
        pass
    said = lab.launch("status", job)
    assert "the job goes on" not in said.stderr and lab.status(job)["state"] == "COMPLETED"
    lab.launch("wait", job)
    assert len(run.attempts()) == 1
    assert "nothing left to do" in lab.launch("restart", job, code=4).stderr


@pytest.mark.campaign
def test_on_two_nodes_of_a_cluster(slurm: Lab, slurm_bed: SlurmBed) -> None:
    job, run = all_done(slurm, "--nodes", "2")
    first = next(event.nodes for event in read_events(run)[0] if isinstance(event, AttemptStarted))[0]
    number = json.loads(run.slurm.read_bytes())["ids"][-1]
    after = slurm_bed.sbatch("true", f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes")
    with slurm_bed.power_cut(first):
        slurm_bed.await_job(number, "COMPLETED", timeout_s=150)
    slurm_bed.await_job(after, "COMPLETED", timeout_s=60)
    assert slurm.status(job)["state"] == "COMPLETED"
    (end,) = [event for event in read_events(run)[0] if isinstance(event, AttemptEnded)]
    assert end.detail.startswith("attempt 0 had done all of it") and len(run.attempts()) == 2
