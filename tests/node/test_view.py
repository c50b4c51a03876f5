"""What a node says about a job that runs."""
from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.contract import RunDir, write_atomically
from cluster.events import Event
from cluster.node import process
from cluster.node.view import view_of
from cluster.spec import ResumeRule
from tests.cluster.jobs import DONE, LAUNCHED, STARTED, past_run


def _view(tmp_path: Path, events: tuple[Event, ...], metrics: str) -> dict:
    """Of a job whose last heartbeat was at step 7 of 9, supervised by this very process."""
    run = past_run(tmp_path, "phase3-aaaaaa", events)
    _beat(run)
    run.attempt(0).metrics.write_text(metrics)
    return view_of(run)


def _beat(run: RunDir, **facts: object) -> None:
    path = run.attempt(0).heartbeat
    beat = json.loads(path.read_text()) | facts
    beat |= {"pid": os.getpid(), "pid_started": process.start_time(os.getpid())}
    write_atomically(path, json.dumps(beat).encode())


METRICS = (json.dumps({"t": 1.0, "step": 0, "note": "x" * 20_000}) + "\n"
           + '{"t": 2.0, "step": 8, "total": 9, "loss": NaN, "it_s": 4.0, "eta_s": 0.25}\n'
           + '{"t": 3.0, "step": 8, "event": "checkpoint", "save_s": 0.1}\n{"t": 4.0, "st')


def test_a_running_job_is_as_far_as_its_metrics_say(tmp_path: Path) -> None:
    view = _view(tmp_path, (STARTED, LAUNCHED), METRICS)
    assert view["state"] == "RUNNING"
    assert [view[key] for key in ("step", "total", "loss", "it_s", "eta_s")] == [8, 9, "nan", 4.0, 0.25]
    assert view["peak_rss_mb"] == 3.0


def test_what_the_metrics_do_not_say_is_of_the_heartbeat(tmp_path: Path) -> None:
    view = _view(tmp_path, (STARTED, LAUNCHED), '{"t": 2.0, "step": 8}\n')
    assert (view["step"], view["total"], view["loss"]) == (8, 9, 0.5)


def test_an_ended_job_keeps_what_its_supervisor_wrote_last(tmp_path: Path) -> None:
    assert _view(tmp_path, (STARTED, LAUNCHED, DONE), METRICS)["step"] == 7


def test_a_job_that_ended_just_now_is_told_with_its_last_heartbeat(tmp_path: Path) -> None:
    now = time.time()
    run = past_run(tmp_path, "phase3-aaaaaa", (STARTED, LAUNCHED, replace(DONE, t=now + 3)))  # seconds left for the late one
    _beat(run, t=now - 5)
    late = threading.Timer(0.1, _beat, (run,), {"t": now + 3, "step": 9})
    late.start()
    assert view_of(run)["step"] == 9
    late.join()


def test_a_job_that_lost_its_supervisor_after_its_last_word_is_complete(tmp_path: Path) -> None:
    lost = past_run(tmp_path, "phase3-aaaaaa", (STARTED, LAUNCHED))  # its heartbeat names a process that is no more
    lost.attempt(0).metrics.write_text('{"t": 2.0, "step": 9, "total": 9}\n{"t": 3.0, "step": 9, "event": "checkpoint"}\n')
    assert view_of(lost)["reason"] in ("supervisor lost", "node lost")
    with open(lost.attempt(0).metrics, "a") as file:
        file.write('{"t": 4.0, "step": 9, "event": "done"}\n')
    view = view_of(lost)
    assert (view["state"], view["reason"]) == ("COMPLETED", "done") and "after its last word" in view["detail"]


@pytest.mark.parametrize("newer", [True, False])
def test_a_trainers_report_says_that_it_is_complete(tmp_path: Path, newer: bool) -> None:
    """The last line of the metrics may be lost with the node. The report of an earlier attempt says nothing."""
    lost = past_run(tmp_path, "phase3-aaaaaa", (STARTED, LAUNCHED), resume_rule=ResumeRule("launch"))
    lost.attempt(0).metrics.write_text('{"t": 2.0, "step": 9, "total": 9}\n')
    lost.attempt(0).spec.write_bytes(lost.spec.read_bytes())
    lost.artifacts.mkdir()
    (lost.artifacts / "report.json").write_text("{}")
    began = lost.attempt(0).spec.stat().st_mtime_ns + (-1 if newer else 1) * 10 ** 9
    os.utime(lost.attempt(0).spec, ns=(began, began))
    assert (view_of(lost)["state"] == "COMPLETED") is newer


def test_a_run_by_hand_that_validation_ended_is_complete(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path / "clap3-by-hand-1").attempt(0)
    attempt.path.mkdir(parents=True)
    attempt.metrics.write_text('{"t": 2.0, "step": 4, "total": 9}\n{"t": 3.0, "step": 4, "total": 9, "event": "done"}\n')
    assert view_of(RunDir(tmp_path / "clap3-by-hand-1"))["state"] == "COMPLETED"
