"""What is said about how long a job will take."""
from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.node.measured import Measure
from cluster.spec import Cost
from configs.load import Resolved, load_run, load_stage
from launcher import estimates
from launcher.estimates import Known
from launcher.jobs import JobStatus
from launcher.views import lasting, status_table
from tests.launcher.test_views import JOB

COST = Cost("alike", steps=30_000, checkpoints=4)
MEASURE = Measure(work="alike", job="phase1-abc", t=time.time() - 86_400, host="gpu05", device="NVIDIA H100", complete=True,
                  steps=12, step_s=0.4, start_s=60.0, evaluation_s=0.0, end_s=0.0, val_samples=None,
                  checkpoint_bytes=3 * 10**9, shared_bytes=0, artifact_bytes=0)


def test_an_estimate_says_what_it_rests_on() -> None:
    said = estimates.told(COST, Known(MEASURE, 800e9))
    assert said == ("~3 h 21 min (0.4 s a step, measured on gpu05, NVIDIA H100, 24 h ago by phase1-abc); "
                    "disk 12 GB, 800 GB free")
    assert estimates.told(COST, Known(MEASURE, 5e9)).endswith("disk 12 GB, 5 GB free: TOO LITTLE")
    assert "--dry-run --calibrate" in estimates.told(COST, Known(None, 0.0))
    assert "not known yet" in estimates.told(replace(COST, steps=None), Known(MEASURE, 1e12))
    assert estimates.told(None, Known(None, 0.0)) == ""


@pytest.mark.parametrize(("seconds", "said"), [
    (42.4, "42 s"), (99.0, "99 s"), (719.0, "12 min"), (3600.0, "1 h 0 min"), (12_000.0, "3 h 20 min"),
    (47 * 3600.0, "47 h 0 min"), (124 * 3600.0, "5 d 4 h")])
def test_durations(seconds: float, said: str) -> None:
    assert lasting(seconds) == said


def test_a_job_that_waits_shows_how_long_it_will_take() -> None:
    waits: JobStatus = replace(JOB, state="PENDING", expected_s=12_000.0, eta_s=None)
    table = status_table([waits, replace(waits, state="RUNNING", eta_s=50.0)]).splitlines()
    assert "~3 h 20 min" in table[1] and "~" not in table[2] and "50 s" in table[2]


def test_a_restart_with_other_steps_is_not_measured_as_the_same() -> None:
    def run(*sets: str) -> Resolved:
        return load_run(load_stage("phase3", Path.cwd()), "demo", list(sets), Path.cwd())

    longer = estimates.after_change(COST, run(), run("training.max_steps=900", "training.optimizer.lr=1"))
    assert longer and (longer.work, longer.steps, longer.evaluations) == ("alike", 900, 7)
    assert estimates.after_change(COST, run(), run("training.batch_per_rank=9")) is None
