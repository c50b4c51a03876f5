"""What is shown of a job that SLURM runs: its run directory and the queue, made one."""
from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import RunDir
from cluster.events import AttemptEnded, AttemptStarted, Launched, Reason
from cluster.node import following, logs, queue_memory, view
from cluster.node.sbatch_options import mark
from cluster.spec import After
from tests.cluster.jobs import past_run, write_journal
from tests.node.scheduled import accounted, iso, queued, slurm_run
from tests.slurm.fake import FakeSlurm
from tests.slurm.recorded import Answer

NOW = time.time()
STARTED = AttemptStarted(NOW - 300, 0, "submit", "gpu01", "boot", 4, 5, (), None, None, "7", 0, ("gpu01",))
LAUNCHED = Launched(NOW - 299, ("true",), ("GPU-1",), 6)
ENDED = AttemptEnded(NOW - 100, Reason.DONE, "", 0, 9, None, None, "end", None)
PREEMPTED = dataclasses.replace(ENDED, reason=Reason.PREEMPTED, next="requeue", checkpoint_step=40)
SCHEDULER = dataclasses.replace(PREEMPTED, reason=Reason.SCHEDULER)
RUNNING = (STARTED, LAUNCHED)
DISABLED = Answer(stderr="Slurm accounting storage is disabled\n", code=1)


def shown(run: RunDir) -> dict[str, Any]:
    return view.view_of(run)


