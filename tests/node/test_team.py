"""A job on several nodes: its supervisors meet, start together, stop together, and miss each other."""
from __future__ import annotations

import errno
import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import RunDir
from cluster.events import AttemptStarted, Reason
from cluster.journal import read_journal
from cluster.node import link as links
from cluster.node import control, lease, parts, process, team
from cluster.spec import RestartPolicy
from tests.helpers import wait_until
from tests.node.cards import Cards
from tests.node.conftest import Job

MEMBER = "import sys; from pathlib import Path; from cluster.node.member import main; " \
         "sys.exit(main(Path(sys.argv[2]), int(sys.argv[4])))"


# --- one connection -----------------------------------------------------------------------------------------

@pytest.fixture
def pair() -> Iterator[tuple[links.Link, links.Link]]:
    """Node 0's end and that of node 1."""
    leader, member = meet("secret", "secret")
    assert isinstance(leader, links.Link) and isinstance(member, links.Link)
    yield leader, member
    leader.close()
    member.close()


def meet(leaders: str, members: str) -> tuple[links.Link | Exception, links.Link | Exception]:
    """Both sides of a handshake with these tokens."""
    found: list[links.Link | Exception] = []
    ours, theirs = tcp_pair()

    def receive() -> None:
        try:
            found.append(links.receive_member(ours, leaders))
        except (OSError, links.NotOurs) as error:
            ours.close()
            found.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        member: links.Link | Exception = links.greet_leader(theirs, members, {"node": 1, "t": time.time()})
    except (OSError, links.NotOurs) as error:
        theirs.close()
        member = error
    thread.join()
    return found[0], member


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        return server.accept()[0], theirs


def said(one: links.Link) -> list[dict[str, Any]]:
    return wait_until(one.received, 5, "a message")


def test_messages_arrive_in_order_and_whole(pair: tuple[links.Link, links.Link]) -> None:
    leader, member = pair
    assert leader.peer["node"] == 1 and leader.address == "127.0.0.1"
    big = "x" * 300_000
    leader.send({"do": "prepare", "text": big})
    leader.send({"do": "start"})
    got: list[dict[str, Any]] = []
    wait_until(lambda: len(got) == 2 or got.extend(member.received()), 5, "both")
    assert got == [{"do": "prepare", "text": big}, {"do": "start"}]
    member.send({"is": "ended"})
    assert said(leader) == [{"is": "ended"}]
    assert leader.received() == [] and not leader.lost


def test_what_was_said_before_the_connection_broke_is_heard() -> None:
    class Breaking(socket.socket):
        broken = False

        def send(self, *given: Any) -> int:
            if self.broken:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().send(*given)

    ours, plain = tcp_pair()
    theirs = Breaking(plain.family, plain.type, plain.proto, plain.detach())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(links.receive_member, ours, "secret")
        member = links.greet_leader(theirs, "secret", {"node": 1})
        leader = waiting.result()
    theirs.broken = True
    member.send({"is": "ended"})
    leader.send({"do": "over"})
    leader.close()
    assert said(member) == [{"do": "over"}]
    wait_until(lambda: member.lost, 5, "the loss")
    member.close()


def test_who_does_not_know_the_token_is_not_let_in() -> None:
    leader, member = meet("secret", "guess")
    assert isinstance(leader, Exception) and isinstance(member, Exception)
    assert "does not know the job's token" in str(member)


def test_the_token_is_not_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    whole = links._write_line
    monkeypatch.setattr(links, "_write_line", lambda c, m: (sent.append(json.dumps(m).encode()), whole(c, m))[1])
    leader, member = meet("a-token-nobody-may-see", "a-token-nobody-may-see")
    assert isinstance(leader, links.Link) and isinstance(member, links.Link)
    assert len(sent) == 3 and not any(b"a-token-nobody-may-see" in line for line in sent)
    leader.close()
    member.close()


