"""Submitting to a real SLURM, from a laptop through the login node: refusals, lost answers, exactly one job."""
from __future__ import annotations

import json
import sys

import pytest
import yaml

from tests.testbed.bed import poll
from tests.testbed.slurmbed import REAL_TOOLS, SlurmBed

from .lab import Lab

HOLD = ("--", "sleep", "600")
RUNS = "/home/alice/launch/runs"


@pytest.fixture(autouse=True)
def cluster_alone(slurm: Lab) -> None:
    """Its machines are known to SLURM only, not as nodes that ssh reaches."""
    changed(slurm)


def changed(lab: Lab, **entry: object) -> None:
    """The cluster is all that cluster.yaml names, with `entry`."""
    assert lab.cluster
    read = yaml.safe_load(lab.cluster.read_text())
    read["nodes"] = {"lab": read["nodes"]["lab"] | entry}
    lab.cluster.write_text(yaml.safe_dump(read))


def nothing_there(bed: SlurmBed) -> bool:
    return not bed.queue("alice") and not bed.sh("head", f"ls {RUNS} 2>/dev/null || true").strip()


def ids(lab: Lab, job: str) -> list[str]:
    return json.loads((lab.seen_here(lab.run_dir(job)) / "slurm.json").read_bytes())["ids"]


def test_a_dry_run_shows_what_sbatch_would_be_given(slurm: Lab, slurm_bed: SlurmBed) -> None:
    said = slurm.launch("submit", "--node", "gpu04", "--gpus", "2", "--time", "90m", "--dry-run", "--", "true").stdout
    for line in ("nodelist=gpu04", "gres=gpu:2", "cpus-per-task=4", "time=90", "signal=USR1@120", "requeue"):
        assert f"#SBATCH --{line}\n" in said
    assert nothing_there(slurm_bed)


REFUSED = (
    (("--node", "lab:nix"), {}, "neither a partition nor a machine 'nix'"),
    (("--node", "gpu77"), {}, "no such node: 'gpu77'"),
    (("--gpus", "9"), {}, "the default partition has no nodes for so much at once: nodes 1, gres gpu:9"),
    (("--nodes", "6"), {}, "the default partition has no nodes for so much at once: nodes 6"),
    ((), {"sbatch": {"account": "nix"}}, "you may not use the account nix"),
    ((), {"sbatch": {"acount": "lab"}}, "sbatch has no option --acount"),
    ((), {"sbatch": {"mem": "900G"}}, "mem 900G"),
    ((), {"sbatch": {"time": 5}}, "use --time"),
    ((), {"sbatch": {}, "partition": "nix"}, "there is no partition nix"),
)


def test_what_slurm_refuses_is_said_in_a_persons_words_and_leaves_nothing(slurm: Lab, slurm_bed: SlurmBed) -> None:
    for words, entry, says in REFUSED:
        changed(slurm, **entry)
        where = () if "--node" in words else ("--node", "lab")
        said = slurm.launch("submit", *where, *words, *HOLD, code=2)
        assert says in said.stderr and said.stdout == "", (words, entry)
    changed(slurm, partition=None)
    assert nothing_there(slurm_bed)


def test_a_machine_of_the_cluster_is_aimed_at_by_its_name_and_a_restart_keeps_the_run_directory(
        slurm: Lab, slurm_bed: SlurmBed) -> None:
    changed(slurm, partition="low")
    job = slurm.submit("--node", "gpu03", "--gpus", "1", "--name", "aimed", "--", "sh", "-c", "uname -n")
    slurm.launch("wait", job)
    first, directory = ids(slurm, job), slurm.run_dir(job)
    assert slurm.logs(job) == "gpu03\n"
    again = slurm.launch("restart", "aimed")
    assert "attempt 1, in SLURM's queue as" in again.stderr
    slurm.launch("wait", job)
    assert slurm.run_dir(job) == directory and ids(slurm, job)[0] == first[0] and len(ids(slurm, job)) == 2
    assert slurm.status(job)["attempt"] == 1 and slurm.logs(job, "--attempt", "all") == "gpu03\ngpu03\n"


@pytest.mark.parametrize("after", [
    "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1",
    "kill -9 $PPID",  # submitit, before it read the answer
])
def test_a_job_whose_answer_was_lost_is_in_the_queue_once(slurm: Lab, slurm_bed: SlurmBed, after: str) -> None:
    lost = f'#!/bin/sh\n{REAL_TOOLS}/sbatch "$@" || exit\ncase "$1" in --test-only) exit 0;; esac\n{after}\n'
    with slurm_bed.replaced_tools("head", {"sbatch": lost}):
        job = slurm.submit(*HOLD)
    (queued,) = slurm_bed.queue("alice")
    assert queued.name == job and ids(slurm, job) == [queued.id]
    slurm.launch("kill", "--now", job)


def test_without_its_controller_nothing_is_submitted_and_that_is_an_exit_code_of_its_own(
        slurm: Lab, slurm_bed: SlurmBed) -> None:
    with slurm_bed.controller_down():
        said = slurm.launch("submit", "--node", "lab", *HOLD, code=3)
        assert "SLURM's controller does not answer" in said.stderr
    assert nothing_there(slurm_bed)


def test_a_controller_that_goes_away_in_between_leaves_a_question_that_the_next_command_answers(
        slurm: Lab, slurm_bed: SlurmBed) -> None:
    """sbatch fails and so does squeue: nobody knows whether the job is there."""
    down = "#!/bin/sh\necho 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1\n"
    sbatch = f'#!/bin/sh\ncase "$1" in --test-only) exec {REAL_TOOLS}/sbatch "$@";; esac\n' + down.partition("\n")[2]
    with slurm_bed.replaced_tools("head", {"sbatch": sbatch, "squeue": down}):
        said = slurm.launch("submit", "--node", "lab", "--name", "lost", *HOLD, code=3)
        assert "launch status finds out" in said.stderr
    assert not slurm_bed.queue("alice")
    slurm.launch("status")
    assert poll(lambda: nothing_there(slurm_bed), 5.0)


def test_without_submitit_on_the_login_node_it_is_said_how_to_get_it(slurm: Lab, slurm_bed: SlurmBed) -> None:
    changed(slurm, agent_python="/usr/bin/python3")
    said = slurm.launch("submit", "--node", "lab", *HOLD, code=2).stderr
    assert "/usr/bin/python3 -m pip install --user" in said and "submitit" in said
    assert nothing_there(slurm_bed)


def test_a_python_of_the_login_node_that_has_submitit_is_found(slurm: Lab, slurm_bed: SlurmBed) -> None:
    """The jobs' own Python and those on the PATH do not have it, that of a conda base does."""
    changed(slurm, env={"python": "/usr/bin/python3"})
    slurm_bed.exec("head", "sh", "-ec", f"""mkdir -p ~/miniconda3/bin; cd ~/miniconda3/bin
        printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' >python; chmod 755 python""", user="alice")
    try:
        slurm.launch("submit", "--node", "lab", "--dry-run", *HOLD)
    finally:
        slurm_bed.exec("head", "rm", "-r", "/home/alice/miniconda3")
