"""Tables and sentences that a person reads."""
from __future__ import annotations

import time
from dataclasses import replace

from launcher import views
from launcher.jobs import JobStatus

JOB = JobStatus(
    id="phase3-7kq2x9", name=None, stage="phase3", node="gpu05", backend="host", gpus=("GPU-1", "GPU-2"),
    state="RUNNING", reason=None, attempt=0, step=120, total=1000, loss=0.0123456, health=None,
    submitted_at=1000.0, started_at=1001.0, ended_at=None, last_seen_s=0.1,
    run_dir="/w/runs/phase3-7kq2x9", it_s=2.5, eta_s=352.0)


def test_a_running_job_shows_progress_and_speed() -> None:
    titles, line = views.status_table([JOB], now=1250.0).split("\n")
    assert titles.split() == ["id", "stage", "node", "gpus", "state", "step", "loss", "it/s", "eta", "age"]
    assert line.split() == ["phase3-7kq2x9", "phase3", "gpu05", "2", "RUNNING", "120/1000", "0.01235", "2.5",
                            "5", "min", "4", "min"]


def test_an_ended_job_says_why_and_where_it_can_go_on() -> None:
    job = replace(JOB, state="OUT_OF_MEMORY", reason="out of GPU memory",
                  detail="tried to allocate 2 GiB\nsecond line", checkpoint_step=100, ended_at=1100.0)
    table = views.status_table([job], now=1250.0)
    assert "out of GPU memory: tried to allocate 2 GiB; checkpoint at step 100" in table


def test_a_node_that_could_not_be_asked_leaves_the_state_and_gives_the_age() -> None:
    line = views.status_table([replace(JOB, last_seen_s=250.0, stale=True)], now=1250.0)
    assert "RUNNING" in line and "last seen 4 min ago" in line


def test_columns_line_up_under_korean_names() -> None:
    jobs = [replace(JOB, name=name) for name in ("생쥐 얼굴", "mouse")]
    lines = views.status_table(jobs, now=1250.0).split("\n")
    places = [views.width(line[:line.index("phase3 ")]) for line in lines[1:]]
    assert places[0] == places[1] == views.width(lines[0][:lines[0].index("stage")])


def test_a_narrow_terminal_loses_columns_but_never_id_state_or_reason() -> None:
    job = replace(JOB, state="FAILED", reason="error in the program", detail="x" * 300, name="a long name")
    for columns in (60, 80, 100, 140):
        lines = views.status_table([job], columns, now=1250.0).split("\n")
        assert max(map(views.width, lines)) <= columns
        assert job.id in lines[1] and "FAILED" in lines[1] and "error in the" in lines[1]


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    table = views.status_table([replace(JOB, name="a\x1b[2Jb\nc")], now=1250.0)
    assert "\x1b" not in table and len(table.split("\n")) == 2


def test_a_job_in_the_queue_of_a_scheduler_says_where_it_stands_and_when_it_may_start() -> None:
    now = time.mktime((2026, 11, 21, 9, 0, 0, 0, 0, -1))
    queue = {"starts_at": now + 5 * 3600 + 20 * 60}
    job = replace(JOB, state="PENDING", detail="Priority, 3rd of 17", queue=queue, place="lab:gpu", submitted_at=now)
    line = views.status_table([job], now=now).split("\n")[1]
    assert "lab:gpu" in line and line.endswith("Priority, 3rd of 17, starts ~14:20")
    assert views.why(replace(job, reason="preempted"), now) == \
        "requeued (preempted): Priority, 3rd of 17, starts ~14:20"
    assert views.why(replace(job, detail="", queue={"starts_at": now + 86400}), now) == "starts ~Sun 09:00"
    assert views.starts(replace(job, queue={"starts_at": now + 9 * 86400}), now) == "starts ~2026-11-30"
    assert views.starts(replace(job, queue={"starts_at": now - 1}), now) == ""
    assert views.starts(replace(job, state="RUNNING"), now) == ""


def test_a_silent_supervisor_is_said_beside_the_state() -> None:
    assert views.why(replace(JOB, detail="no heartbeat for 90 s"), 1250.0) == "no heartbeat for 90 s"


def test_ages_read_like_a_person_says_them() -> None:
    assert [views.age(s) for s in (0, 59, 60, 250, 3600, 47 * 3600, 72 * 3600)] == [
        "0 s", "59 s", "1 min", "4 min", "1 h", "47 h", "3 d"]


def test_a_cut_never_splits_a_wide_character() -> None:
    assert views.cut("생쥐얼굴", 5) == "생쥐…"
    assert views.cut("mouse", 5) == "mouse"
