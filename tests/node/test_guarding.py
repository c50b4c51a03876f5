"""The rules while a job runs: what they find is in the journal, and what its stage file wants is done."""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.contract import RunDir
from cluster.events import AttemptEnded, Fired, Note, Reason, StopAsked, encode
from cluster.journal import read_events
from cluster.node import guarding, rules
from cluster.spec import Guard, JobSpec
from cluster.states import Completed, Failed
from configs import schema
from configs.errors import ConfigError
from configs.load import load_stage
from launcher.errors import Wrong
from launcher.stages import Request, plan
from launcher.nodes import load_nodes
from tests.helpers import wait_until
from tests.node import conftest
from tests.node.conftest import Job

MakeJob = Callable[..., Job]
# Writes `loss` for every step at once and goes on until it is told to stop; ends by itself when the config says lr 5e-06.
TRAINS = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
run = os.environ["LAUNCH_RUN_DIR"]
attempt = os.path.join(run, "attempts", f"{int(os.environ['LAUNCH_ATTEMPT']):03d}")
with open(os.path.join(attempt, "metrics.jsonl"), "a") as file:
    for step in range(1, 151):
        file.write(json.dumps({"t": time.time() + step / 1000, "step": step, "total": 1000, "loss": LOSS,
                               "applied": step, "lr": 1e-4}) + "\\n")
config = os.path.join(attempt, "config.yaml")
while not (os.path.exists(config) and "lr: 5e-06" in open(config).read()):
    time.sleep(0.05)
"""
AT_CHANCE = TRAINS.replace("LOSS", "2.7726 + 0.001 * (step % 3)")
LEARNS = TRAINS.replace("LOSS", "3 - step / 100 + 0.01 * (step % 7)")
CONFIG = "training:\n  optimizer:\n    lr: 0.0001  # peak\n  steps: 1000\ndata: {path: x}\n"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = "from cluster.node import guarding; guarding.FIRST_S = 0.2; guarding.PAUSE_S = 0.5; guarding.SHARE = 1; "
    monkeypatch.setattr(conftest, "SUPERVISE", begin + conftest.SUPERVISE)


def fired(job: Job) -> list[tuple[str, str, str]]:
    return [(one.rule, one.severity, one.policy) for one in job.events if isinstance(one, Fired)]


def test_a_finding_is_an_event_once_and_changes_nothing_else(make_job: MakeJob, script: Callable[[str], str]) -> None:
    job = make_job("python", script(AT_CHANCE)).start()
    wait_until(lambda: fired(job), 20)
    with open(job.attempt.metrics, "a") as file:  # goes on, and is looked at again
        file.write(json.dumps({"t": time.time(), "step": 151, "total": 1000, "loss": 2.7726, "applied": 151}) + "\n")
    assert job.supervisor is not None
    memory_mb = psutil.Process(job.supervisor.pid).memory_info().rss / 2**20
    time_of_two_looks = time.monotonic() + 1.8
    wait_until(lambda: time.monotonic() > time_of_two_looks)
    assert job.state == "RUNNING" and fired(job) == [("at-chance", "error", "notify")] and memory_mb < 30
    assert job.stop().reason is Reason.KILLED
    assert not [one for one in job.events if isinstance(one, Note)]


def test_a_guard_stops_the_job_and_says_so(make_job: MakeJob, script: Callable[[str], str]) -> None:
    job = make_job("python", script(AT_CHANCE), guards=(Guard("at-chance", "checkpoint-and-stop"),)).start()
    status = job.ended()
    assert isinstance(status, Failed) and status.reason is Reason.GUARD and status.detail.startswith("guard at-chance: ")
    assert [(one.by, one.why) for one in job.events if isinstance(one, StopAsked)] == [("guard at-chance", "guard")]


def test_a_guard_starts_the_job_anew_with_other_values(make_job: MakeJob, script: Callable[[str], str]) -> None:
    anew = Guard("at-chance", "restart-with", {"training.optimizer.lr": 5e-6})
    job = make_job("python", script(AT_CHANCE), guards=(anew,))
    job.run.config.write_text(CONFIG)
    assert isinstance(job.start().ended(), Completed)
    first, second = job.endings
    assert (first.reason, first.next, second.reason) == (Reason.GUARD, "restart", Reason.DONE)
    assert job.run.config.read_text() == CONFIG.replace("0.0001  # peak", "5e-06")
    assert job.run.attempt(1).config.read_text() == job.run.config.read_text()


def test_who_learns_hears_nothing(make_job: MakeJob, script: Callable[[str], str]) -> None:
    job = make_job("python", script(LEARNS), guards=(Guard("default", "checkpoint-and-stop"),)).start()
    wait_until(lambda: job.run.attempts() and job.attempt.metrics.exists())
    two_looks = time.monotonic() + 1.8
    wait_until(lambda: time.monotonic() > two_looks)
    assert job.state == "RUNNING" and fired(job) == []
    job.stop()


def test_a_trainer_that_never_makes_a_step_stands_still(make_job: MakeJob, script: Callable[[str], str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks wait for one that never came; nobody knows its pace yet."""
    monkeypatch.setattr(conftest, "SUPERVISE", "from cluster.node import thresholds; "
                        "thresholds.STALL_FIRST_STEP_S = 1.0; " + conftest.SUPERVISE)
    waits = script("import time\nwhile True:\n    time.sleep(0.1)")
    trainer, other = (make_job("python", waits, preflight=schema) for schema in ("phase3", None))
    for job in (trainer, other):
        job.run.config.write_text("training:\n  max_steps: 5\n")
        job.start()
    wait_until(lambda: fired(trainer), 20)
    assert fired(trainer) == [("stalled", "error", "notify")]
    assert trainer.attempt.evidence.joinpath("stalled.txt").exists()
    assert fired(other) == []  # nobody says that it will ever write one
    trainer.stop(), other.stop()


