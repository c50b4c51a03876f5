"""One job on two ssh nodes: started, stopped, cut off and resumed as one."""
from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cluster.contract import RunDir, merged_metrics
from cluster.events import AttemptStarted
from cluster.journal import read_events
from tests.helpers import wait_until
from tests.testbed.slurmbed import SlurmBed
from tests.testbed.testbed import Testbed

from .conftest import on_this_machine
from .lab import Lab

BOTH = ("--node", "gpu01,gpu02")
STOPPED_S = 30.0  # after the power-off of one node the rest must have ended
ALL_REDUCE = """
import os, socket, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(value)
print(f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}: {value.item():g}", flush=True)
dist.destroy_process_group()
"""
STAGE = """\
about: sums over all ranks
torchrun: all_reduce.py
resources: {gpus: 0, procs: 2}
"""


def run_of(testbed: Testbed, lab: Lab, job: str) -> RunDir:
    return RunDir(on_this_machine(testbed, lab.run_dir(job)))


def last_step(run: RunDir) -> int:
    return max((line["step"] for line in merged_metrics(run)), default=0)


def curve(run: RunDir) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in merged_metrics(run) if "loss" in line]


def users(testbed: Testbed, *nodes: str) -> list[str]:
    return [line for line in testbed.processes() if line.split()[0] in nodes]


def test_two_nodes_are_one_world(lab: Lab, testbed: Testbed) -> None:
    (lab.project / "all_reduce.py").write_text(ALL_REDUCE)
    (lab.project / "configs/stages/sums.yaml").write_text(STAGE)
    job = lab.submit("sums", *BOTH)
    lab.launch("wait", job)
    said = [lab.logs(job, "--rank", str(rank)).splitlines()[-1] for rank in range(4)]
    assert said == [f"rank {rank} of 4 on gpu0{1 + rank // 2}: 10" for rank in range(4)]
    assert lab.status(job)["place"] == "gpu01,gpu02"
    wait_until(lambda: not users(testbed, "gpu01", "gpu02"), 10, "no process left")


def test_kill_leaves_nothing_on_either_node(lab: Lab, testbed: Testbed) -> None:
    job = lab.submit("tiny", "--set", "steps=4000", *BOTH)
    run = run_of(testbed, lab, job)
    wait_until(lambda: last_step(run) > 3, 60, "some steps")
    lab.launch("kill", job)
    view = lab.status(job)
    assert view["state"] == "CANCELLED" and view["checkpoint_step"] == view["step"] > 0, view
    wait_until(lambda: not users(testbed, "gpu01", "gpu02"), 5, "no process left")


def test_nodes_without_a_common_workdir_are_refused(lab: Lab, testbed: Testbed, tmp_path: Path) -> None:
    other = Lab(lab.project, lab.home, "gpu01", testbed.cluster_yaml(
        tmp_path / "apart.yaml", "alice", ("gpu01", "gpu02"), "/tmp/apart"))
    refused = other.launch("submit", *BOTH, "--", "true", code=4)
    assert "gpu02 does not see /tmp/apart of gpu01" in " ".join(refused.stderr.split())
    assert json.loads(other.launch("status", "--all", "--json").stdout) == []
    for node in ("gpu01", "gpu02"):
        testbed.sh(node, "rm -rf /tmp/apart")


def test_power_cut_of_one_node(lab: Lab, testbed: Testbed) -> None:
    """Stopped within 30 s, reported by name, resumed exactly when the node is back."""
    whole = lab.submit("tiny", *BOTH)
    lab.launch("wait", whole)
    job = lab.submit("tiny", "--set", "pace_s=0.3", *BOTH)
    run = run_of(testbed, lab, job)
    wait_until(lambda: any(run.checkpoints.glob("step-*/manifest.json")) and last_step(run) > 12, 90, "a checkpoint")
    with testbed.power_cut("gpu02"):
        began = time.monotonic()
        wait_until(lambda: not [line for line in users(testbed, "gpu01") if "tiny_stage" in line], 60, "ranks gone")
        took = time.monotonic() - began
        assert took < STOPPED_S, f"{took:.1f} s"
        print(f"the rest was stopped {took:.1f} s after the power cut")
        wait_until(lambda: "waits for gpu02 (lost" in lab.status(job)["detail"], 30, "it waits for it by name")
        shown = json.loads(lab.launch("show", job, "--json").stdout)
        assert shown["attempts"][0]["reason"] == "node lost" and "gpu02" in shown["attempts"][0]["detail"]
    wait_until(lambda: lab.status(job)["state"] == "RUNNING", 40, "it goes on")
    lab.launch("wait", job, timeout_s=120)
    view = lab.status(job)
    assert view["state"] == "COMPLETED" and view["attempt"] == 1, view
    assert curve(run) == curve(run_of(testbed, lab, whole))


