"""What sbatch is told about a job, what it says when it refuses one, and what sinfo shows."""
from __future__ import annotations

import pytest

from cluster.errors import ClusterError, Refused, Unreachable, Unusable
from cluster.node.machines import Machine, machines
from cluster.node.refusals import refusal
from cluster.node.sbatch_options import environment, mark, options_of
from cluster.spec import JobSpec, Slurm
from tests.cluster.jobs import command
from tests.slurm.fake import FakeSlurm
from tests.slurm.recorded import Answer, answer

GPU = [Machine(f"gpu0{number}", "gpu", True, 64, 8, 86400.0, "idle") for number in (1, 2)]
CPU = [Machine("cpu01", "cpu", False, 32, 0, None, "idle")]


def job(options: dict[str, str | int | bool] | None = None, partition: str | None = None, nodelist: str | None = None,
        **more: object) -> JobSpec:
    return command("true", id="job-1", token="t0", slurm=Slurm(partition, nodelist, options or {}), **more)


def told(spec: JobSpec, dependency: str | None = None) -> dict[str, str | int | bool]:
    return options_of(spec, "/w/runs/job-1", [*GPU, *CPU], dependency)


def test_every_job_is_told_apart_warned_and_requeued() -> None:
    assert told(job()) == {
        "job-name": "job-1", "comment": mark("t0"), "nodes": 1, "ntasks-per-node": 1, "signal": "USR1@120",
        "open-mode": "append", "kill-on-invalid-dep": "yes", "chdir": "/w/runs/job-1", "requeue": True,
        "cpus-per-task": 1}


def test_what_is_asked_for_reaches_sbatch() -> None:
    found = told(job(partition="gpu", nodelist="gpu02", gpus=2, nodes=1, time_s=5400), "afterok:7")
    assert {key: found[key] for key in ("partition", "nodelist", "gres", "time", "dependency", "cpus-per-task")} == {
        "partition": "gpu", "nodelist": "gpu02", "gres": "gpu:2", "time": 90, "dependency": "afterok:7",
        "cpus-per-task": 16}
    assert told(job(nodes=2, gpus=8))["nodes"] == 2
    assert told(job(time_s=61))["time"] == 2


@pytest.mark.parametrize(("time_s", "grace_s", "signal"), [
    (None, None, "USR1@120"), (60, None, "USR1@30"), (86400, None, "USR1@120"), (86400, 600, "USR1@600"),
    (300, 600, "USR1@150")])
def test_the_warning_leaves_time_to_save_and_to_work(time_s: float | None, grace_s: float | None, signal: str) -> None:
    assert told(job(time_s=time_s, grace_s=grace_s))["signal"] == signal


@pytest.mark.parametrize(("given", "gres"), [
    ({}, "gpu:2"), ({"gres": "gpu:a100"}, "gpu:a100:2"), ({"gres": "nvme:1"}, "nvme:1,gpu:2"),
    ({"gres": "gpu:a100:4"}, "gpu:a100:4"), ({"gres": "gpu:a100,nvme:1"}, "gpu:a100:2,nvme:1")])
def test_gpus_are_asked_for_by_their_type_when_one_is_given(given: dict[str, str], gres: str) -> None:
    assert told(job(given, gpus=2))["gres"] == gres


def test_other_ways_to_ask_for_gpus_and_cpus_are_left_alone() -> None:
    found = told(job({"gpus-per-node": "a100:2", "cpus_per_gpu": 12, "mem": "90G"}, gpus=2))
    assert (found["gpus-per-node"], found["cpus-per-gpu"], found["mem"]) == ("a100:2", 12, "90G")
    assert not {"gres", "cpus-per-task", "cpus_per_gpu"} & found.keys()


def test_an_option_can_be_switched_off_and_a_comment_stands_behind_ours() -> None:
    found = told(job({"exclusive": False, "no-requeue": True, "comment": "for the paper"}))
    assert "exclusive" not in found and "requeue" not in found and found["no-requeue"] is True
    assert found["comment"] == f"{mark('t0')} for the paper"


