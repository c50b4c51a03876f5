"""Sweeps, pipelines and --after on every kind of place, and between nodes: by ssh among peers, or by the client."""
from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import wait_until
from tests.testbed.testbed import Testbed

from .conftest import LOGIN, PLACES
from .lab import ENDED, Lab

# On the login node a pipeline goes all the way; what else a laptop shows as well is the campaign's there.
MOST_PLACES = pytest.mark.parametrize(
    "place", [pytest.param(one, marks=pytest.mark.campaign) if one == LOGIN else one for one in PLACES], indirect=True)


def views(lab: Lab, word: str) -> dict[str, dict]:
    return {one["name"]: one for one in json.loads(lab.launch("status", word, "--json").stdout)}


# --- wherever a job runs ------------------------------------------------------------------------------------

def test_a_pipeline_hands_its_checkpoint_over(place: Lab) -> None:
    assert place.submit("chain", "--name", "p") == "p"
    place.launch("wait", "p", timeout_s=180)
    found = views(place, "p")
    assert place.logs("p.read") == f"step 12 of {found['p.train']['id']} True\n"
    assert found["p.read"]["started_at"] >= found["p.train"]["ended_at"]
    assert "${train.checkpoints.last}" in place.launch("show", "p.read").stdout


@MOST_PLACES
def test_a_stage_that_fails_stops_what_depends_on_it(place: Lab) -> None:
    place.submit("chain", "--name", "p", "--set", "train.save_s=never")
    said = place.launch("wait", "p", code=1, timeout_s=180).stderr
    found = views(place, "p")
    assert found["p.train"]["state"] == "FAILED" and found["p.read"]["state"] == "CANCELLED", said
    assert found["p.read"]["reason"] == "a job it waits for did not complete", found["p.read"]
    place.launch("restart", "p", "--set", "save_s=0", timeout_s=120)
    place.launch("wait", "p", timeout_s=180)
    assert place.logs("p.read").startswith("step 12 of ")
    assert place.left_over() == []


@MOST_PLACES
def test_a_sweep_is_run_and_killed_by_its_name(place: Lab) -> None:
    name = place.submit("tiny", "--sweep", "steps=6,12,4000", "--parallel", "2", "--set", "pace_s=0.05")
    wait_until(lambda: [one["state"] for one in views(place, name).values()][:2] == ["COMPLETED"] * 2, 120,
               "two points are complete")
    table = place.launch("status", name).stdout
    assert "steps=6" in table and "steps=4000" in table
    place.launch("kill", name, timeout_s=180)
    assert [one["state"] for one in views(place, name).values()] == ["COMPLETED", "COMPLETED", "CANCELLED"]
    if place.node == "lab":
        ids = {json.loads((place.seen_here(one["run_dir"]) / "slurm.json").read_bytes())["ids"][0].partition("_")[0]
               for one in views(place, name).values()}
        assert len(ids) == 1
    assert place.left_over() == []


@MOST_PLACES
def test_a_job_waits_for_another_and_dies_with_it(place: Lab) -> None:
    first = place.submit("tiny", "--set", "steps=4000")
    second = place.submit("--after", first, "--", "echo", "never")
    other = place.submit("--after", f"{first}:any", "--", "echo", "after all")
    wait_until(lambda: place.status(first)["step"], 90, f"{first} runs")
    waiting = place.status(second)
    assert waiting["state"] == "PENDING" and waiting["started_at"] is None, waiting
    place.launch("kill", first, "--now", timeout_s=120)
    place.launch("wait", other, timeout_s=120)
    assert place.logs(other) == "after all\n"
    place.launch("wait", second, code=1, timeout_s=120)
    found = place.status(second)
    assert (found["state"], found["reason"]) == ("CANCELLED", "a job it waits for did not complete"), found
    assert place.left_over() == []


# --- between nodes ------------------------------------------------------------------------------------------