def test_a_job_that_waits_says_why_and_where_it_stands(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    starts = int(NOW) + 3600
    fake_slurm.jobs(queued("5"), queued("7", PriorityLong="90", StartTime=iso(starts)))
    found = shown(slurm_run(tmp_path, "a-1", (), ["7"], started=False))
    assert (found["state"], found["detail"], found["reason"]) == ("PENDING", "Priority, 2nd of 2", None)
    assert found["backend"] == "slurm" and found["place"] == "lab:main"
    assert found["queue"] | {"asked_at": 0} == {
        "id": "7", "state": "PENDING", "reason": "Priority", "words": "Priority, 2nd of 2", "position": 2, "of": 2,
        "starts_at": float(starts), "restarts": 0, "asked_at": 0}


def test_a_job_that_runs_is_where_slurm_put_it(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(queued("7", State="RUNNING", NodeList="gpu[01-02]"))
    found = shown(slurm_run(tmp_path, "a-1", RUNNING, ["7"]))
    assert (found["state"], found["place"], found["detail"], found["unasked"]) == ("RUNNING", "gpu[01-02]", "", "")
    assert found["gpus"] == ["GPU-1"] and found["node"] == "lab"


@pytest.mark.parametrize(("events", "row", "state", "reason", "detail"), [
    (RUNNING, {"State": "RUNNING"}, "RUNNING", None, ""),
    (RUNNING, {"State": "SUSPENDED"}, "RUNNING", None, "suspended by SLURM"),
    (RUNNING, {"State": "COMPLETING"}, "RUNNING", None, "SLURM is ending it"),
    (RUNNING, {"State": "EXPEDITING"}, "RUNNING", None, "SLURM says EXPEDITING"),
    ((), {"State": "RUNNING", "NodeList": "gpu02"}, "PENDING", None, "starting on gpu02"),
    ((), {"State": "CONFIGURING"}, "PENDING", None, "its nodes are being made ready"),
    ((), {"Reason": "SomethingNew", "PriorityLong": "0"}, "PENDING", None, "SomethingNew"),
    # requeued: the same id, one restart more
    ((*RUNNING, PREEMPTED), {"RestartCnt": "1"}, "PENDING", "preempted", "Priority, 1st of 1"),
    ((*RUNNING, PREEMPTED), {"State": "COMPLETING", "RestartCnt": "1"}, "PENDING", "preempted", "SLURM is ending it"),
    ((*RUNNING, PREEMPTED), {"State": "RUNNING"}, "PENDING", "preempted", "being requeued"),
    (RUNNING, {"RestartCnt": "1", "Reason": "BeginTime"}, "PENDING", "node lost", "waits for its begin time"),
    (RUNNING, {"State": "RUNNING", "RestartCnt": "1", "NodeList": "gpu02"}, "PENDING", None, "starting on gpu02"),
    (RUNNING, {"State": "REQUEUE_HOLD", "RestartCnt": "1"}, "PENDING", "node lost",
     "requeued and held: launch restart lets it go on"),
    # ended, and only SLURM says so
    (RUNNING, {"State": "TIMEOUT"}, "TIMEOUT", "time limit", ""),
    (RUNNING, {"State": "OUT_OF_MEMORY"}, "OUT_OF_MEMORY", "killed by the kernel: out of memory", ""),
    (RUNNING, {"State": "NODE_FAIL", "NodeList": "gpu01"}, "NODE_FAIL", "node lost", "on gpu01"),
    (RUNNING, {"State": "FAILED", "Reason": "RaisedSignal:9"}, "FAILED", "supervisor lost",
     "it wrote no ending; SLURM says FAILED (RaisedSignal:9)"),
    ((), {"State": "FAILED", "Reason": "JobLaunchFailure"}, "FAILED", "could not be started",
     "SLURM says FAILED (JobLaunchFailure)"),
    ((), {"State": "CANCELLED", "Reason": "DependencyNeverSatisfied"}, "CANCELLED",
     "a job it waits for did not complete", "cancelled by SLURM"),
    ((*RUNNING, SCHEDULER), {"State": "CANCELLED"}, "CANCELLED", "killed by a person", "by scancel: scancel"),
    ((*RUNNING, PREEMPTED), {"State": "FAILED"}, "CANCELLED", "preempted", "SLURM did not start it again"),
    # the run directory's word counts
    ((*RUNNING, ENDED), {"State": "COMPLETING"}, "COMPLETED", "done", ""),
    ((*RUNNING, ENDED), {"State": "FAILED"}, "COMPLETED", "done", ""),
])
def test_every_word_of_the_queue(
        fake_slurm: FakeSlurm, tmp_path: Path, events: tuple, row: dict, state: str, reason: str | None,
        detail: str) -> None:
    fake_slurm.jobs(queued("7", **{"EndTime": iso(NOW - 60), **row}))
    found = shown(slurm_run(tmp_path, "a-1", events, ["7"], started=bool(events)))
    assert (found["state"], found["reason"], found["detail"]) == (state, reason, detail)


def test_the_jobs_that_it_waits_for_are_named(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    first = past_run(tmp_path / "runs", "phase1-a", (*RUNNING, ENDED))
    second = past_run(tmp_path / "runs", "phase1-b", RUNNING)
    after = tuple(After(run.path.name, str(run.path)) for run in (first, second))
    fake_slurm.jobs(queued("7", Reason="Dependency"))
    waiting = slurm_run(tmp_path, "a-1", (), ["7"], started=False, after=after)
    assert shown(waiting)["detail"] == "waits for phase1-b"
    failed = dataclasses.replace(ENDED, reason=Reason.ERROR, detail="exit code 3")
    write_journal(second.attempt(0).journal, (*RUNNING, failed))
    fake_slurm.jobs(queued("7", State="CANCELLED", Reason="DependencyNeverSatisfied", EndTime=iso(NOW - 60)))
    os.unlink(tmp_path / ".launch" / "slurm" / "queue.json")
    assert shown(waiting)["detail"] == "phase1-b: error in the program: exit code 3"


def test_a_job_whose_node_failed_when_all_was_done_is_complete(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(queued("7", State="NODE_FAIL", EndTime=iso(NOW - 60)))
    run = slurm_run(tmp_path, "a-1", RUNNING, ["7"])
    run.attempt(0).metrics.write_text('{"t": 1.0, "step": 9, "total": 9, "event": "done"}\n')
    assert (shown(run)["state"], shown(run)["reason"]) == ("COMPLETED", "done")


def test_an_ending_by_slurm_alone_is_not_believed_at_once(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(queued("7", State="FAILED", EndTime=iso(time.time() - 1)))
    found = shown(slurm_run(tmp_path, "a-1", RUNNING, ["7"]))
    assert (found["state"], found["detail"]) == ("RUNNING", "SLURM says FAILED")


def test_a_silent_heartbeat_of_a_running_job_is_said(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(queued("7", State="RUNNING", NodeList="gpu01"))
    found = shown(slurm_run(tmp_path, "a-1", RUNNING, ["7"], beat_age_s=90))
    assert found["state"] == "RUNNING" and found["detail"].startswith("no heartbeat for 9")


def test_what_a_supervisor_waits_for_is_said(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(queued("7", State="RUNNING", NodeList="gpu01"))
    run = slurm_run(tmp_path, "a-1", (STARTED,), ["7"])
    beat = run.attempt(0).heartbeat
    beat.write_text(json.dumps(json.loads(beat.read_text()) | {"waits": "node 1 of 2"}))
    assert (shown(run)["state"], shown(run)["detail"]) == ("PENDING", "node 1 of 2")


@pytest.mark.parametrize(("events", "stopper", "age_s", "state", "said"), [
    (RUNNING, "", 30, "RUNNING", ""),
    (RUNNING, "", 90, "FAILED", "SLURM does not know it any more"),
    ((*RUNNING, SCHEDULER), "", 90, "CANCELLED", "by scancel: scancel"),
    ((*RUNNING, PREEMPTED), "", 90, "CANCELLED", "SLURM does not know it any more"),
    ((), "mina@lab", 10, "CANCELLED", "by mina@lab: before it started"),
    ((), "mina@lab", 1, "PENDING", "stop asked by mina@lab"),
    ((), "", 90, "FAILED", "SLURM does not know it any more"),
])
def test_a_job_that_slurm_has_forgotten(
        fake_slurm: FakeSlurm, tmp_path: Path, events: tuple, stopper: str, age_s: float, state: str, said: str) -> None:
    fake_slurm.say("sacct", DISABLED)
    old = tuple(dataclasses.replace(event, t=NOW - 300) for event in events)
    run = slurm_run(tmp_path, "a-1", old, ["7"], beat_age_s=age_s, started=bool(events))
    if stopper:
        (run.control / "stop").write_text(json.dumps({"by": stopper}))
    found = shown(run)
    assert found["state"] == state and said in found["detail"]


def test_a_point_that_was_cancelled_while_others_wait_has_no_record(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(queued("7_4"))
    fake_slurm.past(accounted("7_[3-9]", "PENDING"))
    found = shown(slurm_run(tmp_path, "s-3", (), ["7_3"], beat_age_s=90, started=False))
    assert (found["state"], found["detail"]) == ("CANCELLED", "by scancel: before it started")
    assert shown(slurm_run(tmp_path, "s-5", (), ["7_5"], beat_age_s=30, started=False))["state"] == "PENDING"


def test_who_cancelled_it_is_named_where_accounting_knows(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.past(accounted("7", f"CANCELLED by {os.getuid()}", End=iso(NOW - 100)))
    found = shown(slurm_run(tmp_path, "a-1", (), ["7"], started=False))
    assert found["state"] == "CANCELLED" and found["detail"].endswith(": before it started")
    assert found["detail"] != "by scancel: before it started"


def test_an_unasked_scheduler_changes_nothing(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.say("squeue", Answer(stderr="slurm_load_jobs error: Unable to contact slurm controller\n", code=1))
    found = shown(slurm_run(tmp_path, "a-1", RUNNING, ["7"], beat_age_s=4000))
    assert found["state"] == "RUNNING" and "Unable to contact" in found["unasked"]


@pytest.mark.parametrize(("id", "noted"), [("7", {}), ("7_1", {"array": {"name": "swept", "token": "first", "index": 1}})])
def test_a_job_whose_id_nobody_wrote_down_is_known_by_its_comment(
        fake_slurm: FakeSlurm, tmp_path: Path, id: str, noted: dict[str, Any]) -> None:
    run = slurm_run(tmp_path, "a-1", (), [], beat_age_s=4000, started=False)
    if noted:
        run.slurm.write_text(json.dumps({"ids": []} | noted))
        os.utime(run.slurm, (NOW - 4000, NOW - 4000))
    spec = json.loads(run.spec.read_bytes())
    name, token = ("swept", "first") if noted else (spec["id"], spec["token"])
    fake_slurm.jobs(queued(id, Name=name, Comment=mark(token)), queued("7_0", Name="swept", Comment=mark("first")),
                    queued("8", Name="another", Comment=mark(token)))
    found = shown(run)
    assert (found["state"], found["queue"]["id"]) == ("PENDING", id)
    os.unlink(tmp_path / ".launch" / "slurm" / "queue.json")
    fake_slurm.say("squeue", Answer(stderr="slurm_load_jobs error: Unable to contact slurm controller\n", code=1))
    assert shown(run)["state"] == "PENDING"
    os.unlink(tmp_path / ".launch" / "slurm" / "queue.json")
    fake_slurm.say("squeue", "squeue.empty")
    assert (shown(run)["state"], shown(run)["reason"]) == ("FAILED", "could not be started")


def test_a_job_given_to_slurm_again_after_its_end_lives(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    run = slurm_run(tmp_path, "a-1", (*RUNNING, ENDED), ["7", "8"])
    fake_slurm.jobs(queued("8"))
    assert shown(run)["state"] == "PENDING"
    fake_slurm.jobs(queued("8", State="CANCELLED"))
    os.unlink(tmp_path / ".launch" / "slurm" / "queue.json")
    assert shown(run)["state"] == "COMPLETED"


@pytest.mark.parametrize("says", [(), (Answer(stderr="Unable to contact slurm controller\n", code=1),)])
def test_one_given_to_slurm_again_that_is_not_shown_yet_has_not_ended(
        fake_slurm: FakeSlurm, tmp_path: Path, says: tuple[Answer, ...]) -> None:
    """Another job is just being told to wait for it."""
    fake_slurm.say("squeue", *says)
    found = shown(slurm_run(tmp_path, "a-1", (*RUNNING, ENDED), ["7", "8"]))
    assert (found["state"], found["detail"]) == ("PENDING", "given to SLURM again")


def test_one_status_of_500_jobs_is_one_squeue(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    runs = [slurm_run(tmp_path, f"a-{number}", (), [str(number)], started=False) for number in range(500)]
    fake_slurm.jobs(*(queued(str(number)) for number in range(500)))
    answer = view.status({"workdir": str(tmp_path)}, None)
    assert len(answer["jobs"]) == len(runs) and answer["unasked"] == "" and not answer["broken"]
    assert dict(fake_slurm.count()) == {"squeue": 1}


def test_a_status_says_once_what_it_could_not_ask(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.say("squeue", Answer(stderr="squeue: error: busy\n", code=1))
    for number in range(3):
        slurm_run(tmp_path, f"a-{number}", RUNNING, [str(number)])
    assert view.status({"workdir": str(tmp_path)}, None)["unasked"].startswith("squeue: busy")


def test_slurm_gets_what_is_left_of_the_time_that_a_client_waits(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm_run(tmp_path, "a-1", RUNNING, ["7"])
    fake_slurm.say("squeue", Answer(hang_s=9))
    began = time.monotonic()
    answer = view.status({"workdir": str(tmp_path), "asked_at": time.time() - 1.7}, None)
    assert time.monotonic() - began < 2
    assert answer["jobs"][0]["state"] == "RUNNING" and answer["unasked"].startswith("squeue did not answer in 0.8 s")


def test_jobs_without_slurm_do_not_load_what_asks_it(tmp_path: Path) -> None:
    past_run(tmp_path / "runs", "b-1", (STARTED,))
    source = ("import sys; from cluster.node import view; "
              f"view.status({{'workdir': {str(tmp_path)!r}}}, None); "
              "print([name for name in sys.modules if 'queue' in name or 'slurm' in name or 'scheduled' in name])")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert "cluster.node" not in done.stdout, done.stdout


def test_ended_jobs_ask_nobody(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm_run(tmp_path, "a-1", (*RUNNING, ENDED), ["7"])
    (found,) = view.status({"workdir": str(tmp_path)}, None)["jobs"]
    assert (found["state"], found["slurm_id"]) == ("COMPLETED", "7")
    assert fake_slurm.calls() == []


def test_a_follower_ends_with_its_job_and_asks_rarely(
        fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_QUEUE_S", (0.3, 0.6))
    monkeypatch.setattr(following, "_STATE_S", 0.05)
    monkeypatch.setattr(queue_memory.Source, "due", lambda self, *_: True)
    fake_slurm.jobs(queued("7", State="RUNNING", NodeList="gpu01"))
    run = slurm_run(tmp_path, "a-1", RUNNING, ["7"])
    began = time.monotonic()

    def wait(seconds: float, _: object) -> bool:
        if time.monotonic() > began + 1.2:
            fake_slurm.jobs(queued("7", State="TIMEOUT", EndTime=iso(NOW - 60)))
        return logs.sleep(seconds, ())

    *_, (last, _body) = logs.frames({"run_dir": str(run.path), "follow": True, "ranks": []}, wait)
    assert last["end"]["state"] == "TIMEOUT"
    assert 3 <= fake_slurm.count()["squeue"] <= 7