def test_a_policy_holds_for_errors_and_a_restart_is_made_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "job-1")
    run.attempt(0).path.mkdir(parents=True)
    run.config.write_text(CONFIG)
    spec = JobSpec("job-1", "t", "train", "command", ("true",), "local", guards=(
        Guard("default", "log"), Guard("non-finite", "checkpoint-and-stop"), Guard("slower", "checkpoint-and-stop"),
        Guard("at-chance", "restart-with", {"training.steps": 5}), Guard("stalled", "restart-with")))
    decided = [guarding.decide(run, spec, rule, severity)[0] for rule, severity in (
        ("lr-stuck", "error"), ("non-finite", "error"), ("non-finite", "warning"), ("non-finite", "info"),
        ("slower", "warning"), ("stalled", "error"), ("at-chance", "error"))]
    assert decided == ["log", "checkpoint-and-stop", "notify", "log", "checkpoint-and-stop", "restart-with",
                       "restart-with"]
    run.config.write_text("other: 1\n")  # a person has replaced it since
    assert guarding.decide(run, spec, "at-chance", "error") == ("notify", None)
    event = Fired(1.0, "stalled", "error", "", "", "", "restart-with")
    run.attempt(0).journal.write_text(json.dumps(encode(event)) + "\n")
    assert read_events(run)[0] == [event] and guarding.decide(run, spec, "stalled", "error") == ("notify", None)


def test_a_stage_file_names_rules_there_are_and_keys_its_config_has(tmp_path: Path) -> None:
    assert set(schema.RULES) == set(rules.NAMES) - {"ended-badly", "ended-early"}
    stages = tmp_path / "configs" / "stages"
    stages.mkdir(parents=True)
    runs = tmp_path / "configs" / "runs" / "train"
    runs.mkdir(parents=True)
    (runs / "a.yaml").write_text(CONFIG.replace("data: {path: x}\n", ""))
    head = "about: x\ncommand: [python, train.py]\ndefault_config: a\n"

    def planned(guards: str) -> tuple[Guard, ...]:
        (stages / "train.yaml").write_text(f"{head}guards: {guards}\n")
        return plan(Request(tmp_path, "train"), load_nodes(tmp_path)["local"]).spec.guards

    assert planned("{default: log, at-chance: {restart-with: {set: {training.optimizer.lr: 5e-6}}}}") == (
        Guard("default", "log"), Guard("at-chance", "restart-with", {"training.optimizer.lr": 5e-6}))
    assert planned("{stalled: {restart-with: {}}}") == (Guard("stalled", "restart-with"),)
    with pytest.raises(Wrong, match="training.optimizer.rate"):
        planned("{at-chance: {restart-with: {set: {training.optimizer.rate: 1}}}}")
    for wrong in ("{at-chanse: log}", "{at-chance: stop}"):
        (stages / "train.yaml").write_text(f"{head}guards: {wrong}\n")
        with pytest.raises(ConfigError):
            load_stage("train", tmp_path)


def test_a_job_tells_its_spec_with_guards_as_it_was() -> None:
    spec = JobSpec("j", "t", "s", "command", ("true",), "local", guards=(Guard("at-chance", "restart-with", {"a.b": 1}),))
    assert JobSpec.from_json(spec.to_json()) == spec
    ended = AttemptEnded(1.0, Reason.GUARD, "", 0, None, None, None, "end", None)
    assert encode(ended)["reason"] == "stopped by a guard"