@pytest.fixture
def two(testbed_private_home: Testbed, project: Path, tmp_path: Path) -> Lab:
    """bob's laptop and two nodes that do not see each other's files."""
    home = tmp_path / "laptop"
    home.mkdir()
    bed = testbed_private_home
    cluster = bed.cluster_yaml(home / "cluster.yaml", "bob", ["gpu01", "gpu02"], "~/launch 쥐")
    stage = project / "configs" / "stages" / "chain.yaml"
    stage.write_text(stage.read_text().replace("read: {", "read: {node: gpu02, "))
    return Lab(project, home, "gpu01", cluster, bed=bed)


def peers(lab: Lab) -> None:
    assert lab.cluster
    cluster = yaml.safe_load(lab.cluster.read_text())
    for node in cluster["nodes"].values():
        node["peers"] = True
    lab.cluster.write_text(yaml.safe_dump(cluster, allow_unicode=True))


def test_peers_hand_over_with_the_client_off(two: Lab) -> None:
    peers(two)
    two.submit("chain", "--name", "p")
    two.launch("wait", "p", timeout_s=120)
    found = views(two, "p")
    assert found["p.read"]["node"] == "gpu02"
    assert two.logs("p.read") == f"step 12 of {found['p.train']['id']} True\n"
    assert "/.launch/inputs/" in two.launch("show", "p.read").stdout


def test_a_wait_that_no_machine_can_hold_is_refused_and_can_be_carried(two: Lab) -> None:
    said = two.launch("submit", "chain", "--node", "gpu01", code=4).stderr
    assert "read on gpu02 cannot wait for train" in said and "peers: true" in said and "--follow" in said
    assert json.loads(two.launch("status", "--all", "--json").stdout) == []
    done = two.launch("submit", "chain", "--node", "gpu01", "--name", "p", "--follow", timeout_s=180)
    assert done.stdout.splitlines()[-1].startswith("step 12 of p-"), done.stderr


def test_a_single_job_is_carried_too(two: Lab) -> None:
    first = two.submit("tiny", "--set", "steps=12")
    said = two.launch("submit", "--node", "gpu02", "--after", first, "--", "echo", "second", code=4).stderr
    assert f"cannot wait for {first}" in said
    done = two.launch("submit", "--node", "gpu02", "--after", first, "--follow", "--", "echo", "second")
    assert done.stdout == "second\n" and "held by this computer" in done.stderr


def test_a_client_that_was_cut_off_goes_on_with_the_next_command(two: Lab) -> None:
    following = two.start("submit", "chain", "--node", "gpu01", "--name", "p", "--set", "train.steps=40", "--follow")
    wait_until(lambda: "p.train" in two.launch("status", "--json").stdout, 60, "the first stage is submitted")
    following.process.kill()
    following.process.wait()
    said = two.launch("status").stderr
    assert "p-" in said and "this computer holds it until" in said
    said = two.launch("wait", "p", timeout_s=120).stderr
    assert "is submitted to gpu02 now" in said and said.count("COMPLETED") == 2
    assert two.logs("p.read").startswith("step 40 of ")


def test_what_is_held_is_given_up_by_a_kill(two: Lab) -> None:
    following = two.start("submit", "chain", "--node", "gpu01", "--name", "p", "--set", "train.steps=4000", "--follow")
    wait_until(lambda: "p.train" in two.launch("status", "--json").stdout, 60, "the first stage is submitted")
    following.process.kill()
    following.process.wait()
    said = two.launch("kill", "p", timeout_s=120).stdout
    assert said.count("CANCELLED") == 2 and "had not been submitted" in said
    assert list(views(two, "p")) == ["p.train"]


def test_a_peer_that_cannot_be_asked_for_a_while_is_no_ending(two: Lab) -> None:
    peers(two)
    first = two.submit("tiny", "--set", "steps=60")
    second = two.submit("--node", "gpu02", "--after", first, "--", "echo", "second")
    wait_until(lambda: "RUNNING" in two.status(second)["detail"], 60, "it says what it waits for")
    assert two.bed
    with two.bed.link_down("gpu01"):
        begun = time.monotonic()
        wait_until(lambda: "gpu01" in two.status(second)["detail"], 90, "it says that it cannot ask")
        assert two.status(second)["state"] not in ENDED and time.monotonic() - begun < 90
    two.launch("wait", second, timeout_s=120)
    assert two.logs(second) == "second\n"
