"""Who is told what became of a job: by the node itself, at least once, without a secret in any file."""
from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import RunDir
from cluster.events import AttemptEnded, AttemptStarted, Fired, Launched, Reason, encode
from cluster.node import environment, notify, untold, view, webhook
from cluster.spec import JobSpec, RestartPolicy, Tell
from configs.errors import ConfigError
from launcher.nodes import load_nodes
from launcher.submit import secret_values
from tests.helpers import wait_until
from tests.node.conftest import Job
from tests.node.scheduled import iso, queued, slurm_run, started_on
from tests.slurm.fake import FakeSlurm

MakeJob = Callable[..., Job]
KEY = "a-very-secret-path"
PASSWORD = "hunter2-of-the-job"


class Server(ThreadingHTTPServer):
    """Answers with `answers`, one after the other, then 200; `slow_s` before each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[int] = []
        self.slow_s = 0.0
        self.heard: list[dict[str, Any]] = []  # that were answered with 200
        self.asked = 0
        self.going_on = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{KEY}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        self.server.going_on.wait(self.server.slow_s)
        code = self.server.answers.pop(0) if self.server.answers else 200
        if code == 200:
            self.server.heard.append(said)
        try:
            self.send_response(code)
            if code == 301:
                self.send_header("Location", self.server.url)
            self.end_headers()
        except BrokenPipeError:  # who asked has not waited
            pass

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.going_on.set()
        found.shutdown()
        thread.join()


def workdir(job: Job) -> Path:
    return job.run.path.parent.parent


def knows(job: Job, **secrets: str) -> None:
    environment.write_secrets(workdir(job), secrets)


def no_secret_in(job: Job) -> None:
    """In no file below the workdir but the one for secrets."""
    for path in workdir(job).rglob("*"):
        if path.is_file() and path != environment.secrets_file(workdir(job)):
            assert KEY.encode() not in path.read_bytes(), path


def ended_run(tmp_path: Path, *events: Any, notify_by: tuple[Tell, ...], detail: str = "") -> tuple[RunDir, JobSpec]:
    """A job of two events whose supervisor is gone."""
    run = RunDir(tmp_path / "runs" / "job-1")
    run.attempt(0).path.mkdir(parents=True)
    spec = JobSpec("job-1", "t", "train", "command", ("true",), "gpu05", name="mice", secrets=("PASSWORD",),
                   notify=notify_by)
    run.spec.write_bytes(spec.to_json())
    now = time.time()
    told = [AttemptStarted(now, 0, "submit", os.uname().nodename, "boot", 1, 1.0, (), None, None), *events,
            AttemptEnded(now, Reason.ERROR, detail or "IndexError", 1, 7, None, None, "end", None)]
    run.attempt(0).journal.write_text("".join(json.dumps(encode(one)) + "\n" for one in told))
    return run, spec


def test_the_end_is_told_though_the_server_fails_first(make_job: MakeJob, server: Server) -> None:
    server.answers = [500]
    job = make_job("command", "true", notify=(Tell("webhook", "HOOK"),))
    knows(job, HOOK=server.url)
    began = time.monotonic()
    job.start().ended()
    assert [(one["kind"], one["job"], one["reason"]) for one in server.heard] == [("end", job.spec.id, "done")]
    assert server.asked == 2 and time.monotonic() - began > notify.PAUSE_S
    tries = [json.loads(line) for line in job.run.notified.read_text().splitlines()]
    assert [one["problem"] for one in tries] == ["webhook: HTTP 500 Internal Server Error", ""]
    assert not list(notify.marks(workdir(job)).iterdir())
    no_secret_in(job)


def test_a_slow_server_keeps_no_job_waiting_and_is_told_in_the_end(
        make_job: MakeJob, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.slow_s = 30.0
    job = make_job("command", "sh", "-c", 'test -e "$LAUNCH_RUN_DIR/tried" && exit 0; touch "$LAUNCH_RUN_DIR/tried"; '
                   "kill -9 $$", restart=RestartPolicy(1, 0.1, 0.1), notify=(Tell("slack", "HOOK"),))
    knows(job, HOOK=server.url)
    began = time.monotonic()
    job.start()
    wait_until(lambda: server.asked and job.state == "COMPLETED", 10)
    assert time.monotonic() - began < 5
    server.going_on.set()
    job.ended()
    texts = [one["text"] for one in server.heard]
    assert "killed by a signal from outside" in texts[0] and "started again by itself" in texts[0]
    assert f"{job.spec.id} on local: completed" in texts[-1]


def test_what_a_lost_supervisor_could_not_tell_the_next_command_has_told(
        make_job: MakeJob, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("command", "sleep", "600", notify=(Tell("discord", "HOOK"),))
    job.start().wait_for("RUNNING")
    assert job.supervisor is not None
    job.supervisor.kill()
    job.supervisor.wait()
    wait_until(lambda: not job.members())
    assert untold.catch_up(workdir(job)) == []  # begins, detached: HOOK is not known yet
    problem = "discord: the secret HOOK is not known on this node"
    wait_until(lambda: job.run.notified.exists() and problem in job.run.notified.read_text())
    assert problem in untold.catch_up(workdir(job))[0] and problem in untold.catch_up(workdir(job), {"discord HOOK"})[0]
    assert untold.catch_up(workdir(job), {"slack HOOK"}) == []  # it stands in nobody's cluster.yaml any more
    knows(job, HOOK=server.url)
    monkeypatch.setattr(untold, "_AGAIN_S", 0.0)
    wait_until(lambda: untold.catch_up(workdir(job)) is not None and server.heard, 15)
    assert "supervisor lost" in server.heard[0]["content"]
    wait_until(lambda: not list(notify.marks(workdir(job)).iterdir()))
    no_secret_in(job)


def test_a_supervisor_that_was_lost_is_told_of_by_the_next(make_job: MakeJob, server: Server) -> None:
    """As soon as that lives, not with its own first event."""
    job = make_job("command", "sleep", "600", notify=(Tell("webhook", "HOOK"),))
    knows(job, HOOK=server.url)
    job.start().wait_for("RUNNING")
    assert job.supervisor is not None
    job.supervisor.kill()
    job.supervisor.wait()
    wait_until(lambda: not job.members())
    job.start("restart").wait_for("RUNNING")
    (said,) = wait_until(lambda: server.heard)
    assert (said["id"], said["kind"], said["reason"]) == (f"{job.spec.id}/000.lost", "failure", "supervisor lost")
    job.stop()
    assert [one["kind"] for one in server.heard] == ["failure", "end"]


def test_a_node_that_was_lost_is_a_failure_also_when_the_scheduler_goes_on(tmp_path: Path) -> None:
    run, spec = ended_run(tmp_path, Launched(2.0, ("true",), (), 7), notify_by=(Tell("slack", "HOOK"),))
    lines = run.attempt(0).journal.read_text().splitlines(keepends=True)
    run.attempt(0).journal.write_text("".join(lines[:-1]))
    run.attempt(1).path.mkdir()
    again = AttemptStarted(time.time(), 1, "scheduler", "gpu02", "boot", 2, 1.0, (), None, 40)
    run.attempt(1).journal.write_text(json.dumps(encode(again)) + "\n")
    run.attempt(2).path.mkdir()  # has only begun
    (said,) = notify.messages(run, spec)
    assert said.kind == "failure" and said.text.endswith(
        "node lost: it wrote no ending; checkpoint at step 40; it is started again by itself")


def test_what_nobody_could_tell_of_a_job_that_slurm_lost_its_login_node_tells(
        fake_slurm: FakeSlurm, tmp_path: Path, server: Server) -> None:
    """No supervisor here can say that it lives or does not: it was silent for long, and SLURM knows."""
    run = slurm_run(tmp_path, "a-1", (started_on("7"), Launched(time.time() - 299, ("true",), (), 6)), ["7"],
                    beat_age_s=90, notify=(Tell("webhook", "HOOK"),))
    fake_slurm.jobs(queued("7", State="NODE_FAIL", NodeList="gpu01", EndTime=iso(time.time() - 80)))
    environment.write_secrets(tmp_path, {"HOOK": server.url})
    notify.mark(run)
    answer = view.status({"workdir": str(tmp_path), "jobs": [str(run.path)]}, None)
    assert answer["jobs"][0]["untold"] is True
    (said,) = wait_until(lambda: server.heard)
    assert (said["kind"], said["reason"], said["detail"]) == ("failure", "node lost", "on gpu01")
    wait_until(lambda: not notify.marked(run))
    assert view.status({"workdir": str(tmp_path), "jobs": [str(run.path)]}, None)["jobs"][0]["untold"] is False


def test_what_is_told_on_a_full_disk_is_told_once(
        tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = ended_run(tmp_path, notify_by=(Tell("webhook", "HOOK"),))
    environment.write_secrets(tmp_path, {"HOOK": server.url})

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(notify, "open", full, raising=False)
    assert notify.deliver(str(run.path)) == {"left": 0, "problem": "", "unwritten": 1, "begun": True}
    assert len(server.heard) == 1


@pytest.mark.parametrize("address", ["http://mina:hunter2@127.0.0.1:1/x", f"http://127.0.0.1:1/a b/{KEY}",
                                     f"http://127.0.0.1:1/{KEY}\n", "http://127.0.0.1:port-hunter2/"])
def test_an_address_that_cannot_be_asked_is_not_quoted(address: str) -> None:
    problem = webhook.post("webhook", address, b"{}", 5.0)
    assert problem.startswith("webhook: ") and "hunter2" not in problem and KEY not in problem


def test_a_redirect_is_a_failure_for_what_is_told_would_not_arrive(server: Server) -> None:
    server.answers = [301]
    assert webhook.post("webhook", server.url, b"{}", 5.0) == "webhook: HTTP 301 Moved Permanently"


def test_of_an_address_no_part_is_told() -> None:
    said = f"POST /services/{KEY} HTTP/1.1 by mina:hunter2"
    assert notify.redacted(said, [f"https://mina:hunter2@hooks.example.org/services/{KEY}"]) == "POST /*** HTTP/1.1 by ***"


def test_a_command_gets_all_of_it_on_stdin_and_secrets_are_cut_out(tmp_path: Path) -> None:
    heard = tmp_path / "heard.json"
    tell = Tell("command", command=(sys.executable, "-c", f"import sys; open({str(heard)!r}, 'a').write(sys.stdin.read())"),
                on=("failure", "stall"))
    fired = [Fired(time.time(), rule, "error", f"its words hold {PASSWORD}", "a hang", "launch kill job-1", policy)
             for rule, policy in (("stalled", "notify"), ("at-chance", "notify"), ("stalled", "log"))]
    run, _ = ended_run(tmp_path, *fired, notify_by=(tell,), detail=f"login with {PASSWORD} failed")
    environment.write_secrets(tmp_path, {"PASSWORD": PASSWORD})
    assert notify.deliver(str(run.path)) == {"left": 0, "problem": "", "unwritten": 0, "begun": True}
    said = heard.read_text()
    assert PASSWORD not in said and "login with *** failed" in said
    first, second = (json.loads(part) for part in said.replace("}{", "}\n{").splitlines())
    assert (first["kind"], first["rule"], second["kind"]) == ("stall", "stalled", "failure")
    assert second["text"].startswith("mice (job-1) on gpu05: error in the program: login")
    notify.deliver(str(run.path))
    assert heard.read_text() == said  # nothing twice


def test_a_command_that_hangs_is_ended_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "ONE_S", 0.5)
    run, _ = ended_run(tmp_path, notify_by=(Tell("command", command=("sh", "-c", "sleep 600 & sleep 600")),))
    answer = notify.deliver(str(run.path))
    assert answer["left"] == 1 and "no answer in 0.5 s" in answer["problem"]


def test_cluster_yaml_says_who_is_told_at_the_top_or_for_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("notify: [{slack: LAB}]\nnodes:\n  a: {via: ssh}\n  b: {via: ssh, notify: []}\n"
                       "  c: {via: ssh, notify: [{command: [tell, me], on: [stall]}]}\n")
    monkeypatch.setenv("LAUNCH_CLUSTER", str(cluster))
    found = {name: node.notify for name, node in load_nodes(tmp_path).items()}
    top = (Tell("slack", "LAB"),)
    assert found == {"local": top, "a": top, "b": (), "c": (Tell("command", "", ("tell", "me"), ("stall",)),)}
    monkeypatch.setenv("LAB", f"https://hooks.example.org/{KEY}")
    spec = JobSpec("j", "t", "train", "command", ("true",), "a", notify=top)
    assert secret_values(spec) == {"LAB": f"https://hooks.example.org/{KEY}"} and KEY not in spec.to_json().decode()
    cluster.write_text("notify: [{slack: 'https://hooks.example.org/x'}]\n")
    with pytest.raises(ConfigError, match="slack"):
        load_nodes(tmp_path)
