"""Jobs on this computer, through the same questions as on any node."""
from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.backends.base import Backend
from cluster.contract import RunDir
from cluster.errors import ClusterError, NodeFailure, Refused, Unusable
from cluster.inventory import Node, local_node
from cluster.node import agent, process, submit
from cluster.spec import CodeRef, RestartPolicy
from tests.cluster.jobs import DONE, LAUNCHED, STARTED, archive, command, past_run
from tests.helpers import wait_until

AWKWARD = ["a b", "it's", 'say "x"', "$HOME;ls|cat", "line\nbreak", "생쥐", "", "-n", "*"]
SHOW_ARGUMENTS = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ["A_B"], os.environ["LAUNCH_JOB_ID"]]))
"""


def written(backend: Backend, run_dir: str, **how: Any) -> bytes:
    return b"".join(body for _, body in backend.logs(run_dir, **how))


def output(backend: Backend, run_dir: str) -> bytes:
    return written(backend, run_dir, follow=True)


def state(backend: Backend, run_dir: str) -> str:
    return backend.status([run_dir])["jobs"][0]["state"]


def at_once(times: int, action: Callable[[], None]) -> None:
    threads = [threading.Thread(target=action) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_a_person_typed_arrives_unchanged(local: Backend) -> None:
    spec = command("python3", "-c", SHOW_ARGUMENTS, *AWKWARD, name="이름; 'x'\n", env={"A_B": "c d\n'\"$e"})
    run = local.submit(spec, "a: b\n", {})
    arguments, variable, job = json.loads(output(local, run["run_dir"]))
    assert (arguments, variable, job) == (AWKWARD, "c d\n'\"$e", run["id"])
    view = local.show(run["run_dir"])
    assert view["view"]["name"] == "이름; 'x'\n" and view["view"]["state"] == "COMPLETED"
    assert view["config"] == "a: b\n" and view["spec"]["argv"][3:] == AWKWARD
    assert [event["event"] for event in view["events"]] == ["attempt_started", "launched", "attempt_ended"]
    assert view["attempts"][0]["reason"] == "done"


def test_the_same_submit_again_is_the_same_job(local: Backend) -> None:
    spec = command("sleep", "60")
    runs = [local.submit(spec, None, {}) for _ in range(2)]
    assert runs[0] == runs[1]
    assert local.find([spec.token])[0] == {"run_dir": runs[0]["run_dir"], "id": spec.id, "unasked": ""}
    assert local.find(["never-sent"])[0]["run_dir"] is None
    assert len(local.status(None)["jobs"]) == 1


def test_a_submit_sent_twice_at_once_makes_one_job(local: Backend) -> None:
    spec = command("sleep", "60")
    answers: list[dict] = []
    at_once(3, lambda: answers.append(local.submit(spec, None, {})))
    assert len(answers) == 3 and answers[0] == answers[1] == answers[2]


def test_a_taken_id_gets_another_ending(local: Backend) -> None:
    first = local.submit(command("true", id="same"), None, {})
    second = local.submit(command("true", id="same"), None, {})
    assert (first["id"], second["id"]) == ("same", "same-2")
    assert json.loads(Path(second["run_dir"], "spec.json").read_bytes())["id"] == "same-2"


def test_the_run_directory_is_private_or_the_groups(local: Backend) -> None:
    modes = [Path(local.submit(command("true", share=share), None, {})["run_dir"]).stat().st_mode & 0o7777
             for share in ("private", "group")]
    assert modes == [0o700, 0o2750]


def test_code_is_unpacked_once_and_copied_to_each_job(local: Backend) -> None:
    assert not local.prepare(code_digest="abc")["have_code"]
    packed = archive(("run.sh", b"#!/bin/sh\necho from the snapshot\n", ""), ("sub/link", None, "../run.sh"))
    spec = command("./run.sh", code=CodeRef("abc"))
    first = local.submit(spec, None, {}, packed)
    assert output(local, first["run_dir"]) == b"from the snapshot\n"
    assert local.prepare(code_digest="abc")["have_code"]
    second = local.submit(replace(spec, id="second", token="second"), None, {}, io.BytesIO())
    assert Path(second["run_dir"], "code", "sub", "link").read_text().startswith("#!/bin/sh")


def test_code_that_two_send_at_once_is_there_for_both(tmp_path: Path) -> None:
    raw = archive(("run.sh", b"true", ""))

    class Overtaken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            submit.unpack_code(tmp_path, "abc", io.BytesIO(raw), len(raw))
            return super().read(size)

    (tmp_path / ".launch").mkdir()
    assert submit.unpack_code(tmp_path, "abc", Overtaken(raw), len(raw)) == tmp_path / ".launch" / "code" / "abc"
    assert [path.name for path in (tmp_path / ".launch" / "code").iterdir()] == ["abc"]


@pytest.mark.parametrize(("packed", "words"), [
    (archive(("../out", b"x", "")), "leads out of it"), (archive(("/etc/out", b"x", "")), "leads out of it"),
    (archive(("a", None, "/tmp"), ("a/out", b"x", "")), "leads out of it"),
    (archive(("a", b"x" * 9999, ""))[:40], "whole"), (b"", "not on this node any more"),
    (b"this is no archive", "whole")],
    ids=["above it", "absolute", "through a link", "cut off", "nothing", "no archive"])
def test_a_bad_snapshot_leaves_nothing(local: Backend, packed: bytes, words: str) -> None:
    spec = command("true", code=CodeRef("abc"))
    with pytest.raises(NodeFailure, match=words):
        local.submit(spec, None, {}, packed)
    workdir = Path(local.prepare()["workdir"])
    assert list((workdir / "runs").iterdir()) == []
    assert list((workdir / ".launch" / "code").glob("*")) == []
    assert list((workdir / ".launch" / "submits").iterdir()) == []


def test_a_supervisor_that_cannot_start_leaves_nothing(local: Backend) -> None:
    broken = {"op": "submit", "workdir": local.prepare()["workdir"], "spec": asdict(command("true")),
              "config": None, "agent": ["/bin/sh", "-c", "echo no such thing >&2; exit 3"]}
    answer = agent.answer(broken, io.BytesIO())
    assert "no such thing" in answer["error"]["what"] and answer["error"]["exit_code"] == 1
    assert local.status(None) | {"t": 0} == local.status([]) | {"t": 0}
    assert local.find([broken["spec"]["token"]])[0]["id"] is None


def test_secrets_are_kept_out_of_every_file_of_the_job(local: Backend) -> None:
    spec = command("sh", "-c", 'echo "$API_KEY" | wc -c', secrets=("API_KEY",))
    run = local.submit(spec, None, {"API_KEY": "s3cr et"})
    assert output(local, run["run_dir"]).strip() == b"8"
    files = [path for path in Path(run["run_dir"]).rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"s3cr et" in path.read_bytes()]
    kept = Path(run["run_dir"]).parent.parent / ".launch" / "secrets.env"
    assert kept.stat().st_mode & 0o777 == 0o600


def test_a_kill_ends_everything_and_says_what(local: Backend) -> None:
    run = local.submit(command("sh", "-c", "sleep 70 & setsid sleep 70 & wait"), None, {})
    wait_until(lambda: state(local, run["run_dir"]) == "RUNNING")
    told = local.kill(run["run_dir"], "me@here", grace_s=5)
    assert (told["state"], told["already"], told["survivors"]) == ("CANCELLED", False, [])
    assert told["freed"]["processes"] >= 1 and "me@here" in told["detail"]
    again = local.kill(run["run_dir"], "me@here")
    assert again["already"] and again["state"] == "CANCELLED"


def test_two_people_kill_at_once_and_both_are_told(local: Backend) -> None:
    script = "trap 'sleep 0.5; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    run = local.submit(command("sh", "-c", script), None, {})
    wait_until(lambda: written(local, run["run_dir"]))
    told: list[dict] = []
    at_once(2, lambda: told.append(local.kill(run["run_dir"], "me", 10)))
    assert sorted(one["already"] for one in told) == [False, True]
    assert {one["state"] for one in told} == {"CANCELLED"}


def test_a_dead_supervisor_is_told_and_its_orphans_are_killed(local: Backend) -> None:
    """The one that ignores SIGTERM outlives its supervisor, until somebody kills the job."""
    deaf = command("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    run = local.submit(deaf, None, {})
    wait_until(lambda: written(local, run["run_dir"]))
    os.kill(run["pid"], signal.SIGKILL)
    wait_until(lambda: local.status([run["run_dir"]])["jobs"][0]["reason"])
    view = local.status([run["run_dir"]])["jobs"][0]
    assert (view["state"], view["reason"]) == ("FAILED", "supervisor lost")
    token = view["token"]
    assert process.members(None, token)
    told = local.kill(run["run_dir"], "me", grace_s=0.2)
    assert told["already"] and told["survivors"] == [] and told["freed"]["processes"] >= 1
    assert not process.members(None, token)


def test_restart_by_the_living_supervisor_and_by_a_new_one(local: Backend) -> None:
    first = command("sh", "-c", "echo one; sleep 60")
    run = local.submit(first, "lr: 1\n", {})
    wait_until(lambda: written(local, run["run_dir"]) == b"one\n")
    changed = replace(first, argv=("sh", "-c", "echo two; sleep 60"), token="of another client")
    assert local.restart(run["run_dir"], "me", grace_s=5, spec=changed, config="lr: 2\n")["attempt"] == 1
    assert local.show(run["run_dir"])["config"] == "lr: 2\n"
    wait_until(lambda: written(local, run["run_dir"], attempts="all") == b"one\ntwo\n")
    local.kill(run["run_dir"], "me")
    fresh = replace(changed, code=CodeRef("c"))
    again = local.restart(run["run_dir"], "me", code=archive(("x", b"1", "")), spec=fresh)
    assert again["attempt"] == 2 and again["pid"] != run["pid"]
    assert Path(run["run_dir"], "code", "x").read_text() == "1"
    wait_until(lambda: state(local, run["run_dir"]) == "RUNNING")
    view = local.show(run["run_dir"])["view"]
    assert (view["attempt"], view["token"]) == (2, first.token)


def test_a_job_that_fails_at_once_is_a_job_and_shows_why(local: Backend) -> None:
    spec = command("sh", "-c", "echo 'error: the data is gone' >&2; exit 2", restart=RestartPolicy(0))
    run = local.submit(spec, None, {})
    frames = list(local.logs(run["run_dir"], follow=True))
    assert frames[-1][0]["end"]["state"] == "FAILED"
    assert "the data is gone" in frames[-1][0]["end"]["detail"]


def test_broken_run_directories_are_listed_and_break_nothing(local: Backend) -> None:
    runs = Path(local.prepare()["workdir"]) / "runs"
    past_run(runs, "good", [STARTED, LAUNCHED, DONE])
    (runs / "empty").mkdir()
    broken = {"torn": '{"id": "x', "future": '{"version": 9}', "list": "[]", "thin": '{"version": 1}'}
    for name, text in broken.items():
        (runs / name).mkdir()
        (runs / name / "spec.json").write_text(text)
    (runs / "a-file").write_text("")
    answer = local.status(None)
    assert [view["id"] for view in answer["jobs"]] == ["good"]
    assert {Path(one["run_dir"]).name for one in answer["broken"]} == {"empty", *broken}
    assert answer["jobs"][0]["state"] == "COMPLETED" and answer["jobs"][0]["step"] == 7
    with pytest.raises(NodeFailure, match="cannot be read as a job"):
        local.show(str(runs / "torn"))
    with pytest.raises(Unusable, match="no run directory"):
        local.kill(str(runs / "gone"), "me")


def test_the_status_of_many_ended_jobs_reads_no_metrics(local: Backend) -> None:
    runs = Path(local.prepare()["workdir"]) / "runs"
    for number in range(300):
        run = past_run(runs, f"job-{number:03}", [STARTED, LAUNCHED, DONE])
        (run.attempt(0).metrics).symlink_to("/dev/full/nowhere")
    begun = time.process_time()
    assert len(local.status(None)["jobs"]) == 300
    assert time.process_time() - begun < 300 * 0.005
    assert local.status(None, active_only=True)["jobs"] == []


def test_a_run_by_hand_is_shown_and_left_alone(local: Backend) -> None:
    runs = Path(local.prepare()["workdir"]) / "runs"
    attempt = RunDir(runs / "phase3-by-hand-20260101").attempt(0)
    attempt.path.mkdir(parents=True)
    lines = [{"t": 5.0, "step": 0, "event": "resumed"}, {"t": 6.0, "step": 1, "total": 4, "loss": 2.5}]
    attempt.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"t": 7')
    view = local.status(None)["jobs"][0]
    assert (view["by_hand"], view["stage"], view["state"], view["step"], view["loss"]) == (
        True, "phase3", "RUNNING", 1, 2.5)
    with pytest.raises(Refused, match="by hand"):
        local.kill(view["run_dir"], "me")
    with pytest.raises(Unusable, match="by hand"):
        list(local.logs(view["run_dir"]))
    os.utime(attempt.metrics, (1.0, 1.0))
    assert local.status(None)["jobs"][0]["state"] == "FAILED"
    attempt.metrics.write_text('{"t": 6, "step": 4, "total": 4}\n')
    assert local.show(view["run_dir"])["view"]["state"] == "COMPLETED"


@pytest.mark.parametrize(("field", "value", "words"), [
    ("f_bavail", 10, "MB free"), ("f_favail", 10, "10 inodes free")])
def test_a_full_file_system_is_refused_before_anything_is_made(
        local: Backend, monkeypatch: pytest.MonkeyPatch, field: str, value: int, words: str) -> None:
    workdir = local.prepare()["workdir"]
    real = os.statvfs(workdir)
    names = ("f_bavail", "f_frsize", "f_favail", "f_files")
    room = {name: getattr(real, name) for name in names} | {field: value}
    monkeypatch.setattr(agent.os, "statvfs", lambda path: type("Room", (), room))
    with pytest.raises(Refused, match=words) as caught:
        local.submit(command("true"), None, {})
    assert caught.value.exit_code == 4 and "workdir:" in str(caught.value)
    assert local.status(None)["jobs"] == []
    assert local.submit(command("true"), None, {}, force=True)["attempt"] == 0


def test_prepare_says_what_is_wrong_with_the_environment(local: Backend, tmp_path: Path) -> None:
    from cluster.spec import PythonEnv
    here = tmp_path / "seen"
    here.write_text("x")
    answer = local.prepare(stat=[str(here), "/not/there"], python=PythonEnv("venv", "/no/venv"))
    assert "/no/venv" in answer["env_problem"]["what"]
    info = here.stat()
    assert answer["stats"] == {str(here): [info.st_ino, 1, info.st_mtime_ns], "/not/there": None}
    assert "no such directory" in local.prepare(cwd="/not/there")["env_problem"]["what"]
    with pytest.raises(Unusable, match="absolute"):
        from cluster.backends.host import HostBackend
        HostBackend(replace(local_node(), workdir="relative")).prepare()


def test_render_shows_what_would_run() -> None:
    from cluster.backends.host import HostBackend
    backend = HostBackend(Node("local", via="local", workdir="/w"))
    spec = command("jobs.phase3", "x y", kind="torchrun", procs=2, pass_config=True, id="p")
    assert backend.render(spec)[0][-5:] == [
        backend.render(spec)[0][-5], "-m", "jobs.phase3", "x y", "/w/runs/p/attempts/000/config.yaml"]
    assert "--nproc-per-node=2" in backend.render(spec)[0]
    assert backend.render(command("a", "b")) == [["a", "b"]]


def test_a_cut_off_submit_is_done_again_from_the_start(local: Backend) -> None:
    """The agent died between taking the name and starting the supervisor."""
    workdir = Path(local.prepare()["workdir"])
    spec = command("true")
    (workdir / "runs" / spec.id).mkdir()
    (workdir / ".launch" / "submits").mkdir()
    (workdir / ".launch" / "submits" / spec.token).write_text(spec.id)
    assert local.find([spec.token])[0]["id"] is None
    assert local.submit(spec, None, {})["id"] == spec.id


def test_a_spec_of_another_version_is_refused(local: Backend) -> None:
    future = asdict(command("true")) | {"version": 9}
    request = {"op": "submit", "workdir": local.prepare()["workdir"], "spec": future}
    assert agent.answer(request, io.BytesIO())["error"]["exit_code"] == 2
    with pytest.raises(ClusterError, match="no token"):
        submit.submit(request | {"spec": asdict(command("true", token="../x"))}, io.BytesIO())