def test_silence_is_a_loss(pair: tuple[links.Link, links.Link], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "BEAT_S", 60.0)
    monkeypatch.setattr(links, "SILENT_S", 0.3)
    leader, member = pair
    leader.send({})  # wakes it
    wait_until(lambda: leader.lost and member.lost, 5, "lost")
    assert {leader.lost, member.lost} <= {"nothing heard for 0.3 s", "the connection was closed"}


def test_a_beating_link_lives(pair: tuple[links.Link, links.Link], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "BEAT_S", 0.05)
    monkeypatch.setattr(links, "SILENT_S", 0.5)
    for one in pair:
        one.send({"wake": 1})
    until = time.monotonic() + 1.2
    wait_until(lambda: time.monotonic() > until, 5)
    assert not pair[0].lost and not pair[1].lost


def test_a_closed_end_is_seen_at_once(pair: tuple[links.Link, links.Link]) -> None:
    leader, member = pair
    member._connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: leader.lost, 2, "lost")
    assert leader.lost == "the connection was closed"


@pytest.mark.parametrize("garbage", [b"\n", b"{}\n", b"x" * 33 + b" {}\n", b"GET / HTTP/1.1\r\n"])
def test_what_is_not_signed_ends_the_link(pair: tuple[links.Link, links.Link], garbage: bytes) -> None:
    leader, member = pair
    member._connection.send(garbage)
    wait_until(lambda: leader.lost, 2, "lost")
    assert leader.received() == []