def test_an_option_of_several_lines_is_refused_for_sbatch_reads_none_after_it() -> None:
    with pytest.raises(Unusable, match="--comment.*line break"):
        told(job({"comment": "for\nthe paper"}))


def test_a_limit_that_the_partition_does_not_give_is_refused_before_it_waits_for_ever() -> None:
    with pytest.raises(Unusable, match="1440 minutes at most in partition gpu, this one asks for 1500") as error:
        told(job(time_s=90000, gpus=1))
    assert "--time 1440m" in str(error.value)
    assert told(job(partition="cpu", time_s=90000))["time"] == 1500
    assert told(job(partition="cpu,gpu", time_s=90000))["time"] == 1500


def test_nothing_of_the_environment_overrules_a_job_or_leaks_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_ACCOUNT", "SLURM_JOB_ID", "SLURM_CONF", "SRUN_DEBUG",
                 "LAUNCH_TOKEN"):
        monkeypatch.setenv(name, "x")
    kept = environment({"partition": "gpu", "time": 5})
    assert {"SBATCH_ACCOUNT", "SLURM_CONF", "PATH"} <= kept.keys()
    assert not {"SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SLURM_JOB_ID", "SRUN_DEBUG", "LAUNCH_TOKEN"} & kept.keys()


ASKED = {"partition": "gpu", "account": "nix", "constraint": "nix", "nodelist": "gpu77", "gres": "gpu:9", "nodes": 1}


@pytest.mark.parametrize(("said", "kind", "words"), [
    ("test-only.partition", Unusable, "there is no partition gpu"),
    ("test-only.account", Unusable, "the account nix in partition gpu"),
    ("test-only.impossible", Unusable, "partition gpu has no nodes for so much at once: nodes 1, nodelist gpu77, gres gpu:9"),
    ("test-only.nodes", Unusable, "partition gpu has no nodes"),
    ("test-only.constraint", Unusable, "no node has the constraint nix"),
    ("test-only.nodelist", Unusable, "there is no such node: nodelist gpu77"),
    ("test-only.gres", Unusable, "this SLURM knows no gpu:9"),
    ("test-only.array-size", Unusable, "more than this SLURM allows"),
    ("sbatch.unknown-option", Unusable, "sbatch has no option --nonsense"),
    ("sbatch.controller-down", Unreachable, "SLURM's controller does not answer"),
    ("sbatch.controller-hung", Unreachable, "SLURM's controller does not answer"),
    ("test-only.controller-down", Unreachable, "SLURM's controller does not answer"),
    ("sbatch.munge-down", Unreachable, "SLURM does not know who you are"),
    (Answer(stderr="sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"),
     Refused, "a limit of your account or qos"),
    (Answer(stderr="sbatch: error: Batch job submission failed: User's group not permitted to use this partition"),
     Refused, "you may not submit to partition gpu"),
    (Answer(stderr="sbatch: fatal: Could not establish a configuration source"), Unusable,
     "this machine belongs to no SLURM cluster (SLURM: Could not"),
    (Answer(stderr="sbatch: error: The flux capacitor is cold"), Unusable, "SLURM refuses it: The flux capacitor is cold"),
])
def test_a_refusal_is_said_in_a_persons_words_with_slurms_own(said: str | Answer, kind: type[ClusterError],
                                                               words: str) -> None:
    error = refusal((answer(said) if isinstance(said, str) else said).stderr, ASKED)
    assert type(error) is kind and words in error.what, error


def test_the_machines_are_those_that_sinfo_shows(fake_slurm: FakeSlurm) -> None:
    found = machines()
    assert [one.name for one in found] == [f"gpu0{number}" for number in range(1, 6)]
    assert {(one.partition, one.default, one.cpus, one.gpus, one.limit_s) for one in found} == {
        ("main", True, 16, 8, None)}
    fake_slurm.say("sinfo", Answer("c1|long|idle|nvme:1,gpu:a100:4(S:0-1),gpu:t4:2|32+|1|up|7-01:00:00\nodd line\n"))
    assert machines() == [Machine("c1", "long", False, 32, 6, 7 * 86400 + 3600.0, "idle")]
    fake_slurm.say("sinfo", "sinfo.controller-down")
    with pytest.raises(Unreachable):
        machines()
