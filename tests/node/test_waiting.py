"""A job that waits: for other jobs, or for its turn in a sweep; what it says meanwhile, and how it is ended."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.contract import RunDir
from cluster.events import AttemptStarted, Launched, Reason
from cluster.node import process, waiting
from cluster.node.kill import kill
from cluster.node.view import read_view
from cluster.spec import After, Group, RestartPolicy
from tests.helpers import wait_until
from tests.node.conftest import Job

MakeJob = Callable[..., Job]
GATE = "while [ ! -e %s ]; do sleep 0.02; done; exit %d"


def after(job: Job, **fields: object) -> tuple[After, ...]:
    return (After(job.spec.id, str(job.run.path), **fields),)


def waits(job: Job) -> str:
    return (process.read_heartbeat(job.attempt) or {}).get("waits") or ""


def launched(job: Job) -> float | None:
    return next((event.t for event in job.events if isinstance(event, Launched)), None)


@pytest.mark.parametrize(("code", "how", "reason"), [
    (0, {}, Reason.DONE), (0, {"any": True}, Reason.DONE), (1, {"any": True}, Reason.DONE), (1, {}, Reason.DEPENDENCY)])
def test_it_begins_when_the_other_has_ended_as_it_should(
        make_job: MakeJob, tmp_path: Path, code: int, how: dict[str, bool], reason: Reason) -> None:
    first = make_job("command", "sh", "-c", GATE % (tmp_path / "gate", code)).start()
    second = make_job("command", "true", after=after(first, **how)).start()
    wait_until(lambda: f"{first.spec.id} (RUNNING" in waits(second), what="the heartbeat says what it waits for")
    assert launched(second) is None
    (tmp_path / "gate").touch()
    status = second.ended()
    assert status.reason is reason
    if reason is Reason.DEPENDENCY:
        assert second.state == "CANCELLED" and f"{first.spec.id} FAILED" in status.detail
        assert launched(second) is None
    else:
        assert launched(second) > first.endings[-1].t
    first.ended()


def test_a_waiting_job_is_killed_at_once(make_job: MakeJob, tmp_path: Path) -> None:
    first = make_job("command", "sh", "-c", GATE % (tmp_path / "gate", 0)).start()
    second = make_job("command", "true", after=after(first)).start()
    wait_until(lambda: waits(second), what="it waits")
    begun = time.monotonic()
    answer = kill({"run_dir": str(second.run.path), "by": "me@here", "now": False}, None)
    assert time.monotonic() - begun < 3 and answer["state"] == "CANCELLED" and answer["survivors"] == []
    assert [event.reason for event in second.endings] == [Reason.KILLED] and launched(second) is None
    (tmp_path / "gate").touch()
    first.ended()
    second.ended()


def test_what_is_killed_while_it_waits_keeps_its_checkpoints(make_job: MakeJob, tmp_path: Path) -> None:
    gate = make_job("command", "sh", "-c", GATE % (tmp_path / "gate", 0)).start()
    job = make_job("command", "true", after=after(gate))
    (job.run.checkpoints / "step-00000005-a000").mkdir()
    job.run.attempt(0).path.mkdir()
    job.start("restart")
    wait_until(lambda: waits(job), what="it waits")
    job.stop()
    [start] = [event for event in job.events if isinstance(event, AttemptStarted)]
    assert start.checkpoints == ("step-00000005-a000",)
    (tmp_path / "gate").touch()
    gate.ended()


def test_its_time_begins_when_it_begins(make_job: MakeJob, tmp_path: Path) -> None:
    first = make_job("command", "sh", "-c", GATE % (tmp_path / "gate", 0)).start()
    second = make_job("command", "true", after=after(first), time_s=1.0).start()
    wait_until(lambda: waits(second), what="it waits")
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 1.2, what="longer than its time")
    (tmp_path / "gate").touch()
    assert second.ended().reason is Reason.DONE
    first.ended()


def test_one_that_is_gone_or_cannot_be_seen(make_job: MakeJob, tmp_path: Path) -> None:
    gone = After("old", str(tmp_path / "work" / "runs" / "old"))
    (tmp_path / "work" / "runs").mkdir(parents=True)
    [seen] = waiting.see([gone])
    assert waiting.judge(gone, seen).verdict.reason is Reason.DEPENDENCY
    unmounted = After("far", str(tmp_path / "mount" / "runs" / "far"))
    [seen] = waiting.see([unmounted])
    look = waiting.judge(unmounted, seen)
    assert look.verdict is None and "is not there" in look.text


@pytest.mark.parametrize(("view", "goes_on", "text"), [
    ({"state": "PENDING"}, None, "a (PENDING)"),
    ({"state": "RUNNING", "step": 120, "total": 600}, None, "a (RUNNING, step 120 of 600)"),
    ({"state": "NODE_FAIL", "revivable": True}, None, "its node was restarted"),
    ({"state": "NODE_FAIL", "revivable": False, "reason": "killed by a person", "detail": "by me"}, False, ""),
    ({"state": "COMPLETED"}, True, ""),
    ({"state": "CANCELLED", "reason": "killed by a person", "detail": "by me"}, False, ""),
])
def test_what_a_view_means(view: dict[str, object], goes_on: bool | None, text: str) -> None:
    look = waiting.judge(After("a", "/x"), view)
    assert text in look.text
    assert (look.verdict is not None) is (goes_on is False)
    assert bool(look.text) is (goes_on is None)
    if goes_on is False:
        assert look.verdict.detail == f"a {view['state']}: killed by a person: by me"


def test_so_many_points_at_a_time(make_job: MakeJob, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = f"echo start >> {log}; while [ ! -e {tmp_path}/gate-$0 ]; do sleep 0.02; done"
    points = [make_job("command", "sh", "-c", program, str(n), group=Group("job", "sweep", str(n), 4, n, 2))
              for n in range(4)]
    for point in reversed(points):
        point.start()
    wait_until(lambda: log.exists() and log.read_text().count("start") == 2, what="two run")
    wait_until(lambda: "its turn: 3 of job" in waits(points[3]), what="the last says how far it is")
    assert launched(points[2]) is None and launched(points[3]) is None
    (tmp_path / "gate-1").touch()
    wait_until(lambda: launched(points[2]), what="the next one begins")
    assert launched(points[3]) is None
    points[3].stop()
    for n in (0, 2):
        (tmp_path / f"gate-{n}").touch()
    assert [point.ended().reason for point in points] == [Reason.DONE] * 3 + [Reason.KILLED]


def test_whether_a_point_has_ended(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("command", "sh", "-c", GATE % (tmp_path / "gate", 1))
    assert not waiting.has_ended(job.run)  # it is being submitted
    job.start()
    wait_until(lambda: launched(job), what="it runs")
    assert not waiting.has_ended(job.run)
    job.supervisor.kill()
    wait_until(lambda: waiting.has_ended(job.run), what="a lost supervisor counts as an end")
    assert waiting.has_ended(RunDir(tmp_path / "nothing"))


def test_a_job_that_waits_again_has_not_ended(make_job: MakeJob, tmp_path: Path) -> None:
    """Its last attempt failed; the one that waits has written no event."""
    gate = make_job("command", "sh", "-c", GATE % (tmp_path / "gate", 0)).start()
    job = make_job("command", "false", after=after(gate, any=True))
    job.run.spec.write_bytes(replace(job.spec, after=()).to_json())
    job.start().ended()
    assert job.state == "FAILED"
    job.run.spec.write_bytes(job.spec.to_json())
    job.start("restart")
    wait_until(lambda: waits(job), what="it waits")
    view = read_view(job.run)
    assert (view["state"], view["attempt"]) == ("PENDING", 1) and gate.spec.id in view["detail"]
    assert waiting.judge(After("x", str(job.run.path)), view).text
    (tmp_path / "gate").touch()
    gate.ended()
    job.ended()


def test_one_that_goes_on_after_its_node_was_lost_waits_again(make_job: MakeJob, tmp_path: Path) -> None:
    gate = make_job("command", "sh", "-c", GATE % (tmp_path / "gate", 0)).start()
    job = make_job("command", "true", after=after(gate), restart=RestartPolicy(3)).start()
    wait_until(lambda: waits(job), what="it waits")
    job.supervisor.kill()
    job.supervisor.wait()
    job.start("policy")
    wait_until(lambda: job.attempt.number == 1 and waits(job), what="it waits again")
    assert launched(job) is None
    (tmp_path / "gate").touch()
    assert job.ended().reason is Reason.DONE
    gate.ended()
