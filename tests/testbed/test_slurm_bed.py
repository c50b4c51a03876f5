"""The SLURM of the test bed does what the real thing does."""
from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.slurm import recorded

from .bed import TestbedError, poll
from .fixtures import leftovers, need
from .slurmbed import GPU_NODES, SlurmBed


def cancel(bed: SlurmBed, *jobs: str) -> None:
    bed.slurm("scancel", *jobs, user="root")
    assert poll(lambda: not bed.queue(), 15)
    bed.await_idle_nodes()


def test_five_idle_nodes_take_a_job_each(slurm_bed: SlurmBed) -> None:
    assert slurm_bed.node_states() == dict.fromkeys(GPU_NODES, "idle")
    assert sorted(slurm_bed.slurm("srun", "-N5", "hostname").split()) == list(GPU_NODES)


def test_a_job_has_the_gpus_it_asked_for(slurm_bed: SlurmBed) -> None:
    line = "echo $SLURM_STEP_GPUS; cat /dev/nvidia0 2>&1; cat /dev/nvidia7 2>&1 || true"
    gpus, own, foreign = slurm_bed.slurm("srun", "--gres=gpu:2", "sh", "-c", line).splitlines()
    assert gpus == "0,1" and own.endswith("No such device or address")  # there is no driver
    if "proctrack/cgroup" in slurm_bed.read("head", "/etc/slurm/slurm.conf"):
        assert foreign.endswith("Operation not permitted")


def test_accounting_remembers_and_refuses_strange_accounts(slurm_bed: SlurmBed) -> None:
    job = slurm_bed.sbatch("exit 3")
    assert poll(lambda: slurm_bed.slurm("sacct", "-nPXj", job, "-o", "State,ExitCode,Account") == "FAILED|3:0|lab\n")
    with pytest.raises(TestbedError, match="Invalid account"):
        slurm_bed.sbatch("true", "--account=other")


def test_requeue(slurm_bed: SlurmBed) -> None:
    job = slurm_bed.sbatch("hostname; sleep 600", "--output=out", "--open-mode=append")
    slurm_bed.await_job(job, "RUNNING")
    slurm_bed.slurm("scontrol", "requeue", job)
    assert slurm_bed.await_job(job, "PENDING")["Reason"] == "BeginTime"
    assert slurm_bed.await_job(job, "RUNNING")["Restarts"] == "1"
    cancel(slurm_bed, job)
    assert len(slurm_bed.read("head", "/home/alice/out").split()) >= 2


def test_preemption_warns_and_requeues(slurm_bed: SlurmBed) -> None:
    line = "trap 'echo warned >>preempted' USR1; while :; do sleep 1; done"
    slurm_bed.slurm("scontrol", "update", "PartitionName=low", "GraceTime=3", user="root")
    low = slurm_bed.sbatch(line, "-p", "low", "--exclusive", "-w", "gpu05", "--signal=B:USR1@60")
    slurm_bed.await_job(low, "RUNNING")
    urgent = slurm_bed.sbatch("sleep 600", "-p", "high", "--exclusive", "-w", "gpu05")
    slurm_bed.await_job(urgent, "RUNNING")
    assert slurm_bed.await_job(low, "PENDING")["Restarts"] == "1"
    cancel(slurm_bed, low, urgent)
    slurm_bed.slurm("scontrol", "update", "PartitionName=low", "GraceTime=10", user="root")
    assert slurm_bed.read("head", "/home/alice/preempted") == "warned\n"


@pytest.mark.campaign
def test_a_lost_slurmd_requeues_the_job_whose_old_copy_runs_on(slurm_bed: SlurmBed) -> None:
    job = slurm_bed.sbatch("exec sleep 4331")
    node = slurm_bed.await_job(job, "RUNNING")["NodeList"]
    with slurm_bed.slurmd_killed(node):
        assert poll(lambda: slurm_bed.job(job).get("Restarts") == "1", 40)
        other = slurm_bed.await_job(job, "RUNNING")["NodeList"]
        where = {line.split()[0] for line in slurm_bed.processes() if "sleep 4331" in line}
        assert other != node and where == {node, other}
    slurm_bed.await_job(job, "RUNNING")
    cancel(slurm_bed, job)


