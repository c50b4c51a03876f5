"""The verbs as a person meets them, on the node `local`, with real supervisors."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cluster.node import environment
from launcher.index import Intent, open_index
from tests.launcher.conftest import Person, interrupt

KEYS = {"id", "name", "stage", "node", "backend", "gpus", "state", "reason", "attempt", "step", "total",
        "loss", "health", "submitted_at", "started_at", "ended_at", "last_seen_s", "run_dir"}


def test_a_stage_is_submitted_followed_and_remembered(person: Person) -> None:
    done = person.run("submit", "tick", "--follow", "--set", "steps=2")
    assert "step 1 of 2" in done.stdout and done.stdout.endswith("step 2 of 2 loss 0.5000\n")
    assert "COMPLETED" in done.stderr and "launch kill tick-" in done.stderr
    [job] = json.loads(person.run("status", "--json", "@last").stdout)
    assert KEYS <= job.keys()
    assert (job["state"], job["step"], job["total"], job["stage"]) == ("COMPLETED", 2, 2, "tick")
    assert person.run("logs").stdout == done.stdout
    assert f"{job['id']} COMPLETED" in person.run("logs", "-f").stderr
    assert person.run("logs", "--grep", "no such").stderr == "no line matches\n"
    assert person.run("logs", "-n", "1").stdout == "step 2 of 2 loss 0.5000\n"
    assert person.run("logs", "--grep", "step 1").stdout == "step 1 of 2 loss 1.0000\n"
    assert person.run("logs", "--rank", "all").stdout.startswith("[rank 0] attempt 0 in ")
    assert person.run("wait", job["id"]).stdout == ""
    assert job["id"] not in person.run("status").stdout and job["id"] in person.run("status", "--all").stdout


def test_show_names_command_config_attempts_and_why(person: Person) -> None:
    job = person.submit("tick", "--config", "failing")
    assert "the mouse ran away" in person.run("wait", job, code=1).stderr
    text = person.run("show", job).stdout
    for part in ("python tick.py config.yaml", "fail: true", "RuntimeError: the mouse ran away", "by submit"):
        assert part in text
    found = json.loads(person.run("show", job, "--json").stdout)
    assert found["state"] == "FAILED" and found["spec"]["argv"] == ["tick.py"] and len(found["attempts"]) == 1
    assert "error in the program: RuntimeError: the mouse ran away" in person.run("status", job).stdout


def test_kill_says_what_it_freed_and_can_be_asked_twice(person: Person, tmp_path: Path) -> None:
    job = person.submit("tick", "--set", f"gate={tmp_path}/gate", "--name", "쥐")
    person.until(job, lambda found: found["state"] == "RUNNING" and found["step"] == 1)
    refused = person.run("kill", "쥐", "nosuch", code=2).stderr
    assert "no such job: 'nosuch'" in refused and "nothing was stopped: 쥐 goes on as before" in refused
    said = person.run("kill", "쥐").stdout
    assert f"{job} CANCELLED" in said and "freed" in said
    assert "stopping" in person.run("logs", job).stdout
    assert "had already ended" in person.run("kill", job).stdout
    assert "goes on as before" not in person.run("kill", "쥐", "nosuch", code=2).stderr
    assert person.status(job)["state"] == "CANCELLED"


def test_restart_is_the_same_job_with_the_change_it_showed(person: Person, tmp_path: Path) -> None:
    job = person.submit("tick", "--set", f"gate={tmp_path}/gate")
    person.until(job, lambda found: found["state"] == "RUNNING")
    done = person.run("restart", job, "--set", "gate=open", "--set", "steps=5")
    assert f"gate: {tmp_path}/gate -> " in done.stderr and "steps: 3 -> 5" in done.stderr
    assert done.stdout == f"{job}\n"
    person.run("wait", job)
    found = person.status(job)
    assert (found["state"], found["attempt"], found["total"]) == ("COMPLETED", 1, 5)
    whole = person.run("logs", job, "--attempt", "all").stdout
    assert whole.startswith("attempt 0") and whole.endswith("step 5 of 5 loss 0.2000\n")
    assert person.run("logs", job, "--attempt", "0").stdout.startswith("attempt 0")


def test_an_ended_job_is_restarted_with_fresh_code(person: Person) -> None:
    job = person.submit("tick", "--config", "failing")
    person.run("wait", job, code=1)
    program = person.at / "tick.py"
    program.write_text(program.read_text().replace("raise RuntimeError", "print"))
    person.run("restart", job)
    person.run("wait", job, code=1)
    assert "fresh code" in person.run("restart", job, "--fresh-code").stderr
    person.run("wait", job)
    assert person.run("logs", job).stdout.endswith("the mouse ran away\n")


def test_fresh_code_does_not_take_the_checkpoints_along(person: Person) -> None:
    stage = person.at / "configs" / "stages" / "tick.yaml"
    stage.write_text(stage.read_text() + "resume: {glob: 'out/ckpt-*', arg: '--resume {path}'}\n")
    job = person.submit("tick")
    person.run("wait", job)
    assert "out/ckpt-*" in person.run("restart", job, "--fresh-code", code=4).stderr
    assert person.status(job)["attempt"] == 0


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_go_on(person: Person, tmp_path: Path) -> None:
    with person.start("submit", "tick", "--set", f"gate={tmp_path}/gate", "--follow") as following:
        assert following.stdout is not None
        while "step 1" not in following.stdout.readline():
            pass
        code, said = interrupt(following)
    job = json.loads(person.run("status", "--json").stdout)[0]["id"]
    assert code == 130 and "Traceback" not in said
    assert f"launch logs -f {job}" in said and f"launch kill {job}" in said
    with person.start("wait", job) as waiting:
        _ask_until_it_waits(waiting)
        code, said = interrupt(waiting)
    assert code == 130 and f"launch wait {job}" in said and "Traceback" not in said
    (tmp_path / "gate").touch()
    person.run("wait", job)


def _ask_until_it_waits(process: subprocess.Popen[str]) -> None:
    """A client that waits has a thread for the job."""
    deadline = time.monotonic() + 30
    while len(os.listdir(f"/proc/{process.pid}/task")) < 2:
        assert time.monotonic() < deadline


def test_arguments_and_names_arrive_as_they_are(person: Person) -> None:
    words = ["a'; echo foo", '"', "$HOME", "두 줄\n끝", "", "-x", "--"]
    done = person.run("submit", "--name", "이름; 'x'", "--follow", "--", "printf", "<%s>", *words)
    assert done.stdout == "".join(f"<{word}>" for word in words)
    assert person.status("이름; 'x'")["name"] == "이름; 'x'"


def test_a_command_runs_where_the_person_is(person: Person) -> None:
    (person.at / "sub").mkdir()
    subprocess.run(["git", "init", "-q", str(person.at)], check=True)
    there = Person(person.at / "sub", person.env)
    assert there.run("submit", "--follow", "--", "pwd").stdout.endswith("/code/sub\n")
    assert there.run("submit", "--follow", "--cwd", ".", "--", "pwd").stdout == f"{there.at}\n"
    there.run("submit", "--follow", "--cwd", "..", "--", "ls", "tick.py")
    shown = json.loads(there.run("show", "--json").stdout)
    assert "tick.py" in shown["code"]["untracked"]


def test_what_a_command_prints_of_its_progress_is_read_as_that_of_an_adopted_program(person: Person) -> None:
    person.run("submit", "--progress", r"step=at (\d+)", "--follow", "--", "echo", "at 7: step 12/600 loss nan")
    found = person.status("@last")
    assert (found["step"], found["total"], found["loss"]) == (7, 600, "nan")


def test_a_client_without_an_index_finds_everything_again(person: Person, tmp_path: Path) -> None:
    job = person.submit("tick", "--set", f"gate={tmp_path}/gate")
    shutil.rmtree(person.env["LAUNCH_HOME"])
    assert "--rescan" in person.run("logs", job, code=2).stderr
    assert job in person.run("status", "--rescan").stdout
    (tmp_path / "gate").touch()
    person.run("wait", job)


def test_a_damaged_index_is_rebuilt_by_the_next_status(person: Person) -> None:
    job = person.submit("tick", "--name", "mouse")
    person.run("wait", job)
    index = Path(person.env["LAUNCH_HOME"]) / "index.sqlite"
    index.write_bytes(b"\xff" * 9000)
    done = person.run("status", "--all")
    assert job in done.stdout and "was damaged" in done.stderr
    assert person.run("logs", "mouse").stdout and list(index.parent.glob("index.sqlite.damaged-*"))


def test_a_submit_whose_client_died_is_found_by_the_next_command(person: Person) -> None:
    job = person.submit("tick")
    person.run("wait", job)
    index, workdir = Path(person.env["LAUNCH_HOME"]) / "index.sqlite", person.env["LAUNCH_WORKDIR"]
    with open_index(index) as opened:
        [known] = opened.all()
        opened.forget(known)
        opened.add_intent(Intent(known.key, job, None, "local", workdir, _dead_pid(), 1.0))
        opened.add_intent(Intent("never-arrived", "tick-x", None, "local", workdir, _dead_pid(), 1.0))
    assert "cut off" in person.run("status").stderr
    with open_index(index) as opened:
        assert [found.id for found in opened.all()] == [job] and opened.intents() == []


def _dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


@pytest.mark.parametrize(("words", "code", "said"), [
    (["statsu"], 2, "nearest: status"),
    (["submit"], 2, "a stage or a command"),
    (["submit", "tik"], 2, "nearest: tick"),
    (["submit", "tick", "--node", "lokal"], 2, "nearest: local"),
    (["submit", "tick", "--config", "quik"], 2, "nearest: quick"),
    (["submit", "tick", "--set", "stepz=1"], 2, "nearest: steps"),
    (["submit", "tick", "--gpus", "99"], 2, "99 GPUs"),
    (["submit", "tick", "--gpus", "-1"], 2, "--gpus"),
    (["submit", "tick", "--gpus", "two"], 2, "--gpus: 'two' is no whole number"),
    (["submit", "tick", "--nod", "local"], 2, "nearest: --node"),
    (["submit", "python", "tick.py", "a b"], 2, "launch submit -- python tick.py 'a b'"),
    (["submit", "tick.py"], 2, "launch submit -- python tick.py"),
    (["submit", "--resume", "x", "--", "true"], 2, "--resume belongs to a stage"),
    (["submit", "tick", "--time", "soon"], 2, "no duration"),
    (["submit", "tick", "--resume", "./nothing"], 2, "no such path"),
    (["submit", "tick", "--resume", "nothing"], 2, "no such job"),
    (["submit", "tick", "--name", "@last"], 2, "begins with neither"),
    (["submit", "--cwd", "/no/such/place", "--", "true"], 2, "/no/such/place"),
    (["submit", "tick", "--", "true"], 2, "cannot be given together"),
    (["submit", "tick", "--progress", r"step=(\d+)"], 2, "belongs to a command"),
    (["submit", "--progress", r"steps=(\d+)", "--", "true"], 2, "begins with one of step="),
    (["logs"], 2, "no job is known"),
    (["logs", "--rank", "x"], 2, "--rank"),
    (["logs", "-n", "-3"], 2, "-n: "),
    (["kill"], 2, "required: JOB"),
    (["kill", "nothing"], 2, "no such job"),
    (["restart", "nothing"], 2, "no such job"),
    (["wait", "nothing"], 2, "no such job"),
    (["show", "nothing"], 2, "no such job"),
])
def test_a_mistake_is_one_message_and_leaves_nothing(
    person: Person, words: list[str], code: int, said: str,
) -> None:
    assert said in person.run(*words, code=code).stderr
    runs = Path(person.env["LAUNCH_WORKDIR"]) / "runs"
    assert not runs.exists() or not list(runs.iterdir())


def test_a_bad_cluster_file_is_named_with_its_line(person: Person) -> None:
    (person.at / "configs" / "cluster.yaml").write_text("nodes:\n  gpu05: {via: shh}\n")
    assert "cluster.yaml:2" in person.run("submit", "tick", "--node", "gpu05", code=2).stderr
    (person.at / "configs" / "cluster.yaml").unlink()


def test_a_command_of_a_stage_reads_its_config(person: Person) -> None:
    stage = person.at / "configs" / "stages" / "tick.yaml"
    stage.write_text(stage.read_text().replace("python: tick.py", "command: [tail, -n, '99']"))
    assert "steps: 7" in person.run("submit", "tick", "--set", "steps=7", "--follow").stdout


def test_an_address_that_nobody_knows_is_told_before_it_is_needed(person: Person, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"notify: [{{slack: HOOK}}, {{command: [cat]}}]\nnodes: {{local: {{via: local, workdir: {tmp_path}/w}}}}\n")
    person.env["LAUNCH_CLUSTER"] = str(cluster)
    said = person.run("submit", "--dry-run", "--", "true").stderr
    assert "slack will not be told: HOOK is not set here, and local does not know it" in said and said.count("told:") == 1
    environment.write_secrets(tmp_path / "w", {"HOOK": "http://127.0.0.1:9/none"})
    assert "told:" not in person.run("submit", "--dry-run", "--", "true").stderr


def test_a_name_is_taken_only_while_its_job_has_not_ended(person: Person, tmp_path: Path) -> None:
    job = person.submit("tick", "--name", "mouse", "--set", f"gate={tmp_path}/gate")
    assert job in person.run("submit", "tick", "--name", "mouse", code=2).stderr
    (tmp_path / "gate").touch()
    person.run("wait", "mouse")
    other = person.submit("tick", "--name", "mouse")
    person.run("wait", other)


def test_a_dry_run_says_everything_and_starts_nothing(person: Person) -> None:
    said = person.run("submit", "tick", "--set", "steps=7", "--dry-run").stdout
    assert "tick.py" in said and "steps: 7" in said and "local" in said
    assert json.loads(person.run("status", "--all", "--json").stdout) == []


def test_a_reader_that_has_seen_enough_is_no_error(person: Person) -> None:
    done = subprocess.run(["bash", "-c", f"{_launch()} --help | true; exit ${{PIPESTATUS[0]}}"],
                          cwd=person.at, env=person.env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def _launch() -> str:
    import shlex
    import sys

    return shlex.join([sys.executable, "-m", "launcher.cli"])


def test_secrets_go_to_the_job_and_into_no_file_and_no_command_line(person: Person) -> None:
    """Also not of the supervisor and its helpers: the job itself looks at every command line there is."""
    stage = person.at / "configs" / "stages" / "tick.yaml"
    look = r"""cat /proc/[0-9]*/cmdline 2>/dev/null | awk 'index($0, ENVIRON["MOUSE_KEY"]) {n++} END {print n + 0}'"""
    (person.at / "look.sh").write_text(f"echo $MOUSE_KEY | wc -c\n{look}\n")
    counts = "command: [sh, look.sh]\nsecrets: [MOUSE_KEY]"
    text = stage.read_text().replace("python: tick.py", counts).replace("default_config: quick\n", "")
    stage.write_text(text)
    value = os.urandom(9).hex()
    person.env["MOUSE_KEY"] = value
    done = person.run("submit", "tick", "--follow")
    assert done.stdout.split() == ["19", "0"]
    run_dir = Path(person.status("@last")["run_dir"])
    places = [*run_dir.rglob("*"), *Path(person.env["LAUNCH_HOME"]).rglob("*")]
    assert not any(value.encode() in path.read_bytes() for path in places if path.is_file())
