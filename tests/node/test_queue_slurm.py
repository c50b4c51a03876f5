"""Status and kill against the real SLURM, of jobs that are plain sleeps: no supervisor helps."""
from __future__ import annotations

import json
from typing import Any

import pytest

from tests.testbed.bed import poll
from tests.testbed.slurmbed import SlurmBed

pytestmark = pytest.mark.testbed

WORKDIR = "/home/alice/queue-test"
DRIVER = """
import json, sys, time
from pathlib import Path
from cluster.node import kill, view
from tests.node.scheduled import slurm_run, started_on
workdir, word, *args = sys.argv[1:]
if word == "make":
    name, id, started = args
    events = (started_on(id),) if started == "True" else ()
    slurm_run(Path(workdir), name, events, [id], started=bool(events))
    answer = {}
else:
    began = time.monotonic()
    if word == "status":
        answer = view.status({"workdir": workdir}, None)
    else:
        run_dir, now = f"{workdir}/runs/{args[0]}", "now" in args
        answer = kill.kill({"run_dir": run_dir, "by": "me@here", "now": now, "grace_s": 1.0}, None)
    answer["took_s"] = time.monotonic() - began
print(json.dumps(answer))
"""


class Jobs:
    """Run directories of alice's jobs, and what the agent on the login node says about them."""

    def __init__(self, bed: SlurmBed, folder: str) -> None:
        self.bed, self._workdir = bed, f"{WORKDIR}/{folder}"

    def add(self, name: str, id: str, started: bool = False) -> None:
        self._drive("make", name, id, str(started))

    def status(self) -> dict[str, Any]:
        answer = self._drive("status")
        return {**answer, "jobs": {job["id"]: job for job in answer["jobs"]}}

    def kill(self, name: str, *more: str) -> dict[str, Any]:
        return self._drive("kill", name, *more)

    def _drive(self, *argv: str) -> dict[str, Any]:
        return json.loads(self.bed.on_login("-c", DRIVER, self._workdir, *argv))


@pytest.fixture
def jobs(slurm_bed: SlurmBed, request: pytest.FixtureRequest):
    yield Jobs(slurm_bed, request.node.name)
    slurm_bed.slurm("scancel", "-u", "alice", user="root")
    assert poll(lambda: not slurm_bed.queue("alice"), 30)
    slurm_bed.sh("head", f"rm -rf {WORKDIR}", user="alice")


def test_what_runs_what_waits_and_what_was_cancelled_in_one_question(jobs: Jobs) -> None:
    bed = jobs.bed
    running = bed.sbatch("sleep 600", "-N5", "--exclusive", "--time=10")
    waits = [bed.sbatch("sleep 600", "-N5", "--exclusive", f"--nice={nice}") for nice in (10, 20)]
    held = bed.sbatch("true", "--hold")
    after = bed.sbatch("true", f"--dependency=afterok:{running}")
    bed.await_job(running, "RUNNING")
    for name, id in {"running": running, "second": waits[0], "third": waits[1], "held": held, "after": after}.items():
        jobs.add(name, id, started=name == "running")
    with bed.calls() as calls:
        seen = jobs.status()["jobs"]
        assert dict(calls.count()) == {"squeue": 1}
    assert (seen["running"]["state"], seen["running"]["place"]) == ("PENDING", "gpu[01-05]")
    assert [seen[name]["queue"]["position"] for name in ("second", "third", "held", "after")] == [1, 2, None, None]
    assert seen["third"]["detail"].endswith("2nd of 2") and seen["held"]["detail"].startswith("held by its owner")
    assert seen["after"]["detail"] == "waits for another job"
    bed.slurm("scancel", waits[0])
    assert poll(lambda: jobs.status()["jobs"]["second"]["state"] == "CANCELLED", 10)


def test_a_hung_controller_changes_nothing_and_is_said_in_time(jobs: Jobs) -> None:
    id = jobs.bed.sbatch("sleep 600")
    jobs.bed.await_job(id, "RUNNING")
    jobs.add("a", id, started=True)
    before = jobs.status()["jobs"]["a"]
    with jobs.bed.controller_hung(), jobs.bed.calls() as calls:
        assert poll(lambda: jobs.status()["unasked"], 10)  # the last answer is fresh for two seconds
        for _ in range(3):
            answer = jobs.status()
            assert answer["took_s"] < 2.9 and "squeue did not answer in 2.5 s; what is shown it said" in answer["unasked"]
            assert answer["jobs"]["a"]["state"] == before["state"]
        assert calls.count()["squeue"] <= 3  # a pause of 2 s, of 4 s, …


def test_a_kill_takes_a_waiting_job_and_a_waiting_point_of_an_array_out_of_the_queue(jobs: Jobs) -> None:
    bed = jobs.bed
    id = bed.sbatch("sleep 600", "--hold")
    array = bed.sbatch("sleep 600", "--array=0-3%1", "--hold")
    jobs.add("a", id)
    for point in range(4):
        jobs.add(f"p-{point}", f"{array}_{point}")
    done = jobs.kill("a")
    assert (done["state"], done["detail"]) == ("CANCELLED", "by me@here: before it started") and done["took_s"] < 10
    assert jobs.kill("p-2")["state"] == "CANCELLED"
    seen = jobs.status()["jobs"]
    assert [seen[f"p-{point}"]["state"] for point in range(4)] == ["PENDING", "PENDING", "CANCELLED", "PENDING"]
    assert id not in [one.id for one in bed.queue()]


def test_a_job_that_does_not_hear_is_ended_by_slurm_and_gone(jobs: Jobs) -> None:
    id = jobs.bed.sbatch("sleep 600", "-w", "gpu02")
    jobs.bed.await_job(id, "RUNNING")
    jobs.add("a", id, started=True)
    done = jobs.kill("a", "now")
    assert done["state"] == "CANCELLED" and done["detail"] == "by me@here: scancel"
    assert "wrote no ending" in done["note"]
    assert not jobs.bed.queue("alice")


def test_a_lost_accounting_and_a_lost_job(jobs: Jobs) -> None:
    id = jobs.bed.sbatch("sleep 600", "--hold")
    jobs.add("a", id)
    jobs.add("lost", "99999")
    with jobs.bed.accounting_down():
        answer = jobs.status()
    assert answer["jobs"]["a"]["state"] == "PENDING" and answer["jobs"]["a"]["unasked"] == ""
    assert answer["jobs"]["lost"]["state"] == "PENDING" and answer["unasked"].startswith("sacct")


def test_a_job_that_its_node_could_not_start_goes_on(jobs: Jobs) -> None:
    """SLURM holds it for somebody to release it: whoever looks does."""
    bed = jobs.bed
    bed.exec("gpu01", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/var/spool/slurmd")
    try:
        id = bed.sbatch("sleep 600", "-w", "gpu01")
        jobs.add("a", id)
        assert poll(lambda: bed.job(id)["Reason"] == "launch_failed_requeued_held", 10)
    finally:
        bed.exec("gpu01", "umount", "/var/spool/slurmd")
    assert poll(lambda: jobs.status()["notes"], 10)
    bed.await_job(id, "RUNNING")