@pytest.mark.campaign
def test_link_down_for_30_s(lab: Lab, testbed: Testbed) -> None:
    job = lab.submit("tiny", "--set", "pace_s=0.3", *BOTH)
    run = run_of(testbed, lab, job)
    wait_until(lambda: any(run.checkpoints.glob("step-*/manifest.json")), 90, "a checkpoint")
    with testbed.link_down("gpu02"):
        until = time.monotonic() + 30
        wait_until(lambda: time.monotonic() > until, 40)
        assert not [line for line in users(testbed, "gpu01", "gpu02") if "tiny_stage" in line]
    lab.launch("wait", job, timeout_s=150)
    assert lab.status(job)["attempt"] == 1
    steps = [step for step, _ in curve(run)]
    assert steps == list(range(1, 61))


@pytest.mark.campaign
@pytest.mark.parametrize("frozen", ["gpu01", "gpu02"])
def test_a_frozen_node(lab: Lab, testbed: Testbed, frozen: str) -> None:
    """Its kernel acknowledges everything, and nobody answers."""
    job = lab.submit("tiny", "--set", "pace_s=0.3", *BOTH)
    run = run_of(testbed, lab, job)
    wait_until(lambda: any(run.checkpoints.glob("step-*/manifest.json")), 90, "a checkpoint")
    other = "gpu02" if frozen == "gpu01" else "gpu01"
    with testbed.frozen(frozen):
        wait_until(lambda: not [one for one in users(testbed, other) if "tiny_stage" in one], STOPPED_S, "ranks gone")
    lab.launch("wait", job, timeout_s=150)
    assert [step for step, _ in curve(run)] == list(range(1, 61))


@pytest.mark.campaign
def test_the_first_node_is_cut_off(lab: Lab, testbed: Testbed) -> None:
    """The others end their part, wait for it, and the next command after its boot brings the job back."""
    job = lab.submit("tiny", "--set", "pace_s=0.3", *BOTH)
    run = run_of(testbed, lab, job)
    wait_until(lambda: any(run.checkpoints.glob("step-*/manifest.json")), 90, "a checkpoint")
    with testbed.power_cut("gpu01"):
        wait_until(lambda: not [one for one in users(testbed, "gpu02") if "tiny_stage" in one], STOPPED_S, "ranks gone")
        assert users(testbed, "gpu02"), "its supervisor waits for gpu01"
        wait_until(lambda: lab.status(job)["detail"].startswith("waits for gpu01 (lost "), 20, "gpu02 tells of it")
        assert lab.status(job)["state"] == "PENDING"
    assert f"gpu01: it was restarted; {job} goes on" in lab.launch("status", job).stderr
    lab.launch("wait", job, timeout_s=150)
    assert [step for step, _ in curve(run)] == list(range(1, 61))
    wait_until(lambda: not users(testbed, "gpu01", "gpu02"), 10, "no process left")


@pytest.mark.campaign
@pytest.mark.parametrize("cut", ["gpu01", "gpu02"])
def test_peers_go_on_without_any_client(lab: Lab, testbed: Testbed, tmp_path: Path, cut: str) -> None:
    home = tmp_path / "peers"
    home.mkdir()
    cluster = testbed.cluster_yaml(home / "cluster.yaml", "alice", ("gpu01", "gpu02"), "/home/alice/launch", peers=True)
    person = Lab(lab.project, home, "gpu01", cluster)
    job = person.submit("tiny", "--set", "pace_s=0.3", *BOTH)
    run = run_of(testbed, person, job)
    assert all(json.loads(run.spec.read_bytes())["joins"])
    wait_until(lambda: any(run.checkpoints.glob("step-*/manifest.json")), 90, "a checkpoint")
    with testbed.power_cut(cut):
        other = "gpu02" if cut == "gpu01" else "gpu01"
        wait_until(lambda: not [one for one in users(testbed, other) if "tiny_stage" in one], STOPPED_S, "ranks gone")
    wait_until(lambda: [step for step, _ in curve(run)] == list(range(1, 61)), 200, "it completes by itself")
    wait_until(lambda: not users(testbed, "gpu01", "gpu02"), 20, "no process left")


@pytest.mark.campaign
def test_a_killed_leader(lab: Lab, testbed: Testbed) -> None:
    job = lab.submit("tiny", "--set", "steps=4000", *BOTH)
    run = run_of(testbed, lab, job)
    wait_until(lambda: last_step(run) > 12, 60, "some steps")
    beat = json.loads(run.attempt(0).heartbeat.read_bytes())
    testbed.sh("gpu01", "kill -9 $1", str(beat["pid"]))
    wait_until(lambda: not users(testbed, "gpu01"), STOPPED_S, "gpu01 is free")
    wait_until(lambda: not users(testbed, "gpu02"), 60, "gpu02 is free")
    view = lab.status(job)
    assert view["state"] == "FAILED" and view["reason"] == "supervisor lost", view
    lab.launch("restart", job)
    wait_until(lambda: len(run.attempts()) == 2 and last_step(run) > 20, 90, "it goes on")
    lab.launch("kill", "--now", job)
    wait_until(lambda: not users(testbed, "gpu01", "gpu02"), 10, "no process left")


