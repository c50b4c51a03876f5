"""On a real SLURM: whatever the scheduler does to a job, its work completes and it stays one job."""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

import pytest

from cluster.contract import RunDir, merged_metrics
from tests.helpers import wait_until
from tests.testbed.slurmbed import SlurmBed

from .kill_points import last_step
from .lab import ENDED, Lab


def run_of(lab: Lab, job: str) -> RunDir:
    return RunDir(lab.seen_here(lab.run_dir(job)))


def steps_of(run: RunDir) -> list[int]:
    return [line["step"] for line in merged_metrics(run) if "event" not in line]


def slurm_id(run: RunDir) -> str:
    return json.loads(run.slurm.read_bytes())["ids"][-1]


def at_step(lab: Lab, job: str, step: int) -> RunDir:
    wait_until(lambda: lab.status(job)["state"] not in ENDED and run_of(lab, job).attempts(), 60, f"{job} has begun")
    run = run_of(lab, job)
    wait_until(lambda: last_step(run) >= step, 90, f"{job} at step {step}")
    return run


def complete_and_whole(lab: Lab, job: str, run: RunDir, steps: int, timeout_s: float = 180) -> dict:
    lab.launch("wait", job, timeout_s=timeout_s)
    assert steps_of(run) == list(range(1, steps + 1))
    (view,) = [one for one in json.loads(lab.launch("status", "--all", "--json").stdout)]
    assert view["state"] == "COMPLETED", view
    return view


def requeue(bed: SlurmBed, number: str) -> None:
    bed.slurm("scontrol", "requeue", number)


def preempt(bed: SlurmBed, number: str) -> None:
    bed.slurm("sbatch", "-p", "high", "--exclusive", "-w", "gpu01", "--wrap", "sleep 3", user="bob")


def kill_slurmd(bed: SlurmBed, number: str) -> None:
    """The node is lost to SLURM, which starts the job elsewhere."""
    node = bed.slurm("squeue", "-h", "-j", number, "-O", "NodeList").strip()
    bed.fault(node, "kill9", "slurmd")
    wait_until(lambda: bed.slurm("squeue", "-h", "-j", number, "-O", "NodeList").strip() not in ("", node), 90,
               "SLURM starts it on another node")
    bed.fault(node, "start", "slurmd")


WAYS: dict[str, Callable[[SlurmBed, str], None]] = {
    "scontrol requeue": requeue, "preemption": preempt, "kill -9 of slurmd": kill_slurmd}


@pytest.mark.parametrize("way", [
    "scontrol requeue", *(pytest.param(way, marks=pytest.mark.campaign) for way in ("preemption", "kill -9 of slurmd"))])
def test_requeued_it_goes_on_where_it_was(slurm: Lab, slurm_bed: SlurmBed, way: str) -> None:
    steps = 600 if way.startswith("kill") else 60  # SLURM takes a while to miss a node
    job = slurm.submit("tiny", "--node", "lab:low", "--set", f"steps={steps}", "--set",
                       "resources.sbatch.nodelist=gpu01" if way == "preemption" else "resources.sbatch.mem=4G")
    run = at_step(slurm, job, 12)
    WAYS[way](slurm_bed, slurm_id(run))
    wait_until(lambda: len(run.attempts()) > 1, 120, "a second attempt")
    slurm_bed.slurm("scancel", "--signal=KILL", f"{slurm_id(run)}.0", check=False)  # as the srun of a lost node does
    view = complete_and_whole(slurm, job, run, steps)
    assert view["attempt"] == 1, view
    assert slurm.left_over() == []


@pytest.mark.campaign
def test_a_time_limit_is_no_end(slurm: Lab) -> None:
    """One minute a time for three minutes of work."""
    job = slurm.submit("tiny", "--time", "1m", "--set", "steps=1800")
    run = at_step(slurm, job, 1)
    view = complete_and_whole(slurm, job, run, 1800, timeout_s=900)
    assert view["attempt"] >= 2, view


