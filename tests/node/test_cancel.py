"""Killing a job that SLURM runs: by its supervisor where it lives, by SLURM where not, and verified in the queue."""
from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import RunDir
from cluster.errors import NodeFailure, Refused, Unreachable
from cluster.events import AttemptEnded, AttemptStarted, Launched, Reason, StopAsked
from cluster.node import cancel, kill, queue_memory
from tests.cluster.jobs import write_journal
from tests.node.scheduled import accounted, iso, queued, slurm_run
from tests.slurm.fake import FakeSlurm
from tests.slurm.recorded import Answer

NOW = time.time()
STARTED = AttemptStarted(NOW - 300, 0, "submit", "gpu01", "boot", 4, 5, (), None, None, "7", 0, ("gpu01",))
RUNNING = (STARTED, Launched(NOW - 299, ("true",), ("GPU-1",), 6))
KILLED = (*RUNNING, StopAsked(NOW - 2, "me@here", "kill", 60.0),
          AttemptEnded(NOW - 1, Reason.KILLED, "by me@here: checkpoint at step 9", 0, 9, "c", 9, "end", None))


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "_PAUSE_S", (0.05, 0.05))
    monkeypatch.setattr(queue_memory.Source, "due", lambda self, *_: True)


@contextmanager
def slurm_reacts(fake: FakeSlurm, react: Callable[[list[str]], None]) -> Iterator[None]:
    """Calls `react` with every scancel, soon after it came."""
    over = threading.Event()

    def watch() -> None:
        seen = 0
        while not over.wait(0.01):
            calls = [call for call in fake.calls() if call[0] == "scancel"]
            for call in calls[seen:]:
                react(call[1:])
            seen = len(calls)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def ask(run: RunDir, **more: Any) -> dict[str, Any]:
    return kill.kill({"run_dir": str(run.path), "by": "me@here", **more}, None)


def scancels(fake: FakeSlurm) -> list[list[str]]:
    return [call[1:] for call in fake.calls() if call[0] == "scancel"]


