"""Starting, ending, retrying and restarting: what a person finds in the run directory afterwards."""
from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.events import AttemptStarted, Launched, Note, Reason
from cluster.node import control, process
from cluster.node.supervisor import Supervisor
from cluster.spec import JobSpec, PythonEnv, ResumeRule, RestartPolicy
from cluster.states import Completed, Failed, Restarting
from tests.helpers import wait_until
from tests.node.conftest import Job

MakeJob = Callable[..., Job]
Script = Callable[[str], str]

STEPS = """
import json, os, sys, time
attempt = os.path.join(os.environ["LAUNCH_RUN_DIR"], "attempts", f"{int(os.environ['LAUNCH_ATTEMPT']):03d}")
first, last, total = map(int, sys.argv[1:4])
with open(os.path.join(attempt, "metrics.jsonl"), "a") as file:
    for step in range(first, last + 1):
        file.write(json.dumps({"t": time.time(), "step": step, "total": total, "loss": 1 / step}) + "\\n")
sys.exit(int(sys.argv[4]))
"""


def test_a_command_runs_and_its_output_is_kept_byte_by_byte_in_order(make_job: MakeJob) -> None:
    words = ["a b", "'; echo foo", "$HOME", "line\nbreak", "한국어", "*"]
    code = "import sys\nfor word in sys.argv[1:]:\n" \
           "    sys.stdout.write(f'{word}\\r'); sys.stdout.flush(); sys.stderr.write('|')"
    job = make_job("command", sys.executable, "-c", code, *words, env={"SAID": "it's; $fine\n한"}).start()
    assert isinstance(job.ended(), Completed)
    assert job.log() == "".join(f"{word}\r|" for word in words)


def test_the_job_learns_about_its_world_from_the_environment(make_job: MakeJob, script: Script) -> None:
    source = script("import os, json; print(json.dumps(dict(os.environ)))")
    job = make_job("python", source, env={"MINE": "it's; $1\n한"})
    job.run.code.mkdir()
    job.start(RANK="3", LAUNCH_TOKEN="of another job", WORLD_SIZE="8")
    job.ended()
    env = json.loads(job.log())
    assert env["LAUNCH_RUN_DIR"] == str(job.run.path) and env["LAUNCH_TOKEN"] == job.spec.token
    assert (env["LAUNCH_JOB_ID"], env["LAUNCH_ATTEMPT"], env["LAUNCH_RESUME"]) == (job.spec.id, "0", "")
    assert env["LAUNCH_CHECKPOINT_DIR"] == str(job.run.checkpoints)
    assert env["MINE"] == "it's; $1\n한" and env["PYTHONUNBUFFERED"] == "1"
    assert env["PYTHONPATH"].split(":")[0] == env["PWD"] == str(job.run.code)
    assert "RANK" not in env and "WORLD_SIZE" not in env and "LAUNCH_PARENT" not in env


def test_no_signal_is_ignored_or_blocked_in_the_program(make_job: MakeJob) -> None:
    job = make_job("command", "grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status").start()
    job.ended()
    classic = 2**31 - 1  # the C library itself ignores two of its own beyond
    assert [int(line.split()[1], 16) & classic for line in job.log().splitlines()] == [0, 0]


@pytest.mark.parametrize(("argv", "reason", "words"), [
    (["no-such-program"], Reason.CANNOT_START, "no-such-program"),
    (["./not-here.sh"], Reason.CANNOT_START, "./not-here.sh"),
    (["sh", "-c", "echo 'error: the list has no samples' >&2; exit 2"], Reason.ERROR, "the list has no samples"),
    (["sh", "-c", "echo last words; exit 5"], Reason.ERROR, "exit code 5: last words"),
    (["sh", "-c", "kill -9 $$"], Reason.SIGNAL, "SIGKILL"),
])
def test_why_a_command_failed(make_job: MakeJob, argv: list[str], reason: Reason, words: str) -> None:
    status = make_job("command", *argv).start().ended()
    assert isinstance(status, Failed) and status.reason is reason and words in status.detail


