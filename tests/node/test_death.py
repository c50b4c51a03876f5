"""When the supervisor or torchrun is killed, the ranks save and end; nothing goes on unseen."""
from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cluster.contract import checkpoint_name
from cluster.events import Launched, Reason
from cluster.node import kill, process, view
from cluster.spec import ResumeRule, RestartPolicy
from tests.helpers import wait_until
from tests.node.conftest import Job

MakeJob = Callable[..., Job]
Script = Callable[[str], str]

# Two ranks that count, agree on their stop step, and save on SIGTERM, with our metrics and checkpoints.
TRAINER = '''
import hashlib, json, os, signal, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, total = dist.get_rank(), int(sys.argv[1])
run, attempt, resume = os.environ["LAUNCH_RUN_DIR"], int(os.environ["LAUNCH_ATTEMPT"]), os.environ["LAUNCH_RESUME"]
def say(**line):
    if rank == 0:
        with open(f"{run}/attempts/{attempt:03d}/metrics.jsonl", "a") as file:
            file.write(json.dumps({"t": time.time(), "total": total, **line}) + "\\n")
def save(step):
    if rank == 0:
        name = f"step-{step:08d}-a{attempt:03d}"
        aside = f"{os.environ['LAUNCH_CHECKPOINT_DIR']}/.tmp-{name}"
        os.mkdir(aside)
        open(f"{aside}/state", "w").write(str(step))
        files = {"state": {"size": len(str(step)), "sha256": hashlib.sha256(str(step).encode()).hexdigest()}}
        json.dump({"version": 1, "job": "j", "attempt": attempt, "step": step, "resumed_from": resume or None,
                   "files": files}, open(f"{aside}/manifest.json", "w"))
        os.rename(aside, f"{os.environ['LAUNCH_CHECKPOINT_DIR']}/{name}")
        say(step=step, event="checkpoint", save_s=0.1)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
step = int(open(f"{resume}/state").read()) if resume else 0
say(step=step, event="resumed")
print("rank", rank, "of", dist.get_world_size(), "from", step, flush=True)
while step < total:
    step += 1
    time.sleep(0.05)
    flag = torch.tensor([len(stop)])
    dist.all_reduce(flag)
    say(step=step, loss=1 / step)
    if flag.item():
        save(step)
        say(step=step, event="stopped")
        break
dist.destroy_process_group()
'''


def rank_identity(job: Job, rank: int) -> tuple[int, int]:
    path = job.attempt.ranks / f"{rank}.json"
    said = wait_until(lambda: path.exists() and json.loads(path.read_bytes()), 20, f"rank {rank}")
    return said["pid"], said["started"]


def test_kill_9_of_the_supervisor_lets_a_rank_save(make_job: MakeJob, script: Script) -> None:
    source = script("import os, signal, time\n"
                    "def save(*_): time.sleep(0.3); print('saved', flush=True); os._exit(0)\n"
                    "signal.signal(signal.SIGTERM, save); print('up', flush=True); time.sleep(99)")
    job = make_job("python", source).start()
    job.says("up")
    rank = rank_identity(job, 0)
    job.supervisor.kill()
    job.supervisor.wait()
    wait_until(lambda: not process.alive(*rank), what="the rank has ended")
    assert "saved" in job.log()
    heard = process.heard(job.attempt)
    assert heard and not heard.alive and not heard.rebooted


def test_the_program_is_a_likelier_victim_of_the_kernel_than_its_supervisor(make_job: MakeJob) -> None:
    job = make_job("command", "cat", "/proc/self/oom_score_adj").start()
    own = int(Path("/proc/self/oom_score_adj").read_text())
    job.ended()
    assert int(job.log()) == 500 > own


def test_a_real_torchrun_through_stop_death_and_resume(make_job: MakeJob, script: Script) -> None:
    job = make_job("torchrun", script(TRAINER), "100000", procs=2, resume_rule=ResumeRule("launch"),
                   restart=RestartPolicy(1, 0.05, 0.05), env={"OMP_NUM_THREADS": "1"}).start()
    job.says("rank 1 of 2 from 0", rank=1)
    agent = next(event for event in job.events if isinstance(event, Launched)).pid
    wait_until(lambda: job.attempt.metrics.read_text().count("loss") > 3)

    os.kill(agent, signal.SIGKILL)  # torchrun dies: its ranks save, the supervisor starts the next attempt
    wait_until(lambda: len(job.run.attempts()) == 2, 20)
    saved = job.endings[0]
    assert saved.reason is Reason.SIGNAL and saved.next == "retry" and saved.checkpoint_step
    assert saved.checkpoint == checkpoint_name(saved.checkpoint_step, 0)
    # Both ranks have taken a step, so both catch the signal.
    wait_until(lambda: job.attempt.metrics.exists() and job.attempt.metrics.read_text().count("loss") > 3, 20)
    job.says(f"from {saved.checkpoint_step}", rank=1)

    status = job.stop(grace_s=20)  # SIGTERM to the ranks: an agreed step, a checkpoint, the ending says both
    ended = job.endings[1]
    assert status.reason is Reason.KILLED and ended.checkpoint_step > saved.checkpoint_step
    assert f"at step {ended.checkpoint_step}, checkpoint at step {ended.checkpoint_step}" in ended.detail
    assert ended.survivors == () and not job.members()


def test_death_of_the_supervisor_ends_torchrun_at_once_and_ranks_by_their_save(
        make_job: MakeJob, script: Script) -> None:
    source = script("import os, signal, time\n"
                    "def save(*_): time.sleep(0.5); print('saved', os.getppid(), flush=True); os._exit(0)\n"
                    "signal.signal(signal.SIGTERM, save); print('up', flush=True); time.sleep(99)")
    job = make_job("torchrun", source, procs=2).start()
    job.says("up"), job.says("up", rank=1)
    ranks = [rank_identity(job, 0), rank_identity(job, 1)]
    agent = next(event for event in job.events if isinstance(event, Launched)).pid
    job.supervisor.kill()
    job.supervisor.wait()
    wait_until(lambda: not any(process.alive(*rank) for rank in ranks), what="the ranks have ended")
    assert all("saved" in job.log(rank) and f"saved {agent}" not in job.log(rank) for rank in (0, 1))
    wait_until(lambda: not process.members(None, job.spec.token))


def test_what_outlives_its_supervisor_is_counted_and_can_be_killed(make_job: MakeJob, tmp_path: Path) -> None:
    """A shell dies of the SIGTERM that tells it; its child is told by nobody."""
    pid = tmp_path / "pid"
    job = make_job("command", "sh", "-c", f"sleep 99 & echo $! > '{pid}'; wait").start()
    child = wait_until(lambda: pid.exists() and pid.read_text().strip(), what="the child")
    job.supervisor.kill()
    job.supervisor.wait()
    wait_until(lambda: not process.alive(*rank_identity(job, 0)), what="the shell has ended")
    seen = view.view_of(job.run)
    assert seen["reason"] == Reason.SUPERVISOR_LOST and "1 of its processes still run" in seen["detail"]
    began = time.monotonic()
    kill.kill({"run_dir": str(job.run.path), "by": "me", "grace_s": 50.0, "now": False}, None)
    assert time.monotonic() - began < 10  # it was told, and a sleep does not wait for the grace to be over
    assert process.start_time(int(child)) is None
    assert "still run" not in view.view_of(job.run)["detail"]
