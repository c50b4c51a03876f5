"""Asking many nodes at once, and to which of them a job belongs."""
from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import Unreachable
from cluster.inventory import Node
from launcher import reconcile, team
from launcher.index import Index, Intent, Job, open_index
from launcher.status import status


def view(job_id: str, node: str, state: str = "RUNNING") -> dict[str, Any]:
    return {"id": job_id, "token": f"t-{job_id}", "node": node, "run_dir": f"/w/runs/{job_id}",
            "state": state, "stage": "x", "submitted_at": 1.0}


def test_one_slow_node_does_not_keep_the_others_waiting() -> None:
    never = threading.Event()
    began = time.monotonic()
    answers = reconcile.ask_all({"fast": lambda: 1, "dead": never.wait}, 0.2)
    never.set()
    assert time.monotonic() - began < 2.0
    assert answers["fast"] == 1 and isinstance(answers["dead"], Unreachable)


def test_our_own_mistakes_are_not_taken_for_a_dead_node() -> None:
    with pytest.raises(ZeroDivisionError):
        reconcile.ask_all({"a": lambda: 1 // 0}, 5.0)


def test_what_one_node_said_is_written_down_while_another_is_awaited(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()

    class Answering:
        def __init__(self, node: Node) -> None:
            self.name = node.name

        def status(self, run_dirs: list[str]) -> dict[str, Any]:
            if self.name == "slow" and not written.wait(20):
                raise Unreachable("the other answer was never written down", self.name)
            return {"jobs": [view(Path(path).name, self.name) for path in run_dirs], "broken": []}

    def put_all(index: Index, jobs: list[Job]) -> None:
        there(index, jobs)
        written.set()

    there = Index.put_all
    (tmp_path / "cluster.yaml").write_text("nodes:\n  fast: {via: ssh, host: fast, workdir: /w}\n  slow: {via: ssh, host: slow, workdir: /w}\n")
    monkeypatch.setenv("LAUNCH_CLUSTER", str(tmp_path / "cluster.yaml"))
    monkeypatch.setattr(reconcile, "backend_of", Answering)
    with open_index(tmp_path / "index.sqlite") as index:
        index.put_all([Job(f"t-{name}", name, None, name, f"/w/runs/{name}", False, 1.0, 1.0, view(name, name))
                       for name in ("fast", "slow")])
        monkeypatch.setattr(Index, "put_all", put_all)
        found = reconcile.refresh(index, index.active(), tmp_path, time.monotonic() + 30)
        assert found.unreachable == {}
        assert all(job.asked_at > 1.0 for job in index.active())


def test_a_dead_node_leaves_the_state_and_marks_the_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(node: Node) -> None:
        raise Unreachable("connection refused", node.name)

    monkeypatch.setattr(reconcile, "backend_of", unreachable)
    with open_index(tmp_path / "index.sqlite") as index:
        heard = time.time() - 300
        index.put(Job("t-a", "a", None, "local", "/w/runs/a", False, 1.0, heard, view("a", "local")))
        found = status(index, (), False, tmp_path)
    assert [(job.state, job.stale) for job in found.jobs] == [("RUNNING", True)]
    assert found.jobs[0].last_seen_s == pytest.approx(300, abs=5)
    assert "connection refused" in found.unreachable["local"]


def test_the_node_of_an_ended_job_is_asked_again_until_all_of_it_was_told(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = view("a", "local", "FAILED")
    answers = [{"untold": True}, {"untold": False}]

    class Local:
        def status(self, run_dirs: list[str]) -> dict[str, Any]:
            return {"jobs": [ended | answers.pop(0)], "broken": [], "notes": ["nobody could be told"]}

    monkeypatch.setattr(reconcile, "backend_of", lambda node: Local())
    with open_index(tmp_path / "index.sqlite") as index:
        index.put(Job("t-a", "a", None, "local", "/w/runs/a", False, 1.0, 1.0, view("a", "local")))
        found = [status(index, (), False, tmp_path) for _ in range(3)]
    assert [len(one.jobs) for one in found] == [1, 0, 0] and not answers
    assert [bool(one.notes) for one in found] == [True, True, False]


def test_a_sweep_that_was_cut_off_is_asked_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Local:
        def find(self, tokens: list[str]) -> list[dict[str, Any]]:
            asked.append(tokens)
            return [{"run_dir": None, "id": None, "unasked": ""}] * len(tokens)

    monkeypatch.setattr(reconcile, "backend_of", lambda node: Local())
    with open_index(tmp_path / "index.sqlite") as index:
        index.add_intents([Intent(f"t-{one}", f"p-{one}", None, "local", "/w", 1 << 30, 1.0) for one in range(50)])
        reconcile.settle_leftovers(index, tmp_path)
        assert [len(tokens) for tokens in asked] == [50] and index.intents() == []


def test_machines_that_no_cluster_file_names_do_not_spoil_a_status(tmp_path: Path) -> None:
    """Those of a SLURM job have no names there; one of another job was taken out of it."""
    jobs = [Job(f"t-{one}", one, None, "local", f"/w/runs/{one}", False, 1.0, 1.0, view(one, "local") | more)
            for one, more in (("a", {"missing": ["node 1"], "hosts": []}),
                              ("b", {"missing": ["gpu77"], "hosts": ["local", "gpu77"]}))]
    notes = team.rejoin(jobs, (), tmp_path, 5.0)
    assert len(notes) == 1 and "b: gpu77" in notes[0] and "no such node" in notes[0]


def test_a_job_seen_by_two_nodes_belongs_to_the_one_it_was_submitted_to() -> None:
    nodes = {name: Node(name) for name in ("local", "gpu01", "gpu02")}
    both = [view("a", "gpu02"), view("b", "gpu01")]
    jobs = reconcile._attributed({"gpu01": both, "gpu02": both}, nodes)
    assert {job.id: job.node for job in jobs.values()} == {"a": "gpu02", "b": "gpu01"}


def test_a_node_that_was_silent_keeps_the_job_it_was_given() -> None:
    nodes = {name: Node(name) for name in ("local", "gpu01", "gpu02")}
    jobs = reconcile._attributed({"gpu01": [view("a", "gpu02")]}, nodes)
    assert {job.node for job in jobs.values()} == {"gpu02"}


def test_another_clients_local_is_the_node_that_answered() -> None:
    nodes = {name: Node(name) for name in ("local", "gpu01")}
    jobs = reconcile._attributed({"local": [], "gpu01": [view("a", "local"), view("b", "unknown")]}, nodes)
    assert {job.node for job in jobs.values()} == {"gpu01"}