@pytest.mark.parametrize(("fields", "words"), [
    ({"gpus": 3}, "asks for 3 GPUs, this node has 0"),
    ({"cwd": "/no/such/dir"}, "/no/such/dir"),
    ({"python": PythonEnv("venv", "/no/venv")}, "/no/venv"),
    ({"progress": {"step": "("}}, "not a regular expression"),
    ({"resume": "/no/checkpoint", "resume_rule": ResumeRule("launch")}, "/no/checkpoint"),
])
def test_what_cannot_be_started_says_why_and_starts_nothing(
        make_job: MakeJob, fields: dict, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:
    job = make_job("command", "true", **fields).start()
    status = job.ended()
    assert isinstance(status, Failed) and status.reason is Reason.CANNOT_START and words in status.detail
    assert not any(isinstance(event, Launched) for event in job.events)


def test_exit_0_before_the_last_step_is_no_success(make_job: MakeJob, script: Script) -> None:
    ours = {"resume_rule": ResumeRule("launch")}
    early = make_job("python", script(STEPS), "1", "5", "9", "0", **ours).start()
    silent = make_job("command", "true", **ours).start()
    whole = make_job("python", script(STEPS), "1", "9", "9", "0", **ours).start()
    assert early.ended().reason is Reason.BAD_EXIT and "step 5 of 9" in early.status.detail
    assert silent.ended().reason is Reason.BAD_EXIT
    assert isinstance(whole.ended(), Completed)


def test_retries_back_off_and_end_at_the_limit(make_job: MakeJob) -> None:
    job = make_job("command", "sh", "-c", "kill -9 $$", restart=RestartPolicy(2, 0.1, 0.15)).start()
    status = job.ended()
    assert isinstance(status, Failed) and "given up after 2 restarts" in status.detail
    pauses = [end.retry_at - end.t for end in job.endings if end.retry_at]
    assert pauses == pytest.approx([0.1, 0.15], abs=0.02)
    assert [event.by for event in job.events if isinstance(event, AttemptStarted)] == ["submit", "policy", "policy"]


def test_three_attempts_without_progress_are_enough(make_job: MakeJob, script: Script) -> None:
    job = make_job("python", script(STEPS.replace("sys.exit(", "os.kill(os.getpid(), 9); (")), "1", "5", "9", "0",
                   restart=RestartPolicy(50, 0.05, 0.05)).start()
    assert "3 attempts in a row made no progress" in job.ended().detail
    assert len(job.endings) == 4  # the first one made progress


def test_a_program_error_is_retried_only_after_progress(make_job: MakeJob, script: Script) -> None:
    policy = RestartPolicy(5, 0.05, 0.05)
    at_once = make_job("command", "sh", "-c", "exit 1", restart=policy).start()
    later = make_job("python", script(STEPS), "1", "5", "9", "1", restart=policy).start()
    at_once.ended(), later.ended()
    assert len(at_once.endings) == 1
    assert len(later.endings) == 2  # the second one did not get further than the first


def test_a_stop_while_it_backs_off_ends_the_job_at_once(make_job: MakeJob) -> None:
    job = make_job("command", "sh", "-c", "kill -9 $$", restart=RestartPolicy(5, 60, 60)).start()
    job.wait_for("RESTARTING")
    assert isinstance(job.status, Restarting) and job.status.until is not None
    assert job.stop().reason is Reason.KILLED


def test_a_restart_request_starts_the_next_attempt_with_the_new_spec(make_job: MakeJob) -> None:
    job = make_job("command", "sh", "-c", "trap 'exit 0' TERM; echo first; while :; do sleep 0.05; done").start()
    job.run.config.write_text("lr: 1\n")
    job.says("first")
    new = replace(job.spec, argv=("sh", "-c", "cat $LAUNCH_RUN_DIR/attempts/001/config.yaml"))
    assert job.ask(control.Restart("me@here", spec=new.to_json().decode(), config="lr: 2\n"))
    assert isinstance(job.ended(), Completed)
    first, second = job.run.attempts()
    assert job.log(attempt=1) == "lr: 2\n"
    assert JobSpec.from_json(first.spec.read_bytes()) == job.spec and JobSpec.from_json(second.spec.read_bytes()) == new
    assert [end.reason for end in job.endings] == [Reason.RESTART_ASKED, Reason.DONE]
    assert not list(job.run.control.iterdir())


def test_a_restart_also_replaces_the_code(make_job: MakeJob) -> None:
    job = make_job("command", "sh", "-c", "cat here; [ $LAUNCH_ATTEMPT = 1 ] || sleep 60")
    for place, text in ((job.run.code, "old"), (job.run.path.parent.parent / ".launch" / "code" / "abc", "new")):
        place.mkdir(parents=True)
        (place / "here").write_text(text)
    job.start().says("old")
    job.ask(control.Restart("me@here", code_digest="abc"))
    assert isinstance(job.ended(), Completed) and job.log() == "new"


def test_the_time_limit_ends_a_job_as_a_timeout(make_job: MakeJob) -> None:
    job = make_job("command", "sleep", "60", time_s=0.5).start()
    job.ended()
    assert job.state == "TIMEOUT"


def test_sigterm_to_the_supervisor_is_a_stop(make_job: MakeJob) -> None:
    saves = "trap 'echo saved; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    job = make_job("command", "sh", "-c", saves).start()
    job.says("up")
    job.supervisor.terminate()
    assert job.ended().reason is Reason.KILLED and "saved" in job.log()


def test_progress_is_read_from_a_progress_bar(make_job: MakeJob, script: Script) -> None:
    bar = script("import sys, time\nfor i in range(1, 41):\n    sys.stderr.write(f'\\r{i/40:4.0%}|##| {i}/40 [00:01<, "
                 "loss=0.{i:02d}]')\n    sys.stderr.flush(); time.sleep(0.02)\ntime.sleep(60)")
    rules = {"step": r"(\d+)/\d+ \[", "total": r"\d+/(\d+) \[", "loss": r"loss=([\d.]+)"}
    job = make_job("python", bar, progress=rules)
    job.start().says("40/40")
    job.stop()
    beat = process.read_heartbeat(job.attempt)
    assert beat is not None
    assert (beat["step"], beat["total"], beat["loss"], beat["eta_s"]) == (40, 40, 0.40, 0.0)
    assert 5 < beat["it_s"] < 60


def test_the_heartbeat_names_the_supervisor_and_memory(make_job: MakeJob, script: Script) -> None:
    job = make_job("python", script("x = bytearray(80_000_000)\nprint('up')\nimport time; time.sleep(60)")).start()
    job.says("up")
    beat = wait_until(lambda: (b := process.read_heartbeat(job.attempt)) and b["peak_rss_mb"] > 80 and b)
    assert process.alive(beat["pid"], beat["pid_started"]) and process.heard(job.attempt).alive
    job.stop(now=True)
    assert not process.heard(job.attempt).alive


def test_env_json_describes_what_the_job_ran_with(make_job: MakeJob) -> None:
    job = make_job("command", "true").start()
    job.ended()
    said = json.loads(job.attempt.env.read_bytes())
    assert said["python"].startswith("3.") and said["hostname"] == process.hostname() and said["packages"]["psutil"]


def test_a_second_supervisor_of_the_same_job_leaves_it_alone(make_job: MakeJob) -> None:
    job = make_job("command", "sleep", "60").start()
    job.wait_for("RUNNING")
    second = Job(job.run, job.spec).start()
    assert second.supervisor.wait(10) == 1
    (job.run.path / "supervisor.err").write_text("")
    assert len(job.run.attempts()) == 1 and job.stop(now=True).reason is Reason.KILLED


def test_notes_name_what_was_passed_over(make_job: MakeJob) -> None:
    job = make_job("command", "true", secrets=("WANDB_API_KEY",)).start()
    job.ended()
    assert any(isinstance(event, Note) and "WANDB_API_KEY" in event.text for event in job.events)


def test_a_signal_from_outside_is_told_apart(make_job: MakeJob) -> None:
    job = make_job("command", "sleep", "60").start()
    job.wait_for("RUNNING")
    wait_until(lambda: job.attempt.ranks.joinpath("0.json").exists())
    root = json.loads(job.attempt.ranks.joinpath("0.json").read_bytes())
    process.send((root["pid"], root["started"]), signal.SIGTERM)
    assert job.ended().reason is Reason.SIGNAL and "SIGTERM" in job.status.detail


def test_a_supervisor_whose_job_another_one_has_makes_no_attempt(
        make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also not for a moment: the other one would take it for a newer one and give way."""
    job = make_job("command", "true")
    job.run.attempt(4).path.mkdir(parents=True)
    made: list[int] = []
    monkeypatch.setattr(Supervisor, "_make", staticmethod(lambda new: made.append(new.number) or True))
    late = object.__new__(Supervisor)
    late._run, late._number = job.run, 3
    assert late._new_attempt("submit") is None and made == []
    assert "the attempt after 3 is another supervisor's" in capsys.readouterr().err