def test_controller_down_and_back(slurm_bed: SlurmBed) -> None:
    job = slurm_bed.sbatch("sleep 600")
    asked = ["sacct", "-nPX", "-j", job, "-o", "State"]
    assert poll(lambda: slurm_bed.slurm(*asked) == "RUNNING\n")
    with slurm_bed.controller_down():
        for argv in (["squeue", "-h"], ["sbatch", "--wrap", "true"]):
            with pytest.raises(TestbedError, match="Unable to contact slurm controller"):
                slurm_bed.slurm(*argv)
        assert slurm_bed.slurm(*asked) == "RUNNING\n"
    assert slurm_bed.await_job(job, "RUNNING")["Restarts"] == "0"
    cancel(slurm_bed, job)


def test_accounting_down_and_back(slurm_bed: SlurmBed) -> None:
    with slurm_bed.accounting_down():
        with pytest.raises(TestbedError, match="Connection refused"):
            slurm_bed.slurm("sacct", "-n")
        job = slurm_bed.sbatch("true")
    assert poll(lambda: slurm_bed.slurm("sacct", "-nPXj", job, "-o", "State") == "COMPLETED\n", 20)


def test_power_cut_and_munge_killed(slurm_bed: SlurmBed) -> None:
    with slurm_bed.power_cut("gpu03"), slurm_bed.daemon_down("gpu04", "munged", "kill9"):
        assert slurm_bed.slurm("srun", "-w", "gpu02", "hostname") == "gpu02\n"
    slurm_bed.await_idle_nodes()
    assert slurm_bed.slurm("srun", "-w", "gpu[03-04]", "-N2", "hostname").split() in (
        ["gpu03", "gpu04"], ["gpu04", "gpu03"])


def test_without_accounting(slurm_bed_bare: SlurmBed) -> None:
    bed = slurm_bed_bare
    job = bed.sbatch("true")
    assert bed.await_job(job, "COMPLETED")["Partition"] == "main"
    with pytest.raises(TestbedError, match=recorded.answer("sacct.disabled").stderr.strip()):
        bed.slurm("sacct")


def test_calls_are_counted(slurm_bed: SlurmBed) -> None:
    with slurm_bed.calls() as calls:
        slurm_bed.queue("alice")
        assert calls.lines() == ["squeue -h -o %i|%u|%T|%r|%j -u alice"]
        calls.forget()
        slurm_bed.node_states()
        assert calls.count() == {"sinfo": 1}
    assert slurm_bed.queue() == []


def test_tools_can_be_replaced(slurm_bed: SlurmBed) -> None:
    with slurm_bed.replaced_tools("head", {"squeue": "#!/bin/sh\necho busy >&2; exit 1\n"}):
        with pytest.raises(TestbedError, match="busy"):
            slurm_bed.queue()


def test_what_a_test_leaves_in_the_queue_is_found_and_removed(slurm_bed: SlurmBed) -> None:
    slurm_bed.sbatch("sleep 600", "--job-name=forgotten")
    slurm_bed.slurm("scontrol", "update", "NodeName=gpu02", "State=DRAIN", "Reason=test", user="root")
    found = leftovers(slurm_bed, Counter(slurm_bed.mounts()), patience_s=0.5)
    assert [line for line in found if line.startswith("job: ") and "forgotten of alice" in line]
    assert "node: gpu02 is drained" in found
    assert not leftovers(slurm_bed, Counter(slurm_bed.mounts()))


def test_cluster_yaml(slurm_bed: SlurmBed) -> None:
    outside = yaml.safe_load(slurm_bed.slurm_cluster("bob", ssh_nodes={"bare": "gpu05"}, partition="low"))
    assert outside["ssh_config"] == str(slurm_bed.ssh_config("bob"))
    assert outside["nodes"]["lab"]["login"] == "head" and outside["nodes"]["lab"]["partition"] == "low"
    assert outside["nodes"]["bare"]["host"] == "gpu05"
    inside = yaml.safe_load(slurm_bed.slurm_cluster(login="here"))
    assert "ssh_config" not in inside and inside["nodes"]["lab"]["workdir"] == "/home/alice/launch"


@pytest.mark.testbed
def test_down_leaves_nothing_of_running_jobs() -> None:
    bed = need(SlurmBed(f"slurm-down-{os.getpid()}", accounting=False))
    try:
        bed.up()
        bed.await_job(bed.sbatch("sleep 4332", "-N5", "--exclusive"), "RUNNING")
        bed.fault("head", "kill9", "slurmctld")
        bed.up()  # repairs
        assert bed.node_states() == dict.fromkeys(GPU_NODES, "idle")
        bed.await_job(bed.sbatch("sleep 4332", "-N5", "--exclusive"), "RUNNING")
    finally:
        bed.down()
    assert not bed.root.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/*{bed.name}"))
