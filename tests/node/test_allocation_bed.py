"""A supervisor in allocations of a real SLURM: what the scheduler does to a job loses and doubles nothing."""
from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.contract import RunDir, merged_metrics
from cluster.events import AttemptEnded, AttemptStarted, Event, Reason
from cluster.journal import read_events
from cluster.spec import JobSpec, PythonEnv, ResumeRule, RestartPolicy, Slurm
from cluster.states import WORDS, fold
from tests.helpers import wait_until
from tests.testbed.bed import REPOSITORY
from tests.testbed.slurmbed import LOGIN, SlurmBed

STAGE = REPOSITORY / "tests/e2e/project/tiny_stage.py"
CONFIG = "steps: {steps}\npace_s: {pace_s}\nsave_s: 0.0\ndie_in_save: 0\n"
STAYS = "import time, tiny_stage; tiny_stage.main(); time.sleep(100000)"
QUEUE = """
import sys
from pathlib import Path
from cluster.contract import RunDir
from cluster.node import process, sbatch
from cluster.spec import JobSpec
run = RunDir(Path(sys.argv[1]))
print(sbatch.queue(run, JobSpec.from_json(run.spec.read_bytes()), process.agent_command()))
"""


class BedJob:
    """A job of alice in SLURM, its run directory in the /home that all nodes share."""

    def __init__(self, bed: SlurmBed, name: str, spec: JobSpec, config: str) -> None:
        self.bed, self.spec = bed, spec
        self.path = f"/home/alice/launch/runs/{name}"
        self.run = RunDir(bed.root / self.path[1:])
        bed.sh(LOGIN, 'umask 077; mkdir -p "$1"; cd "$1"; mkdir control checkpoints artifacts attempts code', self.path, user="alice")
        bed.write(LOGIN, f"{self.path}/spec.json", spec.to_json().decode(), user="alice")
        bed.write(LOGIN, f"{self.path}/config.yaml", config, user="alice")
        self.id = bed.exec(LOGIN, sys.executable, "-c", QUEUE, self.path, user="alice").stdout.split()[-1]

    @property
    def events(self) -> list[Event]:
        return read_events(self.run)[0]

    @property
    def state(self) -> str:
        return WORDS[type(fold(self.events)[0])]

    @property
    def endings(self) -> list[AttemptEnded]:
        return [event for event in self.events if isinstance(event, AttemptEnded)]

    @property
    def starts(self) -> list[AttemptStarted]:
        return [event for event in self.events if isinstance(event, AttemptStarted)]

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in merged_metrics(self.run) if "event" not in line]

    def at(self, step: int, attempt: int = 0) -> None:
        wait_until(lambda: len(self.run.attempts()) > attempt and self.steps and self.steps[-1] >= step, 90,
                   f"step {step} of attempt {attempt}; {self.events}; {self.bed.job(self.id)}")

    def completed(self, steps: int, timeout_s: float = 120) -> None:
        wait_until(lambda: self.state == "COMPLETED", timeout_s, f"completed: {self.events}")
        assert self.steps == list(range(1, steps + 1)), "no step twice and none missing"
        self.bed.await_job(self.id, "COMPLETED")
        assert fold(self.events)[1] == 0


@pytest.fixture
def bed_job(slurm_bed: SlurmBed) -> Callable[..., BedJob]:
    numbers = itertools.count()
    base = JobSpec(
        id="", token="", stage="tiny", kind="torchrun", argv=(str(STAGE),), node="lab", pass_config=True, procs=2,
        slurm=Slurm(), python=PythonEnv("python", sys.executable), resume_rule=ResumeRule("launch"),
        restart=RestartPolicy(0, 0.1, 0.1), env={
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests/jobs:{REPOSITORY}/tests/e2e/project", "OMP_NUM_THREADS": "1"})

    def make(steps: int, options: dict[str, str | int | bool] | None = None, partition: str | None = None,
             pace_s: float = 0.1, **fields: object) -> BedJob:
        name = f"alloc-{slurm_bed.name}-{next(numbers)}"
        while (slurm_bed.root / "home/alice/launch/runs" / name).exists():
            name = f"alloc-{slurm_bed.name}-{next(numbers)}"
        spec = replace(base, id=name, token=name, slurm=Slurm(partition, options=options or {}), **fields)
        return BedJob(slurm_bed, name, spec, CONFIG.format(steps=steps, pace_s=pace_s))

    return make


def test_a_preemption_saves_at_once_and_goes_on(slurm_bed: SlurmBed, bed_job: Callable[..., BedJob]) -> None:
    job = bed_job(80, {"nodelist": "gpu01", "mem": "4G"}, partition="low")
    job.at(12)
    other = slurm_bed.sbatch("sleep 2", "-p", "high", "-w", "gpu01", "--exclusive", user="bob")
    slurm_bed.await_job(other, "COMPLETED", timeout_s=60)
    job.completed(80)
    first, last = job.endings
    assert (first.reason, first.next, last.reason) == (Reason.PREEMPTED, "requeue", Reason.DONE)
    assert first.checkpoint_step == first.step == job.starts[1].resume_step
    assert [start.by for start in job.starts] == ["submit", "scheduler"] and {start.slurm_id for start in job.starts} == {job.id}


@pytest.mark.campaign
def test_a_node_that_dies_when_all_is_done_leaves_a_completed_job(
        slurm_bed: SlurmBed, bed_job: Callable[..., BedJob]) -> None:
    """And what waits for it begins."""
    job = bed_job(20, {"mem": "4G"}, kind="command", argv=(sys.executable, "-c", STAYS))
    after = slurm_bed.sbatch("true", f"--dependency=afterok:{job.id}", "--kill-on-invalid-dep=yes")
    wait_until(lambda: any(line.get("event") == "done" for line in merged_metrics(job.run)), 90, "all is done")
    with slurm_bed.power_cut(job.starts[0].hostname):
        job.completed(20, 150)
    assert [start.by for start in job.starts] == ["submit", "scheduler"] and len(job.endings) == 1
    assert "attempt 0 had done all of it" in job.endings[0].detail
    slurm_bed.await_job(after, "COMPLETED")


def test_where_requeue_is_forbidden_dependents_follow_the_continuation(slurm_bed: SlurmBed, bed_job: Callable[..., BedJob]) -> None:
    job = bed_job(200, {"no-requeue": True})
    first = job.id
    after = slurm_bed.sbatch("true", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    job.at(12)
    slurm_bed.slurm("scancel", "--signal=USR1", first)
    slurm_bed.await_job(first, "FAILED", timeout_s=60)
    job.id = str(int(after) + 1)
    job.completed(200)
    slurm_bed.await_job(after, "COMPLETED")


def test_out_of_memory_in_the_cgroup_is_recognised(slurm_bed: SlurmBed, bed_job: Callable[..., BedJob]) -> None:
    eats = "x = []\nwhile True: x.append(bytearray(1 << 24))"
    job = bed_job(1, {"mem": "100M"}, kind="command", argv=(sys.executable, "-c", eats), pass_config=False, resume_rule=ResumeRule())
    wait_until(lambda: job.state == "OUT_OF_MEMORY", 60, f"out of memory: {job.events}")
    slurm_bed.await_job(job.id, "OUT_OF_MEMORY", "FAILED")
