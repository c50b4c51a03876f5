"""The client is killed and its connection cut: the job goes on, and another computer takes over."""
from __future__ import annotations

from dataclasses import replace

from tests.helpers import wait_until
from tests.testbed.testbed import Testbed

from .lab import Lab


def test_another_laptop_finds_follows_and_kills(lab: Lab, testbed: Testbed) -> None:
    client = lab.start("submit", "tiny", "--node", lab.node, "--set", "steps=4000", "--name", "long one", "--follow")
    wait_until(client.output.read_bytes, 60, "the first line of its log")
    with testbed.link_down(lab.node):
        client.process.kill()
        client.process.wait()
    other = replace(lab, home=lab.home.with_name("another laptop"))
    other.home.mkdir()
    assert "no job is known here" in other.launch("status").stdout
    assert "long one" in other.launch("status", "--rescan").stdout
    view = other.status("long one")
    assert view["state"] == "RUNNING" and view["attempt"] == 0

    follower = other.start("logs", "long one", "--follow")
    wait_until(lambda: b"checkpoint step-" in follower.output.read_bytes(), 60, "a checkpoint without the client")
    killed = other.launch("kill", "long one")
    assert "checkpoint" in killed.stdout + killed.stderr
    follower.process.wait(30)
    read = follower.output.read_text()
    assert "stopped at step" in read
    assert read == testbed.read(lab.node, f"{view['run_dir']}/attempts/000/logs/rank-0.log")
    assert other.status("long one")["state"] == "CANCELLED"
    wait_until(lambda: not testbed.processes(), 10, "no process of alice is left")


def test_a_cut_link_does_not_tear_the_followed_log(lab: Lab, testbed: Testbed) -> None:
    count = "i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo line $i; sleep 0.02; done"
    job = lab.submit("--", "sh", "-c", count)
    follower = lab.start("logs", job, "--follow")
    wait_until(follower.output.read_bytes, 30, "its first line")
    with testbed.sshd_killed(lab.node):
        testbed.exec(lab.node, "pkill", "-9", "-u", "alice", "sshd", check=False)
    assert follower.process.wait(60) == 0
    assert follower.output.read_text() == "".join(f"line {i}\n" for i in range(1, 401))