def test_a_rebooted_node_goes_on_with_its_job(lab: Lab, testbed: Testbed) -> None:
    """The next command of any client restarts its jobs."""
    job = lab.submit("tiny", "--set", "pace_s=0.2")
    run = RunDir(on_this_machine(testbed, lab.run_dir(job)))
    wait_until(lambda: any(run.checkpoints.glob("step-*/manifest.json")), 60, "a checkpoint")
    with testbed.power_cut("gpu05"):
        pass
    said = lab.launch("status", job)
    assert f"gpu05: it was restarted; {job} goes on" in said.stderr
    lab.launch("wait", job, timeout_s=90)
    assert [step for step, _ in curve(run)] == list(range(1, 61))


def test_a_node_that_was_shut_down_in_order(lab: Lab, testbed: Testbed) -> None:
    """Its SIGTERM to everybody is not taken for a person's word once it has booted."""
    job = lab.submit("tiny", "--set", "pace_s=0.2")
    run = RunDir(on_this_machine(testbed, lab.run_dir(job)))
    wait_until(lambda: last_step(run) > 5, 60, "some steps")
    testbed.sh("gpu05", "kill -TERM $1", str(json.loads(run.attempt(0).heartbeat.read_bytes())["pid"]))
    wait_until(lambda: not users(testbed, "gpu05"), 30, "it has saved and ended")
    with testbed.power_cut("gpu05"):
        pass
    assert f"gpu05: it was restarted; {job} goes on" in lab.launch("status", job).stderr
    lab.launch("wait", job, timeout_s=90)
    assert [step for step, _ in curve(run)] == list(range(1, 61))


def test_a_job_of_a_rebooted_node_can_be_killed(lab: Lab, testbed: Testbed) -> None:
    job = lab.submit("tiny", "--set", "pace_s=0.2")
    with testbed.power_cut("gpu05"):
        pass
    lab.launch("kill", job)
    assert lab.status(job)["state"] == "NODE_FAIL"
    assert not users(testbed, "gpu05")


# --- on a SLURM cluster -----------------------------------------------------------------------------------------

def test_two_nodes_of_a_cluster_are_one_world(slurm: Lab, slurm_bed: SlurmBed) -> None:
    (slurm.project / "all_reduce.py").write_text(ALL_REDUCE)
    (slurm.project / "configs/stages/sums.yaml").write_text(STAGE)
    job = slurm.submit("sums", "--nodes", "2")
    slurm.launch("wait", job, timeout_s=120)
    said = [slurm.logs(job, "--rank", str(rank)).splitlines()[-1].split() for rank in range(4)]
    assert [line[1] for line in said] == ["0", "1", "2", "3"] and {line[-1] for line in said} == {"10"}
    first, second, third, fourth = (line[5] for line in said)
    assert first == second != third == fourth, said


@pytest.mark.campaign
def test_power_cut_of_a_cluster_node(slurm: Lab, slurm_bed: SlurmBed) -> None:
    """SLURM gives the job other nodes; nothing runs twice and nothing is missing."""
    job = slurm.submit("tiny", "--nodes", "2", "--set", "pace_s=0.3")
    slurm.wait_state(job, "RUNNING", timeout_s=150)
    run = RunDir(on_this_machine(slurm_bed, slurm.run_dir(job)))
    wait_until(lambda: any(run.checkpoints.glob("step-*/manifest.json")), 90, "a checkpoint")
    first, second = journal_nodes(run)
    with slurm_bed.power_cut(second):
        wait_until(lambda: not [one for one in users(slurm_bed, first) if "tiny_stage" in one
                                and len(run.attempts()) == 1], STOPPED_S, "ranks gone")
        slurm.launch("wait", job, timeout_s=250)
    assert slurm.status(job)["state"] == "COMPLETED"
    assert [step for step, _ in curve(run)] == list(range(1, 61))


def journal_nodes(run: RunDir) -> tuple[str, ...]:
    return next(event.nodes for event in read_events(run)[0] if isinstance(event, AttemptStarted))


@pytest.mark.campaign
def test_a_supervisor_that_was_lost_in_an_allocation_gets_another_one(slurm: Lab, slurm_bed: SlurmBed) -> None:
    """SLURM starts none again while the others live: the job gives its nodes back and goes on with new ones."""
    job = slurm.submit("tiny", "--nodes", "2", "--set", "pace_s=0.2")
    slurm.wait_state(job, "RUNNING", timeout_s=150)
    run = RunDir(on_this_machine(slurm_bed, slurm.run_dir(job)))
    wait_until(lambda: any(run.checkpoints.glob("step-*/manifest.json")), 90, "a checkpoint")
    second = journal_nodes(run)[1]
    slurm_bed.exec(second, "kill", "-9", str(json.loads(run.member(1).read_bytes())["pid"]))
    slurm.launch("wait", job, timeout_s=150)
    assert slurm.status(job)["state"] == "COMPLETED"
    assert [step for step, _ in curve(run)] == list(range(1, 61))
