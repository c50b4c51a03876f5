"""A kill is done when nothing of the job is left, and nothing else was touched."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from cluster.events import AttemptEnded, Reason
from cluster.node import control, process
from cluster.spec import PythonEnv, ResumeRule, RestartPolicy
from cluster.states import Cancelled
from tests.helpers import wait_until
from tests.node.conftest import Job

MakeJob = Callable[..., Job]
Script = Callable[[str], str]

# A tree as nasty as they come. Each member writes its pid; all but the root ignore SIGTERM.
NASTY = r"""
import os, signal, subprocess, sys, time
pids = open(sys.argv[1], "a", buffering=1)
def stubborn(name):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pids.write(f"{name} {os.getpid()}\n")
    while True:
        time.sleep(1)
def fork(function, *args):
    if os.fork() == 0:
        function(*args)
        os._exit(0)
def daemon():                      # double fork and setsid: init would be its parent
    os.setsid()
    fork(stubborn, "daemon")
def renamed():                     # setproctitle writes over the environment in /proc
    import setproctitle
    setproctitle.setproctitle("kworker/0:1")
    stubborn("renamed")
fork(stubborn, "plain")
fork(daemon)
fork(renamed)
bare = "import os, signal, time; signal.signal(15, 1); os.setsid(); print('bare', os.getpid(), flush=True); " \
       "time.sleep(99)"
subprocess.Popen([sys.executable, "-c", bare], env={}, stdout=pids)
stubborn("root")
"""
WORKERS = """
import os, signal, sys, time
pids = open(sys.argv[1], "a", buffering=1)
for _ in range(3):
    if os.fork() == 0:
        pids.write(f"worker {os.getpid()}\\n")
        time.sleep(99)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
pids.write("ready 0\\n")
while not stop:
    time.sleep(0.02)
time.sleep(float(sys.argv[2]))
alive = 0
for line in open(sys.argv[1]):
    alive += line.startswith("worker") and open(f"/proc/{line.split()[1]}/stat").read().split()[2] not in "ZX"