@pytest.mark.campaign
def test_a_job_that_runs_twice_spoils_nothing(slurm: Lab, slurm_bed: SlurmBed) -> None:
    job = slurm.submit("tiny", "--set", "steps=1200")
    run = at_step(slurm, job, 12)
    number = slurm_id(run)
    old = slurm_bed.slurm("squeue", "-h", "-j", number, "-O", "NodeList").strip()
    slurm_bed.fault(old, "kill9", "slurmd")
    try:
        wait_until(lambda: len(run.attempts()) > 1, 120, "a second attempt on another node")
        began = time.monotonic()
        wait_until(lambda: "SUPERSEDED" in run.attempts()[0].journal.read_text() or "a newer attempt"
                   in run.attempts()[0].journal.read_text(), 60, "the older copy gives way")
        print(f"the older copy gave way {time.monotonic() - began:.0f} s after the newer one began (wanted: 60)")
    finally:
        slurm_bed.fault(old, "start", "slurmd")
    complete_and_whole(slurm, job, run, 1200, timeout_s=400)


@pytest.mark.campaign
def test_what_slurm_holds_because_its_node_could_not_start_it_goes_on(slurm: Lab, slurm_bed: SlurmBed) -> None:
    """Whoever looks releases it; it is held again, and a person's restart does not wait for the next time."""
    spool = "/var/spool/slurmd"
    slurm_bed.exec("gpu01", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", spool)
    try:
        job = slurm.submit("tiny", "--set", "resources.sbatch.nodelist=gpu01")
        wait_until(lambda: "released (1 of 3)" in slurm.status(job)["detail"], 30, "it is released")
        wait_until(lambda: "to be released in" in slurm.status(job)["detail"], 30, "it is held again")
    finally:
        slurm_bed.exec("gpu01", "umount", spool)
    slurm.launch("restart", job)
    complete_and_whole(slurm, job, run_of(slurm, job), 60)
    told = slurm.launch("show", job).stdout
    assert told.count("SLURM could not start job") == 2 and "held it; released by " in told
    assert slurm.left_over() == []


def pending(lab: Lab, bed: SlurmBed) -> str:
    return lab.submit("tiny", "--set", "resources.sbatch.begin=now+1hour")


def starting(lab: Lab, bed: SlurmBed) -> str:
    return lab.submit("tiny", "--set", "steps=4000")


def requeueing(lab: Lab, bed: SlurmBed) -> str:
    job = starting(lab, bed)
    run = at_step(lab, job, 3)
    requeue(bed, slurm_id(run))
    wait_until(lambda: lab.status(job)["state"] == "PENDING", 60, "it waits for its next start")
    return job


@pytest.mark.parametrize("moment", [pending, starting, requeueing], ids=lambda moment: moment.__name__)
def test_killed_at_any_moment_it_ends_once(slurm: Lab, slurm_bed: SlurmBed, moment: Callable) -> None:
    job = moment(slurm, slurm_bed)
    killed = slurm.launch("kill", job, timeout_s=120)
    assert "CANCELLED" in killed.stdout + killed.stderr or job in killed.stdout + killed.stderr
    assert slurm.status(job)["state"] == "CANCELLED"
    assert slurm.left_over() == []
    slurm.launch("wait", job, code=1)


def test_what_waits_says_why(slurm: Lab, slurm_bed: SlurmBed) -> None:
    job = slurm.submit("--name", "later", "--set", "resources.sbatch.begin=now+1hour", "tiny")
    table = slurm.launch("status").stdout
    assert "PENDING" in table and "lab" in table
    assert slurm.status(job)["detail"], "the reason while it waits"
    slurm.launch("kill", job)


def test_a_dead_controller_is_no_ending(slurm: Lab, slurm_bed: SlurmBed) -> None:
    job = slurm.submit("tiny", "--set", "steps=150")
    run = at_step(slurm, job, 5)
    with slurm_bed.controller_down():
        began = time.monotonic()
        said = slurm.launch("status")
        took = time.monotonic() - began
        assert took < 5 * 3.5, f"{took:.1f} s"
        assert job in said.stdout and "RUNNING" in said.stdout, said.stdout
        wait_until(partial(_names_slurm, slurm), 60, "status says that SLURM could not be asked")
    complete_and_whole(slurm, job, run, 150)


def _names_slurm(slurm: Lab) -> bool:
    """On a busy machine the login node itself may not answer in time."""
    said = slurm.launch("status")
    return "squeue" in said.stderr + said.stdout or "SLURM" in said.stderr + said.stdout
