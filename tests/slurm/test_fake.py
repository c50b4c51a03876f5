"""The fake SLURM says what the real one said."""
from __future__ import annotations

import subprocess
import time

import pytest

from . import recorded
from .fake import FakeSlurm
from .recorded import Answer


def ask(*argv: str, **env: str) -> Answer:
    done = subprocess.run(["env", *(f"{name}={value}" for name, value in env.items()), *argv],
                          capture_output=True, text=True, timeout=20)
    return Answer(done.stdout, done.stderr, done.returncode)


@pytest.mark.parametrize("name", ["sbatch.impossible", "scontrol.hostnames", "scancel.controller-down", "sacct.disabled"])
def test_a_recorded_answer_comes_back(fake_slurm: FakeSlurm, name: str) -> None:
    tool, *argv = recorded.command(name)
    fake_slurm.say(tool, name)
    assert ask(tool, *argv) == recorded.answer(name)
    assert fake_slurm.calls() == [[tool, *argv]]


def test_squeue_prints_the_columns_asked_for(fake_slurm: FakeSlurm) -> None:
    fake_slurm.jobs(recorded.queued("running", JobID="7", JobArrayID="7", Name="a|b"),
                    recorded.queued("pending.resources", JobID="8", JobArrayID="8", UserName="bob"))
    assert ask("squeue", "-h", "-t", "all", "-O", "JobID:|,State:|,Reason:|,Name:|").stdout == (
        "7|RUNNING|None|a|b|\n8|PENDING|Resources|wrap|\n")
    assert ask("squeue", "-h", "-u", "bob", "-O", "JobID:;").stdout == "8;\n"
    assert ask("squeue", "-h", "-j", "8,9", "-O", "JobID:|").stdout == "8|\n"
    assert ask("squeue", "-h", "-j", "9", "-O", "JobID:|") == recorded.answer("squeue.unknown-id")
    started = ask("squeue", "-h", "-j", "7", "-O", "StartTime:|", SLURM_TIME_FORMAT="%s").stdout
    assert started.rstrip("|\n").isdecimal()


def test_sacct_prints_the_columns_asked_for(fake_slurm: FakeSlurm) -> None:
    fake_slurm.past(recorded.accounted("timeout", JobID="7"), recorded.accounted("cancelled", JobID="8"))
    assert ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", "7,8,9").stdout == (
        "7|TIMEOUT\n8|CANCELLED by 2001\n")
    assert ask("sacct", "-nXP", "--format=JobID", "-j", "9") == Answer()
    assert ask("sacct", "-nXP", "-o", "Restarts").code == 1


def test_words_in_its_mouth_come_in_order_and_the_last_stays(fake_slurm: FakeSlurm) -> None:
    ask("squeue", "-h", "-O", "JobID:|")
    fake_slurm.say("squeue", "squeue.controller-down", Answer("FOO BAR\n"))
    assert [ask("squeue", "-h").code for _ in range(3)] == [1, 0, 0]
    assert ask("squeue").stdout == "FOO BAR\n"
    fake_slurm.say("squeue", Answer(hang_s=0.3))
    began = time.monotonic()
    ask("squeue")
    assert time.monotonic() - began > 0.3
    assert fake_slurm.count() == {"squeue": 6}


def test_sbatch_counts(fake_slurm: FakeSlurm) -> None:
    assert ask("sbatch", "job.sh").stdout == "Submitted batch job 101\n"
    assert ask("sbatch", "--parsable", "job.sh").stdout == "102\n"
    assert ask("sbatch", "--test-only", "job.sh").stderr.startswith("sbatch: Job ")
