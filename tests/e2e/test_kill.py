"""`launch kill` is done when nothing of the job is left, and it takes nothing else with it."""
from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial

import pytest

from cluster.contract import RunDir, merged_metrics
from tests.helpers import wait_until
from tests.testbed.testbed import Testbed

from .conftest import on_this_machine
from .lab import LAUNCH, Lab

GRACE_S = 3.0


def pids(lab: Lab, testbed: Testbed, path: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in testbed.exec(lab.node, "cat", path).stdout.splitlines():
        kind, pid = line.rsplit(" ", 1)
        found.setdefault(kind, []).append(pid)
    return found


def whole(lab: Lab, testbed: Testbed, job: str) -> bool:
    return "all" in testbed.sh(lab.node, "cat /tmp/pids-$1 || true", job)


def living(lab: Lab, testbed: Testbed, numbers: list[str]) -> list[str]:
    line = 'for p; do [ ! -e /proc/$p ] || grep -q "^State:.Z" /proc/$p/status || echo $p; done'
    return testbed.sh(lab.node, line, *numbers).split()


def test_a_nasty_tree_is_gone_and_its_neighbours_live(lab: Lab, testbed: Testbed) -> None:
    def submit(name: str) -> str:
        return lab.submit("--name", name, "--", "sh", "-c", "exec python nasty.py /tmp/pids-$LAUNCH_JOB_ID")

    victim, neighbour = submit("victim"), submit("neighbour")
    inner = ("export LAUNCH_WORKDIR=/home/alice/inner LAUNCH_HOME=/home/alice/inner/state; "
             "mkdir -p /home/alice/inner/p; cd /home/alice/inner/p; "
             f"{LAUNCH} submit --name inner -- sleep 600 > /tmp/inner; exec sleep 600")
    outer = lab.submit("--name", "outer", "--", "sh", "-c", inner)
    try:
        for job in (victim, neighbour):
            wait_until(partial(whole, lab, testbed, job), 60, "its tree")
        wait_until(lambda: testbed.sh(lab.node, "cat /tmp/inner || true"), 60, "the job inside a job")
        theirs, others = (pids(lab, testbed, f"/tmp/pids-{job}") for job in (victim, neighbour))
        assert set(theirs) == {"main", "double-forked", "renamed", "empty environment", "own session", "loader", "all"}
        began = time.monotonic()
        lab.launch("kill", victim, "--grace", f"{GRACE_S:g}s")
        took = time.monotonic() - began
        assert living(lab, testbed, [pid for kind in theirs for pid in theirs[kind] if pid != "0"]) == []
        assert took < GRACE_S + 5 * 2, f"{took:.1f} s"
        print(f"nasty tree gone {took - GRACE_S:.2f} s after the grace (wanted: 2)")
        assert lab.status(neighbour)["state"] == "RUNNING"
        assert len(living(lab, testbed, others["loader"])) == 2

        lab.launch("kill", outer)
        assert testbed.exec(lab.node, "pgrep", "-u", "alice", "-fx", "sleep 600").stdout.count("\n") == 1
    finally:
        end = f"LAUNCH_WORKDIR=/home/alice/inner LAUNCH_HOME=/home/alice/inner/state {LAUNCH} kill --now inner"
        testbed.sh(lab.node, end, user="alice")
        testbed.sh(lab.node, "rm -rf /home/alice/inner /tmp/inner /tmp/pids-*")


def test_two_clients_kill_at_the_same_moment(lab: Lab, testbed: Testbed) -> None:
    """One reports the kill, the other that it was asked already; both exit 0, and the job has one ending."""
    job = lab.submit("--", "sh", "-c", "trap 'sleep 2; exit 0' TERM; echo ready; while :; do sleep 0.05; done")
    other = replace(lab, home=lab.home.with_name("another laptop"))
    other.home.mkdir()
    other.launch("status", "--rescan")
    wait_until(lambda: "ready" in lab.logs(job), 60, "it runs")
    kills = [person.start("kill", job) for person in (lab, other)]
    assert [one.process.wait(60) for one in kills] == [0, 0]
    said = [one.output.read_text() for one in kills]
    assert all(f"{job} CANCELLED" in text for text in said), said
    assert sum("already" in text for text in said) == 1, said
    shown = json.loads(lab.launch("show", job, "--json").stdout)
    assert [one["event"] for one in shown["events"]].count("attempt_ended") == 1 and len(shown["attempts"]) == 1


@pytest.mark.campaign
def test_a_save_of_40_s_is_waited_for(lab: Lab, testbed: Testbed) -> None:
    job = lab.submit("tiny", "--set", "save_s=40", "--set", "steps=4000")
    run = RunDir(on_this_machine(testbed, lab.run_dir(job)))
    wait_until(lambda: any("loss" in line for line in merged_metrics(run)), 60, "its first step")
    lab.launch("kill", job, timeout_s=200)
    view = lab.status(job)
    assert view["state"] == "CANCELLED" and view["checkpoint_step"] == view["step"] > 0, view
