"""What --node means, and which node `any` is."""
from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import Unreachable
from cluster.inventory import Node, client_state_dir
from launcher import reconcile, stages, submit, targets
from launcher.errors import LaunchError, Refused, Wrong
from launcher.index import open_index
from launcher.stages import Request

CLUSTER = """
nodes:
  gpu01: {via: ssh, workdir: /w}
  gpu02: {via: ssh, workdir: /w}
  lab: {via: slurm, login: head, partition: main, workdir: /w, sbatch: {account: mouse, mem: 4G}}
  far: {via: slurm, login: far-login, workdir: /w}
"""
GPU = {"name": "H100", "memory_mb": 80000}


def machine(name: str, partition: str, default: bool = False) -> dict[str, Any]:
    return {"name": name, "partition": partition, "default": default}


MACHINES = {
    "lab": [machine("gpu05", "big"), machine("gpu05", "main", True), machine("gpu06", "big"), machine("both", "gpu05")],
    "far": [machine("gpu77", "only", True), machine("both", "only", True)],
}


class FakeBackend:
    """A node that answers what it is told to; what it was asked is counted."""

    def __init__(self, node: Node, prepare: dict[str, Any] | Exception | None = None) -> None:
        self.node, self._prepare = node, prepare
        self.asked = 0
        self.silent = False

    def machines(self) -> list[dict[str, Any]]:
        self.asked += 1
        if self.silent:
            raise Unreachable("no route to host", self.node.name)
        return MACHINES[self.node.name]

    def prepare(self, **asked: Any) -> dict[str, Any]:
        if isinstance(self._prepare, Exception):
            raise self._prepare
        return {"stats": {}, "home": "/home/me", "gpus": [], "busy": {}, "line": [], "have_code": False, "env_problem": None,
                "slurm": forecast(0.0), **(self._prepare or {})}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cluster.yaml").write_text(CLUSTER)
    return tmp_path


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Node -> its answer to `prepare`, to be filled in."""
    told: dict[str, Any] = {}
    made: dict[str, FakeBackend] = {}
    lock = threading.Lock()

    def backend_of(node: Node) -> FakeBackend:
        with lock:
            return made.setdefault(node.name, FakeBackend(node, told.get(node.name)))

    monkeypatch.setattr(reconcile, "backend_of", backend_of)
    told["made"] = made
    return told


@pytest.mark.parametrize(("word", "node", "partition", "name"), [
    ("gpu01", "gpu01", None, None), ("local", "local", None, None), ("lab", "lab", None, None),
    ("lab:big", "lab", "big", None), ("lab:gpu06", "lab", "big", "gpu06"), ("lab:gpu05", "lab", "gpu05", None),
    ("gpu05", "lab", None, "gpu05"), ("gpu06", "lab", "big", "gpu06"), ("gpu77", "far", None, "gpu77")])
def test_a_word_names_a_node_a_partition_or_a_machine_of_a_cluster(
        project: Path, answers: dict[str, Any], word: str, node: str, partition: str | None, name: str | None) -> None:
    found = targets.resolve(word, project)
    assert (found.node.name, found.partition, found.machine, found.hosts) == (node, partition, name, ())


def test_a_machine_that_was_seen_once_is_known_without_asking(project: Path, answers: dict[str, Any]) -> None:
    for _ in range(2):
        assert targets.resolve("gpu06", project).machine == "gpu06"
    assert answers["made"]["lab"].asked == 1
    targets.resolve("lab:gpu06", project)
    assert answers["made"]["lab"].asked == 1
    yesterday = time.time() - targets.KNOWN_S - 1
    for remembered in client_state_dir().glob("clusters/*.json"):
        os.utime(remembered, (yesterday, yesterday))
    targets.resolve("gpu06", project)
    assert answers["made"]["lab"].asked == 2


@pytest.mark.parametrize(("word", "says"), [
    ("gpu01,gpu01", "gpu01 stands there twice"), ("gpu01,", "an empty name"), ("gpu01,lab", "lab is a SLURM cluster"),
    ("lab:gpu05,gpu01", "lab is a SLURM cluster"), ("gpu01,any", "stands alone"), ("gpu01:big", "gpu01 is none"),
    ("lab:nope", "partitions: big, gpu05, main; machines: both, gpu05, gpu06"), ("gpu99", "no such node: 'gpu99'"),
    ("gpu99", "machines of lab: both, gpu05, gpu06"),
    ("gpu1", "nearest: gpu01"), ("both", "say which: --node lab:both")])
def test_words_that_mean_nothing_are_told_so(project: Path, answers: dict[str, Any], word: str, says: str) -> None:
    with pytest.raises(Wrong) as error:
        targets.resolve(word, project)
    assert says in str(error.value)


def test_a_name_that_only_a_silent_cluster_can_know_is_no_mistake_of_the_person(
        project: Path, answers: dict[str, Any]) -> None:
    reconcile.backend_of(targets.resolve("far", project).node).silent = True  # type: ignore[attr-defined]
    assert targets.resolve("gpu05", project).node.name == "lab"
    with pytest.raises(Unreachable, match="no route to host"):
        targets.resolve("gpu77", project)


def spec_for(project: Path, word: str, **more: Any) -> Any:
    request = Request(project, argv=("true",), node=word, cwd="/tmp", **more)
    target = targets.resolve(word, project)
    return targets.aimed(stages.plan(request, target.node).spec, target)


def test_a_job_is_aimed_at_what_was_named(project: Path, answers: dict[str, Any]) -> None:
    job = spec_for(project, "gpu06", nodes=1)
    assert (job.node, job.slurm.partition, job.slurm.nodelist) == ("lab", "big", "gpu06")
    assert job.slurm.options == {"account": "mouse", "mem": "4G"}
    assert spec_for(project, "lab", nodes=3).nodes == 3 and spec_for(project, "lab").slurm.partition == "main"
    both = spec_for(project, "gpu01,gpu02")
    assert (both.node, both.hosts, both.nodes, both.slurm) == ("gpu01", ("gpu01", "gpu02"), 2, None)


@pytest.mark.parametrize(("word", "nodes", "says"), [
    ("gpu01", 2, "the job takes 2 nodes, --node names one"), ("gpu01,gpu02", 3, "takes 3 nodes, --node names 2"),
    ("gpu05", 2, "gpu05 is one machine, the job takes 2")])
def test_as_many_machines_as_the_job_takes_must_be_named(project: Path, answers: dict[str, Any], word: str, nodes: int,
                                                        says: str) -> None:
    with pytest.raises(Wrong) as error:
        spec_for(project, word, nodes=nodes)
    assert says in str(error.value)


def gpus(*used_mb: int) -> list[dict[str, Any]]:
    return [{**GPU, "index": index, "uuid": f"G{index}", "used_mb": used} for index, used in enumerate(used_mb)]


def forecast(starts_in_s: float | None) -> dict[str, Any]:
    return {"script": "#!/bin/bash", "starts_in_s": starts_in_s, "nodes": "gpu05"}


@pytest.fixture
def chosen(project: Path, answers: dict[str, Any]) -> Callable[..., submit.Draft]:
    def draft(**told: Any) -> submit.Draft:
        answers.update(told)
        with open_index() as index:
            return submit.draft(index, Request(project, argv=("true",), node="any", gpus=2, cwd="/tmp"))
    return draft


def test_any_is_the_first_node_of_the_file_that_can_take_it_now(chosen: Callable[..., submit.Draft]) -> None:
    ready = chosen(gpu01={"gpus": gpus(9, 70000, 9), "busy": {"G1": "kim pid 4242 python 71 GB since 14:02",
                                                             "G2": "bob job phase1-x since 9:14"}}, gpu02=Unreachable("no answer", "gpu02"),
                   lab={"slurm": forecast(7200)}, far={"slurm": forecast(1)})
    assert (ready.node.name, ready.script) == ("far", "#!/bin/bash")
    assert ready.notes == (
        "gpu01 cannot take it now: 1 of its 3 GPUs is free, 2 asked for; "
        "GPU 1: kim pid 4242 python 71 GB since 14:02; GPU 2: bob job phase1-x since 9:14", "gpu02 cannot take it now: no answer",
        "lab cannot take it now: it would start in 2 h")
    assert ready.spec.node == "far"


def test_free_gpus_are_those_that_nobody_has_or_waits_for(chosen: Callable[..., submit.Draft]) -> None:
    ready = chosen(gpu01={"gpus": gpus(9, 9, 9), "busy": {"G2": "bob job phase1-x since 9:14"}})
    assert (ready.node.name, ready.notes) == ("gpu01", ())


def test_a_node_where_others_wait_is_passed_over(chosen: Callable[..., submit.Draft]) -> None:
    ready = chosen(gpu01={"gpus": gpus(9, 9, 9), "line": ["bob job phase1-x waits for 4 GPUs since 9:14"]},
                   gpu02={"gpus": gpus(9, 9)})
    assert ready.node.name == "gpu02" and "others come first: bob job phase1-x" in ready.notes[0]


def test_when_no_node_can_take_it_each_says_why(chosen: Callable[..., submit.Draft]) -> None:
    with pytest.raises(Refused) as error:
        chosen(gpu01={"gpus": gpus(9)}, gpu02={"gpus": gpus(600, 600), "busy": {"G0": "kim", "G1": "kim"}}, lab={"slurm": forecast(None)},
               far=LaunchError("qos"))
    assert error.value.exit_code == 4
    for words in ("gpu01 cannot take it now: the job asks for 2 GPUs, the node has 1", "gpu02 cannot take it now: none of",
                  "lab cannot take it now: SLURM does not say when", "far cannot take it now: qos"):
        assert words in str(error.value)


def test_any_without_a_cluster_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(Wrong, match="no node is named in a cluster.yaml"):
        targets.candidates(tmp_path)