@pytest.mark.parametrize("garbage", [b"", b"\n", b"[]\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 10_000])
def test_a_stranger_is_turned_away(garbage: bytes) -> None:
    ours, theirs = tcp_pair()
    with ours, theirs:
        theirs.sendall(garbage)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises((links.NotOurs, OSError)):
            links.receive_member(ours, "secret")


# --- two supervisors on this machine as two nodes ---------------------------------------------------------------

class Node:
    """The supervisor of another node of a job."""

    def __init__(self, job: Job, number: int = 1) -> None:
        self.job, self.number = job, number
        with open(job.run.path / "supervisor.err", "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", MEMBER, "supervise", str(job.run.path), "--node", str(number)], cwd="/",
                stdin=subprocess.DEVNULL, stderr=errors, env=dict(os.environ), start_new_session=True)

    @property
    def reasons(self) -> list[Reason]:
        journals = [read_journal(self.job.run.attempt(one.number, self.number).journal)[0]
                    for one in self.job.run.attempts()]
        return [event.reason for events in journals for event in events if hasattr(event, "reason")]


@pytest.fixture
def two_nodes(make_job: Callable[..., Job]) -> Iterator[Callable[..., tuple[Job, Node]]]:
    started: list[Node] = []

    def make(kind: str, *argv: str, **fields: Any) -> tuple[Job, Node]:
        job = make_job(kind, *argv, **{"nodes": 2, "hosts": ("gpu01", "gpu02"), **fields}).start()
        started.append(Node(job))
        return job, started[0]

    yield make
    for node in started:
        node.process.kill()
        node.process.wait()


def left(job: Job) -> list[process.Proc]:
    return [one for node in (0, 1) for one in process.members(None, job.spec.token_on(node))]


def test_a_command_runs_on_both(two_nodes: Callable[..., tuple[Job, Node]]) -> None:
    job, node = two_nodes("command", "sh", "-c", "echo $NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT")
    assert job.ended().reason is Reason.DONE
    assert node.process.wait(10) == 0
    assert job.log(0).split()[:3] == ["0", "of", "2"] and job.log(1).split()[:3] == ["1", "of", "2"]
    assert job.log(0).split()[-1] == job.log(1).split()[-1], "one address for both"
    (start,) = (event for event in job.events if isinstance(event, AttemptStarted))
    assert len(start.nodes) == 2
    assert not job.run.team.exists() and node.reasons == [Reason.DONE]


def test_each_node_leases_its_gpus_for_all_attempts(cards: Cards, two_nodes: Callable[..., tuple[Job, Node]],
                                                    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", cards.path)
    holder = make_job("command", "sleep", "60", gpus=3).start()
    wait_until(lambda: len(lease.holders().keys() & {*cards.uuids}) == 3, 15, "three taken")
    job, node = two_nodes("command", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exec sleep 60", gpus=1)
    both = [f"gpu02 GPU 0: root job {holder.spec.id} pid", f"root job {job.spec.id} pid"]  # this host is both nodes

    def waits() -> str:
        return ((process.read_heartbeat(job.attempt) or {}).get("waits") or "").replace(getpass.getuser(), "root")

    wait_until(lambda: all(text in waits() for text in both), 15, f"{both} in {waits()}")
    holder.stop(now=True)
    job.says("GPU-", 0), job.says("GPU-", 1)
    before = [job.log(rank) for rank in (0, 1)]
    assert before[0] != before[1] and {*map(str.strip, before)} <= {*cards.uuids}
    job.ask(control.Restart("me@here"))
    wait_until(lambda: len(job.run.attempts()) == 2, 15, "the second attempt")
    job.says("GPU-", 0), job.says("GPU-", 1)
    assert [job.log(rank) for rank in (0, 1)] == before
    job.stop(now=True)
    assert node.process.wait(10) == 1 and not lease.holders().keys() & {*cards.uuids}


def test_one_world(two_nodes: Callable[..., tuple[Job, Node]], script: Callable[[str], str]) -> None:
    job, node = two_nodes("torchrun", script(ALL_REDUCE), procs=2)
    assert job.ended(90).reason is Reason.DONE, job.log(0)
    assert [job.log(rank).splitlines()[-1] for rank in range(4)] == [f"rank {rank} of 4: 10.0" for rank in range(4)]
    assert node.process.wait(10) == 0


def test_both_are_told_to_stop(two_nodes: Callable[..., tuple[Job, Node]]) -> None:
    job, node = two_nodes("command", "sh", "-c", "trap 'echo told; exit 0' TERM; echo up; while :; do sleep 0.1; done")
    job.says("up", 0)
    job.says("up", 1)
    assert job.stop(grace_s=20).reason is Reason.KILLED
    assert node.process.wait(10) == 1
    assert "told" in job.log(0) and "told" in job.log(1)
    assert left(job) == []


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_anywhere_ends_it_everywhere(two_nodes: Callable[..., tuple[Job, Node]], failing: int) -> None:
    line = f"echo up; if [ $NODE_RANK = {failing} ]; then echo 'error: broken on purpose' >&2; exit 7; fi; sleep 600"
    job, node = two_nodes("command", "sh", "-c", line)
    ended = job.ended(40)
    assert ended.reason is Reason.ERROR and "broken on purpose" in ended.detail
    assert ("gpu02" in ended.detail) == (failing == 1)
    node.process.wait(10)
    assert left(job) == []


def test_a_lost_node_is_named_and_waited_for(two_nodes: Callable[..., tuple[Job, Node]]) -> None:
    job, node = two_nodes("command", "sh", "-c", "echo attempt $LAUNCH_ATTEMPT; exec sleep 600",
                          restart=RestartPolicy(3, 0.1, 0.4))
    job.says("attempt 0", 1)
    os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait()
    wait_until(lambda: job.endings, 30, "the attempt's end")
    assert job.endings[0].reason is Reason.NODE_LOST and "gpu02" in job.endings[0].detail
    assert job.endings[0].next == "retry"
    beat = wait_until(lambda: (b := process.read_heartbeat(job.attempt)) and b.get("missing") and b, 20, "it waits")
    assert beat["missing"] == ["gpu02"] and "gpu02 (lost" in beat["waits"]
    again = Node(job)
    try:
        wait_until(lambda: "attempt 1" in job.log(1), 30, "it goes on")
        job.stop(now=True)
    finally:
        again.process.kill()
        again.process.wait()


def test_a_lost_leader_ends_the_other_part(two_nodes: Callable[..., tuple[Job, Node]]) -> None:
    job, node = two_nodes("command", "sh", "-c", "echo up; exec sleep 600")
    job.says("up", 0)
    job.says("up", 1)
    assert job.supervisor
    job.supervisor.kill()
    wait_until(lambda: node.reasons, 25, "the part's end")
    assert node.reasons == [Reason.NODE_LOST]
    job.supervisor.wait()
    job.start("restart")
    wait_until(lambda: len(job.run.attempts()) == 2 and "up" in job.log(1), 30, "the next attempt on both")
    job.stop(now=True)
    assert node.process.wait(10) == 1


def test_killed_while_a_node_is_missing(make_job: Callable[..., Job]) -> None:
    job = make_job("command", "true", nodes=2, hosts=("gpu01", "gpu02")).start()
    wait_until(lambda: job.run.team.exists() and job.run.attempts(), 10)
    assert job.stop().reason is Reason.KILLED
    assert not job.run.team.exists()


def test_nodes_that_differ_are_not_started(two_nodes: Callable[..., tuple[Job, Node]], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "a work tree"
    work.mkdir()
    subprocess.run(["git", "init", "-q", work], check=True)
    (work / "code.py").write_text("1")
    subprocess.run(["git", "-C", work, "add", "."], check=True)
    subprocess.run(["git", "-C", work, "commit", "-qm", "1"], check=True)
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "git").write_text('#!/bin/sh\necho "# branch.oid $PPID"\n')  # another commit for whoever asks
    (fake / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    job, node = two_nodes("command", "true", cwd=str(work))
    ended = job.ended(30)
    assert ended.reason is Reason.CANNOT_START
    assert "not alike: the code: " in ended.detail and "on gpu01" in ended.detail and "on gpu02" in ended.detail
    node.process.wait(10)


def test_why_a_node_was_lost_stays_said_when_another_one_is_overdue() -> None:
    attempt = object.__new__(parts.LedAttempt)
    attempt._parts = {1: parts.Part(None, lost="nothing heard for 15 s"), 2: parts.Part(None), 3: parts.Part(None, ended=True)}
    attempt._asked, attempt._broken_by = None, time.monotonic() - parts.OVERDUE_S - 1
    attempt._wait = lambda _: None  # type: ignore[method-assign]
    attempt._others_end()
    assert [part.lost for part in attempt._parts.values()] == [
        "nothing heard for 15 s", "it does not say that its part has ended", ""]


def test_a_connection_that_is_broken_before_it_is_taken_is_not_the_last(
        make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(socket.socket):
        failed = False

        def accept(self) -> tuple[socket.socket, Any]:
            if not self.failed:
                self.failed = True
                raise ConnectionAbortedError(errno.ECONNABORTED, "Software caused connection abort")
            return super().accept()

    def listening() -> Broken:
        plain = socket.create_server(("127.0.0.1", 0))
        return Broken(plain.family, plain.type, plain.proto, plain.detach())

    class Watched:
        def watch(self, descriptor: int) -> None: ...
        def forget(self, descriptor: int) -> None: ...

    monkeypatch.setattr(team, "_listening", listening)
    job = make_job("command", "true", nodes=2, hosts=("gpu01", "gpu02"))
    leader = team.Team(job.run, job.spec, Watched())  # type: ignore[arg-type]
    try:
        where = json.loads(job.run.team.read_bytes())
        connection = socket.create_connection(("127.0.0.1", where["port"]))
        link = links.greet_leader(connection, job.spec.token, {"node": 1, "allocation": ""})
        wait_until(lambda: leader.look() or not leader.missing(), 5, "the member")
    finally:
        leader.close({"do": "over", "code": 0})
    link.close()


def test_run_dir_paths(tmp_path: Path) -> None:
    attempt = RunDir(tmp_path).attempt(3, 2)
    assert attempt.journal.name == "node-2.jsonl" and attempt.path == RunDir(tmp_path).attempt(3).path


ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(value)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {value.item()}", flush=True)
dist.destroy_process_group()
"""
