"""What a job took becomes one line beside the runs, and an estimate for the next one like it."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.contract import RunDir
from cluster.errors import Refused
from cluster.node import measured
from cluster.node.view import view_of
from cluster.spec import Cost, JobSpec
from jobs.data.toy import make
from tests.node.conftest import Job

COST = Cost("alike", steps=1000, evaluations=3, val_samples=20, checkpoints=4)
TRAINS = """
import json, os, time
def say(t, **line):
    with open(os.environ["LAUNCH_RUN_DIR"] + "/attempts/000/metrics.jsonl", "a") as file:
        file.write(json.dumps({"t": time.time() + t, **line}) + "\\n")
say(0, step=0, event="resumed")
say(2, step=0, event="eval")
for step in range(1, 6):
    say(2 + step / 2, step=step, it_s=2.0)
say(5, step=5, event="done")
open(os.environ["LAUNCH_RUN_DIR"] + "/artifacts/picture.png", "wb").write(bytes(1000))
"""


def written(*lines: dict) -> Callable[[RunDir], None]:
    def write(run: RunDir) -> None:
        run.attempt(0).path.mkdir(parents=True)
        run.attempt(0).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return write


def measure(tmp_path: Path, *lines: dict, ended_at: float, cost: Cost = COST) -> measured.Measure | None:
    run = RunDir(tmp_path / "runs" / "job")
    written(*lines)(run)
    spec = JobSpec("job", "token", "phase3", "python", ("x",), "local", cost=cost)
    return measured.measure(run, run.attempt(0), spec, 100.0, ended_at, "CPU")


def trained(accumulation: int = 1) -> list[dict]:
    """Prepared in 10 s, an evaluation takes 5 s, an update 2 s per pass but for the first, a save is in between."""
    lines = [{"t": 110.0, "step": 0, "event": "resumed"}, {"t": 115.0, "step": 0, "event": "eval"}]
    t = 115.0 + 30.0  # the first one compiles
    for step in range(1, 13):
        last = step % accumulation == 0
        lines.append({"t": t, "step": step, **({"it_s": 0.5} if last else {})})
        if last:
            lines.append({"t": t, "step": step, "event": "checkpoint"})
            t += 2.0 * accumulation
    return [*lines, {"t": lines[-1]["t"] + 5, "step": 12, "event": "eval"},
            {"t": lines[-1]["t"] + 8, "step": 12, "event": "done"}]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_evaluations_start_and_end_are_told_apart(tmp_path: Path, accumulation: int) -> None:
    lines = trained(accumulation)
    found = measure(tmp_path, *lines, ended_at=lines[-1]["t"] + 1)
    assert found and found.complete and found.steps == 12
    assert found.step_s == pytest.approx(2.0) and found.start_s == 10 and found.evaluation_s == pytest.approx(5.0)
    assert found.end_s == pytest.approx(4.0)


def test_a_job_without_steps_is_measured_as_a_whole(tmp_path: Path) -> None:
    found = measure(tmp_path, *({"t": 101.0 + step, "step": step} for step in (1, 2)),
                    {"t": 104.0, "step": 2, "event": "done"}, ended_at=105.0, cost=Cost("alike"))
    assert found and (found.start_s, found.step_s, found.end_s) == (5.0, 0.0, 0.0)
    answer = measured.expected(Cost("alike"), found)
    assert answer and answer.seconds == 5.0


@pytest.mark.parametrize("lines", [[], trained()[:4], [{"t": 1.0}, {"step": 2}]])
def test_too_little_is_no_measure(tmp_path: Path, lines: list[dict]) -> None:
    assert measure(tmp_path, *lines, ended_at=200.0) is None


def test_a_job_that_was_stopped_measures_its_steps(tmp_path: Path) -> None:
    found = measure(tmp_path, *trained()[:14], ended_at=999.0)
    assert found and not found.complete and found.step_s == pytest.approx(2.0) and found.end_s == 0


def test_what_a_whole_job_takes(tmp_path: Path) -> None:
    lines = trained()
    found = measure(tmp_path, *lines, ended_at=lines[-1]["t"] + 1)
    assert found
    found = replace(found, val_samples=2, checkpoint_bytes=100, shared_bytes=7, artifact_bytes=60)
    answer = measured.expected(COST, found)
    assert answer and answer.seconds == pytest.approx(10 + 1000 * 2 + 3 * 5 * 10 + 4)
    assert answer.disk_bytes == 4 * 100 + 7 + 60
    samples = measured.expected(replace(COST, growing=True, checkpoints=0), found)
    assert samples and samples.disk_bytes == pytest.approx(7 + 60 * 1000 / 12)
    assert measured.expected(replace(COST, steps=None), found) is None


def test_the_newest_complete_one_of_the_same_work_counts(tmp_path: Path) -> None:
    lines = trained()
    found = measure(tmp_path, *lines, ended_at=lines[-1]["t"])
    assert found and measured.newest(tmp_path, "alike") is None
    (tmp_path / ".launch").mkdir()
    said = [replace(found, job="old"), replace(found, job="new"), replace(found, job="other", work="x"),
            replace(found, job="cut", complete=False)]
    text = "".join(json.dumps(one.__dict__) + "\n" for one in said)
    measured.path_of(tmp_path).write_text('{"work": "alike", "complete": true, "of": "another version"}\n' + text + "{torn")
    newest, cut = measured.newest(tmp_path, "alike"), measured.newest(tmp_path, "x")
    assert newest and cut and (newest.job, cut.job) == ("new", "other")


def test_samples_are_counted(tmp_path: Path) -> None:
    make(tmp_path / "toy", 3, 1, 16, 0)
    assert measured.count(str(tmp_path / "toy/data_train.txt")) == {"samples": 3, "views": 6}
    assert measured.count(str(tmp_path / "gone.txt")) is None


def test_the_supervisor_measures_and_the_next_job_says_what_to_expect(make_job: Callable[..., Job],
                                                                      script: Callable[[str], str]) -> None:
    job = make_job("python", script(TRAINS), cost=replace(COST, evaluations=0))
    (job.run.path.parent.parent / ".launch").mkdir(exist_ok=True)
    job.start().ended()
    [line] = measured.path_of(job.run.path.parent.parent).read_text().splitlines()
    found = json.loads(line)
    assert (found["work"], found["job"], found["device"], found["complete"]) == ("alike", job.spec.id, "CPU", True)
    assert found["step_s"] == pytest.approx(0.5, rel=0.2) and found["artifact_bytes"] == 1000
    waiting = make_job("python", "x", cost=replace(COST, evaluations=0), submitted_at=1e12)
    view = view_of(waiting.run)
    assert view["state"] == "PENDING" and view["expected_s"] == pytest.approx(1000 * found["step_s"], abs=5)
    assert view_of(job.run)["expected_s"] is None


def test_only_calibrations_that_have_ended_are_removed(make_job: Callable[..., Job]) -> None:
    real = make_job("command", "true", cost=COST)
    short = make_job("command", "true", cost=replace(COST, calibration=True))
    ask = {"run_dirs": [str(short.run.path), str(real.run.path)]}
    for job in (real, short):
        job.start().ended()
    with pytest.raises(Refused, match=f"{real.spec.id} is no calibration"):
        measured.discard(ask, None)
    assert short.run.path.is_dir()
    short_only = measured.discard({"run_dirs": [str(short.run.path)]}, None)
    assert short_only["removed"] and not short.run.path.exists() and real.run.path.is_dir()
