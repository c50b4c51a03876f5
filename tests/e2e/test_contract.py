"""What holds wherever a job runs: on this computer, over ssh, on SLURM from its login node and from a laptop."""
from __future__ import annotations

import json

from cluster.contract import RunDir, merged_metrics
from tests.helpers import wait_until

from .kill_points import reference, steps
from .lab import Lab

HARD = ["a b", "it's", 'say "hi"', "$HOME `id`", "line\nline\n", "쥐 실험", "*?[x]{a,b}", "-x", "", "%j %t"]
ECHO = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), sys.stdin.read()]))"


def test_a_command_runs_as_it_was_typed_and_its_output_is_exact(place: Lab) -> None:
    job = place.submit("--name", "쥐 $X", "--", "python", "-c", ECHO, *HARD)
    place.launch("wait", "쥐 $X", timeout_s=120)
    argv, cwd, stdin = json.loads(place.logs(job))
    view = place.status(job)
    assert argv == HARD and stdin == ""
    assert cwd == f"{view['run_dir']}/code"
    assert (view["state"], view["reason"], view["attempt"], view["name"]) == ("COMPLETED", "done", 0, "쥐 $X")
    assert view["started_at"] <= view["ended_at"]


def test_a_failure_is_told_with_its_first_exception(place: Lab) -> None:
    fails = place.launch("submit", "--node", place.node, "--follow", "--", "python", "-c",
                         "print('so far'); raise ValueError('the cause')", code=1, timeout_s=120)
    assert "so far" in fails.stdout and "the cause" in fails.stderr
    (view,) = [one for one in json.loads(place.launch("status", "--all", "--json").stdout)]
    assert view["state"] == "FAILED" and "ValueError: the cause" in view["detail"]


def test_killed_and_restarted_it_loses_nothing(place: Lab) -> None:
    job = place.submit("tiny", "--set", "steps=120")
    run = RunDir(place.seen_here(place.run_dir(job)))
    wait_until(lambda: any(line["step"] >= 12 for line in merged_metrics(run)), 90, f"{job} at step 12")
    assert place.status(job)["state"] == "RUNNING"
    killed = place.launch("kill", job, timeout_s=120)
    assert "checkpoint at step" in killed.stdout + killed.stderr
    view = place.status(job)
    assert view["state"] == "CANCELLED" and view["checkpoint_step"] >= 12, view
    kept = view["checkpoint_step"]
    place.launch("restart", job, timeout_s=120)
    place.launch("wait", job, timeout_s=120)
    assert steps(place, job) == reference(place, 2, 120), "as if nothing had happened, bit for bit"
    view = place.status(job)
    assert view["attempt"] == 1 and view["resume_step"] == kept, view
    assert "--set" in place.launch("restart", job, code=4).stderr, "there is nothing left to do"
    assert not place.left_over(), "of a job that is complete"


def test_killed_while_it_starts_it_ends_once(place: Lab) -> None:
    job = place.submit("tiny", "--set", "steps=4000")
    place.launch("kill", job, "--now", timeout_s=120)
    assert place.status(job)["state"] == "CANCELLED"
    assert place.launch("wait", job, code=1).returncode == 1
    assert not place.left_over()
