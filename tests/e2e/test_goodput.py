"""Where the time of a job with two attempts went, beside what its files say to somebody who adds up by hand."""
from __future__ import annotations

import json
import os
import signal
import statistics
from pathlib import Path

import psutil
import pytest

from cluster.contract import RunDir
from cluster.events import AttemptEnded, AttemptStarted
from cluster.journal import read_events
from tests.helpers import wait_until
from tests.testbed.slurmbed import SlurmBed

from .kill_points import last_step
from .lab import Lab

SLOWLY = ("--set", "pace_s=0.1", "--set", "save_s=0.4", "--set", "resources.procs=1")


def by_hand(run: RunDir, view: dict) -> dict[str, float]:
    """Seconds of each part, from journals and metrics of two attempts. From the end until a person restarts it nobody
    wants it."""
    events = read_events(run)[0]
    starts = [event for event in events if isinstance(event, AttemptStarted)]
    ends = [event.t for event in events if isinstance(event, AttemptEnded)]
    first, second = ([json.loads(line) for line in attempt.metrics.read_text().splitlines()]
                     for attempt in run.attempts())
    lost_at = ends[0] if len(ends) == 2 else first[-1]["t"]
    rest = starts[1].t - lost_at if starts[1].by == "restart" else 0.0
    pairs = [pair for lines in (first, second) for pair in zip(lines, lines[1:])]
    gaps = [(line, line["t"] - before["t"]) for before, line in pairs]
    pace = statistics.mean(seconds for line, seconds in gaps if "event" not in line)  # two passes make an update
    began = [next(line["t"] for line in lines if "event" not in line) - start.t
             for lines, start in zip((first, second), starts)]
    first_evaluation = sum(seconds for line, seconds in gaps if line.get("event") == "eval" and line["step"] == 0)
    return {
        "wall": view["ended_at"] - view["submitted_at"] - rest, "queue": starts[0].t - view["submitted_at"],
        "between": starts[1].t - lost_at - rest, "start": sum(began) - first_evaluation,
        "checkpoint": sum(seconds for line, seconds in gaps if line.get("event") == "checkpoint"),
        "replay": pace * sum(1 for line in first if "event" not in line and line["step"] > (starts[1].resume_step or 0)),
        "useful": pace * view["total"], "stall": 0.0}


def agrees(lab: Lab, job: str, run: RunDir) -> None:
    view = lab.status(job)
    assert view["state"] == "COMPLETED" and view["attempt"] == 1, view
    found = json.loads(lab.launch("doctor", job, "--json", code=None).stdout)["goodput"]
    expected = by_hand(run, view)
    print("\n".join(f"{part:11}{found[part]:8.2f} s  by hand {expected.get(part, float('nan')):8.2f} s" for part in found))
    assert sum(seconds for part, seconds in found.items() if part != "wall") == pytest.approx(found["wall"])
    for part, seconds in expected.items():
        share = 0.3 if part in ("replay", "useful", "start") else 0.02  # steps differ, and so does the first one
        assert found[part] == pytest.approx(seconds, rel=share, abs=1.0), part


@pytest.mark.campaign
def test_a_job_that_was_cut_off_and_restarted(project: Path, tmp_path: Path) -> None:
    lab = Lab(project, tmp_path)
    job = lab.submit("tiny", *SLOWLY)
    run = RunDir(lab.run_dir(job))
    wait_until(lambda: last_step(run) >= 27, 90, "some steps after a checkpoint")
    supervisor = psutil.Process(json.loads(run.attempt(0).heartbeat.read_bytes())["pid"])
    supervisor.suspend()  # nobody starts anew what dies now
    for one in supervisor.children(recursive=True):
        os.kill(one.pid, signal.SIGKILL)
    supervisor.kill()
    lab.wait_state(job, "FAILED")
    lab.launch("restart", job)
    lab.launch("wait", job, timeout_s=120)
    agrees(lab, job, run)


@pytest.mark.campaign
def test_a_job_that_slurm_requeued(slurm: Lab, slurm_bed: SlurmBed) -> None:
    job = slurm.submit("tiny", *SLOWLY)
    slurm.wait_state(job, "RUNNING", timeout_s=150)
    run = RunDir(slurm.seen_here(slurm.run_dir(job)))
    wait_until(lambda: last_step(run) >= 27, 90, "some steps after a checkpoint")
    slurm_bed.slurm("scontrol", "requeue", json.loads(run.slurm.read_bytes())["ids"][-1])
    slurm.launch("wait", job, timeout_s=180)
    agrees(slurm, job, run)