print("saved with", alive, "workers alive", flush=True)
os.killpg(0, signal.SIGKILL)
"""


def pids_in(path, count: int) -> dict[str, int]:
    lines = wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= count and
                       path.read_text().splitlines(), what=f"{count} processes in {path}")
    return {line.split()[0]: int(line.split()[1]) for line in lines}


def test_a_nasty_tree_is_gone_and_its_neighbours_live(make_job: MakeJob, script: Script, tmp_path) -> None:
    pids, source = tmp_path / "pids", script(NASTY)
    job = make_job("python", source, str(pids)).start()
    family = pids_in(pids, 5)
    neighbour = subprocess.Popen([sys.executable, source, str(tmp_path / "other")])
    others = pids_in(tmp_path / "other", 5)
    asked = time.monotonic()
    status = job.stop(grace_s=0.5)
    took = time.monotonic() - asked
    try:
        assert isinstance(status, Cancelled) and status.reason is Reason.KILLED and "SIGKILL" in status.detail
        assert not [name for name, pid in family.items() if psutil.pid_exists(pid)]
        assert all(psutil.pid_exists(pid) for pid in others.values())
        assert took < 0.5 + 2 + 1
    finally:
        for pid in others.values():
            psutil.Process(pid).kill()
        neighbour.wait()


def test_a_job_submitted_from_inside_a_job_outlives_it(make_job: MakeJob, script: Script) -> None:
    inner = make_job("command", "sleep", "60")
    start = script("import subprocess, sys\n"
                   "subprocess.Popen(sys.argv[1:], start_new_session=True)\nprint('up')\nimport time; time.sleep(99)")
    from tests.node.conftest import SUPERVISE
    outer = make_job("command", sys.executable, start, sys.executable, "-I", "-c", SUPERVISE, "supervise",
                     str(inner.run.path), "--by", "submit").start()
    inner.wait_for("RUNNING")
    assert outer.stop(now=True).reason is Reason.KILLED
    beat = process.read_heartbeat(inner.attempt)
    assert beat and process.alive(beat["pid"], beat["pid_started"]) and inner.state == "RUNNING"
    assert process.members(beat["pid"], inner.spec.token)
    control.ask(inner.run, control.Stop("me@here", now=True))
    inner.wait_for("CANCELLED")
    wait_until(lambda: not process.alive(beat["pid"], beat["pid_started"]))


def test_only_the_rank_hears_sigterm_and_has_its_helpers_while_it_saves(
        make_job: MakeJob, script: Script, tmp_path) -> None:
    job = make_job("python", script(WORKERS), str(tmp_path / "pids"), "0.5").start()
    pids_in(tmp_path / "pids", 4)
    assert job.stop(grace_s=10).reason is Reason.KILLED
    assert "saved with 3 workers alive" in job.log()


def test_ranks_of_a_torchrun_inside_a_command_are_told_and_not_their_launcher(
        make_job: MakeJob, script: Script) -> None:
    rank = "import os, signal, time\n" \
           "def save(*_): print('rank %s saved' % os.environ['RANK'], flush=True); os._exit(0)\n" \
           "signal.signal(signal.SIGTERM, save); print('up %s' % os.environ['RANK'], flush=True); time.sleep(99)"
    launcher = script("import os, subprocess, sys\n"
                      "ranks = [subprocess.Popen([sys.executable, sys.argv[1]], env={**os.environ, 'RANK': str(r), "
                      "'LOCAL_RANK': str(r)}) for r in (0, 1)]\nprint([r.wait() for r in ranks], flush=True)")
    job = make_job("command", "bash", "-c", f"{sys.executable} {launcher} {script(rank)}; echo after").start()
    job.says("up 0"), job.says("up 1")
    job.stop(grace_s=10)
    assert [words for words in ("rank 0 saved", "rank 1 saved", "[0, 0]", "after") if words not in job.log()] == [], job.log()


def test_a_second_stop_can_only_be_faster(make_job: MakeJob) -> None:
    job = make_job("command", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done").start()
    job.says("up")
    assert job.ask(control.Stop("me@here", grace_s=60))
    job.wait_for("STOPPING")
    assert not job.ask(control.Stop("you@there"))
    assert job.stop(now=True).reason is Reason.KILLED


@pytest.mark.parametrize("after", ["; true", " 2>&1 | tee /dev/null; true"])
def test_children_left_by_a_dead_shell_may_save_and_keep_their_helpers_and_their_log(
        make_job: MakeJob, script: Script, after: str) -> None:
    child = script("import os, signal, sys, time\n"
                   "worker = os.fork()\n"
                   "if worker == 0:\n    time.sleep(99)\n"
                   "def save(*_):\n    time.sleep(0.6); print('saved', os.waitpid(worker, os.WNOHANG), flush=True)\n"
                   "    os._exit(0)\n"
                   "signal.signal(signal.SIGTERM, save); print('up', flush=True); time.sleep(99)")
    job = make_job("command", "bash", "-c", f"{sys.executable} {child}{after}").start()
    job.says("up")
    job.stop(grace_s=10)
    assert "saved (0, 0)" in job.log()


@pytest.mark.parametrize("word", ["--verbose", "/etc/hostname"])
def test_a_program_that_says_supervise_is_not_taken_for_another_jobs_supervisor(
        make_job: MakeJob, script: Script, word: str) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(99)"
    job = make_job("python", script(stubborn), "supervise", word).start()
    job.says("up")
    root = json.loads(job.attempt.ranks.joinpath("0.json").read_bytes())
    assert "SIGKILL" in job.stop(grace_s=0.2).detail
    assert not process.alive(root["pid"], root["started"])


def test_a_stop_while_the_environment_hangs_leaves_nothing_of_it(make_job: MakeJob, tmp_path) -> None:
    base, pids = tmp_path / "conda", tmp_path / "pids"
    (base / "etc" / "profile.d").mkdir(parents=True)
    (base / "etc" / "profile.d" / "conda.sh").write_text(f"conda() {{ sleep 99 & echo sleep $! >{pids}; wait; }}\n")
    job = make_job("command", "true", python=PythonEnv("conda", "x", str(base))).start()
    hanging = pids_in(pids, 1)["sleep"]
    assert job.stop().reason is Reason.KILLED
    assert not psutil.pid_exists(hanging)


def test_a_stop_during_the_last_evaluation_is_no_completion(make_job: MakeJob, script: Script) -> None:
    source = script("import json, os, signal, time\n"
                    "file = open(os.environ['LAUNCH_RUN_DIR'] + '/attempts/000/metrics.jsonl', 'a', buffering=1)\n"
                    "def say(**line): file.write(json.dumps({'t': time.time(), 'step': 9, 'total': 9, **line}) + '\\n')\n"
                    "def stop(*_): say(event='stopped'); os._exit(0)\n"
                    "signal.signal(signal.SIGTERM, stop); say(loss=1); print('up', flush=True); time.sleep(99)")
    job = make_job("python", source, resume_rule=ResumeRule("launch")).start()
    job.says("up")
    assert job.stop().reason is Reason.KILLED and "at step 9" in job.status.detail


def test_a_run_directory_that_was_removed_keeps_nobody_from_ending_the_job(make_job: MakeJob, script: Script) -> None:
    job = make_job("python", script("import time; print('up'); time.sleep(99)"), restart=RestartPolicy(3, 0, 0)).start()
    job.says("up")
    root = json.loads(job.attempt.ranks.joinpath("0.json").read_bytes())
    shutil.rmtree(job.run.path)
    job.supervisor.terminate()
    job.supervisor.wait(20)
    assert not process.alive(root["pid"], root["started"]) and not job.run.path.exists()


@pytest.mark.parametrize("kind", ["command", "torchrun"])
def test_a_stop_before_anything_runs(make_job: MakeJob, kind: str) -> None:
    job = make_job(kind, "sleep", "60")
    job.ask(control.Stop("me@here"))
    job.start()
    assert job.ended().reason is Reason.KILLED
    assert [event.reason for event in job.events if isinstance(event, AttemptEnded)] == [Reason.KILLED]