def test_a_job_that_waits_is_taken_out_of_the_queue(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    run = slurm_run(tmp_path, "a-1", (), ["7"], started=False)
    fake_slurm.jobs(queued("7"))
    with slurm_reacts(fake_slurm, lambda _: fake_slurm.jobs(queued("7", State="CANCELLED", EndTime=iso(time.time())))):
        done = ask(run)
    assert (done["state"], done["detail"], done["already"]) == ("CANCELLED", "by me@here: before it started", False)
    assert ["--state=PENDING", "7"] in scancels(fake_slurm) and ["--quiet", "7"] not in scancels(fake_slurm)
    assert json.loads((run.control / "stop").read_text())["by"] == "me@here"
    again = ask(run)
    assert (again["state"], again["already"]) == ("CANCELLED", True)


def test_a_job_that_runs_is_rung_and_may_save_and_is_gone_when_the_queue_says_so(
        fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    run = slurm_run(tmp_path, "a-1", RUNNING, ["7"])
    fake_slurm.jobs(queued("7", State="RUNNING", NodeList="gpu01"))
    let_go: list[float] = []

    def react(call: list[str]) -> None:
        assert call == ["--signal=USR2", "7"]
        write_journal(run.attempt(0).journal, KILLED)
        fake_slurm.jobs(queued("7", State="COMPLETING", NodeList="gpu01"))
        time.sleep(0.5)
        let_go.append(time.monotonic())
        fake_slurm.jobs()
        fake_slurm.past(accounted("7", "FAILED"))

    with slurm_reacts(fake_slurm, react):
        done = ask(run)
    assert let_go and time.monotonic() >= let_go[0]
    assert (done["state"], done["checkpoint_step"], done["survivors"], done["note"]) == ("CANCELLED", 9, [], "")


def test_a_job_that_starts_while_it_is_cancelled_is_asked_like_one_that_runs(
        fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    run = slurm_run(tmp_path, "a-1", (), ["7"], started=False)
    fake_slurm.jobs(queued("7"))

    def react(call: list[str]) -> None:
        if call[0] == "--state=PENDING":  # too late: scancel looked, and it was running
            fake_slurm.jobs(queued("7", State="RUNNING", NodeList="gpu01"))
        else:
            run.attempt(0).logs.mkdir(parents=True)
            write_journal(run.attempt(0).journal, KILLED)
            fake_slurm.jobs()

    with slurm_reacts(fake_slurm, react):
        done = ask(run)
    assert done["state"] == "CANCELLED" and done["checkpoint_step"] == 9
    assert ["--quiet", "7"] not in scancels(fake_slurm)


def test_a_supervisor_that_does_not_answer_leaves_it_to_slurm(
        fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "NOW_S", 1.5)
    run = slurm_run(tmp_path, "a-1", RUNNING, ["7"])
    fake_slurm.jobs(queued("7", State="RUNNING", NodeList="gpu01"))

    def react(call: list[str]) -> None:
        if call[0] == "--quiet":
            fake_slurm.jobs(queued("7", State="CANCELLED", EndTime=iso(NOW - 60)))

    with slurm_reacts(fake_slurm, react):
        done = ask(run, now=True)
    assert scancels(fake_slurm)[0] == ["--signal=USR2", "7"]
    assert (done["state"], done["detail"]) == ("CANCELLED", "by me@here: scancel")
    assert done["note"] == "its supervisor on gpu01 wrote no ending: SLURM ended it there"


def test_a_kill_between_two_runs_ends_the_requeue(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    preempted = dataclasses.replace(KILLED[-1], reason=Reason.PREEMPTED, detail="", next="requeue")
    run = slurm_run(tmp_path, "a-1", (*RUNNING, preempted), ["7"])
    fake_slurm.jobs(queued("7", RestartCnt="1", Reason="BeginTime"))
    with slurm_reacts(fake_slurm, lambda _: fake_slurm.jobs(queued("7", State="CANCELLED", RestartCnt="1"))):
        done = ask(run)
    assert (done["state"], done["detail"], done["checkpoint_step"]) == ("CANCELLED", "by me@here: scancel", 9)


def test_a_node_that_keeps_it_is_named(
        fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "NOW_S", 0.1)
    monkeypatch.setattr(cancel, "LEAVE_S", 0.3)
    run = slurm_run(tmp_path, "a-1", KILLED, ["7"])
    fake_slurm.jobs(queued("7", State="COMPLETING", NodeList="gpu01"))
    with pytest.raises(NodeFailure, match=r"SLURM still has a-1 \(COMPLETING on gpu01\)"):
        ask(run, now=True)


def test_a_controller_that_does_not_answer_is_no_success(
        fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a job that has ended is not held back for it, however long its grace is."""
    monkeypatch.setattr(cancel, "UNASKED_S", 0.1)
    run = slurm_run(tmp_path, "a-1", KILLED, ["7"])
    fake_slurm.say("squeue", Answer(stderr="slurm_load_jobs error: Unable to contact slurm controller\n", code=1))
    with pytest.raises(Unreachable, match="a-1 is CANCELLED, and whether SLURM has let go of it could not be asked"):
        ask(run, grace_s=600.0)


def test_somebody_elses_job_is_refused(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    run = slurm_run(tmp_path, "a-1", (), ["7"], started=False)
    fake_slurm.jobs(queued("7", UserID="12345", Comment="launch:a-token"))
    fake_slurm.say("scancel", Answer(stderr="scancel: error: Kill job error on job id 7: Access/permission denied\n", code=1))
    with pytest.raises(Refused, match="somebody else's job"):
        ask(run)


def test_many_are_told_with_one_call_for_each_kind(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    waiting = {f"9_{number}": slurm_run(tmp_path, f"s-{number}", (), [f"9_{number}"], started=False)
               for number in range(4)}
    run = slurm_run(tmp_path, "a-1", RUNNING, ["7"])
    running = queued("7", State="RUNNING", NodeList="gpu01")
    fake_slurm.jobs(running, *map(queued, waiting))

    def react(call: list[str]) -> None:
        if call[0] == "--quiet":
            assert sorted(call[1:]) == sorted(waiting)
            fake_slurm.jobs(running, *(queued(id, State="CANCELLED", EndTime=iso(NOW)) for id in waiting))
        else:
            write_journal(run.attempt(0).journal, KILLED)
            fake_slurm.jobs()
            fake_slurm.past(accounted("7", "FAILED"), *(accounted(id, "CANCELLED") for id in waiting))

    runs = [run, *waiting.values()]
    with slurm_reacts(fake_slurm, react):
        done = kill.kill_all({"run_dirs": [str(one.path) for one in runs], "by": "me@here"}, None)["jobs"]
    assert [one["state"] for one in done] == ["CANCELLED"] * 5, done
    assert [call[0] for call in scancels(fake_slurm)] == ["--quiet", "--signal=USR2"]


def test_one_that_is_not_ours_does_not_keep_the_others_from_their_end(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    mine, other = (slurm_run(tmp_path, f"a-{id}", (), [id], started=False) for id in ("7", "8"))
    fake_slurm.jobs(queued("7"), queued("8", UserID="12345", Comment="launch:a-token"))
    fake_slurm.say("scancel", Answer(stderr="scancel: error: Kill job error on job id 8: Access/permission denied\n", code=1))
    ended = queued("7", State="CANCELLED", EndTime=iso(NOW))
    with slurm_reacts(fake_slurm, lambda _: fake_slurm.jobs(ended, queued("8", UserID="12345", Comment="launch:a-token"))):
        done = kill.kill_all({"run_dirs": [str(mine.path), str(other.path)], "by": "me@here"}, None)["jobs"]
    assert done[0]["state"] == "CANCELLED" and "somebody else's job" in done[1]["error"]["what"]
