"""A supervisor inside a SLURM allocation: its signals, what follows an attempt, and two of them at once."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.events import AttemptStarted, Launched, Note, Reason, StopAsked
from cluster.node import control, process
from cluster.node.allocation import repointed
from cluster.node.gpus import Gpu, allocated
from cluster.errors import Unusable
from cluster.node.history import History, read_history, resumed_from
from cluster.spec import ResumeRule, RestartPolicy, Slurm
from cluster.states import Cancelled, Completed, Restarting, Timeout
from tests.helpers import wait_until
from tests.node.conftest import Job

MakeJob = Callable[..., Job]
SAVES = "trap 'n=$(ls | grep -c ckpt-); echo saved > ckpt-$((n+1)); exit 0' TERM; echo up; while :; do sleep 0.05; done"
GLOB = ResumeRule("glob", "ckpt-*", "--from {path}")
FAKE = """#!/bin/sh
cd "$(dirname "$0")"
echo "${0##*/} $*" >>calls
for word in "$@"; do [ -f "${0##*/}-$word" ] && exec sh "./${0##*/}-$word"; done
[ ! -f "${0##*/}.out" ] || cat "${0##*/}.out"
"""


class Scheduler:
    """Programs of SLURM that say what they were told to, and note how they were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        for tool in ("squeue", "scontrol", "sbatch", "sinfo", "srun"):
            (directory / tool).write_text(FAKE)
            (directory / tool).chmod(0o755)
        self.answers("scontrol", "config", "echo 'KillWait                = 6 sec'")
        self.left("1:00:00")

    def left(self, left: str, state: str = "R", preempted: str = "N/A", end: str = "NONE", reason: str = "None") -> None:
        self.answers("squeue", "-O", f"echo '{state} {left} {preempted} {end} {reason}'")

    def answers(self, tool: str, word: str, script: str) -> None:
        aside = self.directory / f".{tool}"
        aside.write_text(script + "\n")
        aside.rename(self.directory / f"{tool}-{word}")

    def warns(self, job: Job, left: str = "0:40") -> None:
        self.left(left)
        job.supervisor.send_signal(signal.SIGUSR1)

    @property
    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def asked(self, count: int = 1) -> None:
        wait_until(lambda: sum("show config" in call for call in self.calls) >= count, what="squeue was asked")

    def start(self, job: Job, id: str = "77", restarts: int = 0, **env: str) -> Job:
        """The supervisor of the job as srun starts it."""
        given = {"SLURM_JOB_ID": id, "SLURM_RESTART_COUNT": str(restarts), "SLURM_PROCID": "0", "SUBMITIT_EXECUTOR": "slurm",
                 "PATH": f"{self.directory}:{os.environ['PATH']}"}
        with open(job.run.path / "supervisor.err", "ab") as errors:
            job.supervisor = subprocess.Popen(process.agent_command("allocated", str(job.run.path)), stderr=errors,
                                              stdin=subprocess.DEVNULL, env={**os.environ, **given, **env}, start_new_session=True)
        return job


@pytest.fixture
def slurm(tmp_path: Path) -> Scheduler:
    return Scheduler(tmp_path / "bin")


@pytest.fixture
def make(make_job: MakeJob) -> MakeJob:
    def made(*argv: str, **fields: object) -> Job:
        job = make_job("command", *argv, **{"slurm": Slurm(), **fields})
        job.run.code.mkdir()
        return job

    return made


def ended(job: Job) -> int:
    job.ended()
    return job.supervisor.returncode


def starts(job: Job) -> list[AttemptStarted]:
    return [event for event in job.events if isinstance(event, AttemptStarted)]


# --- signals ------------------------------------------------------------------------------------------------

def test_the_warning_saves_and_requeues_and_the_next_allocation_resumes(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", f"case $1 in --from) echo from $2; exit;; esac; {SAVES}", "sh", resume_rule=GLOB)
    slurm.start(job).says("up")
    slurm.asked()
    slurm.warns(job)
    assert ended(job) == 1
    assert isinstance(job.status, Restarting) and job.endings[-1].next == "requeue"
    assert job.endings[-1].reason is Reason.TIME_LIMIT and "scontrol requeue 77" in slurm.calls
    [stop] = [event for event in job.events if isinstance(event, StopAsked)]
    assert (stop.by, stop.why) == ("SLURM", "scheduler") and 30 < stop.grace_s < 40

    assert ended(slurm.start(job, restarts=1)) == 0
    assert isinstance(job.status, Completed) and f"from {job.run.code}/ckpt-1" in job.log()
    assert [(start.by, start.slurm_id, start.slurm_restarts) for start in starts(job)] == [("submit", "77", 0), ("scheduler", "77", 1)]


def test_a_warning_far_from_the_end_is_a_preemption_when_squeue_says_so(make: MakeJob, slurm: Scheduler) -> None:
    job = slurm.start(make("sh", "-c", SAVES))
    job.says("up")
    slurm.asked()
    slurm.left("364-23:59:58", preempted="1795277997", end=str(int(time.time()) + 20))
    job.supervisor.send_signal(signal.SIGTERM)  # what SLURM sends where no user signal was asked for
    assert ended(job) == 1
    assert job.endings[-1].reason is Reason.PREEMPTED and "scontrol requeue 77" in slurm.calls
    [stop] = [event for event in job.events if isinstance(event, StopAsked)]
    assert 10 < stop.grace_s < 20


def test_an_early_warning_of_the_time_limit_waits_for_its_time(make: MakeJob, slurm: Scheduler) -> None:
    slurm.left("0:12")
    job = slurm.start(make("sh", "-c", SAVES))
    job.says("up")
    slurm.warns(job, "0:10")
    wait_until(lambda: len([call for call in slurm.calls if "show config" in call]) >= 2)
    assert job.state == "RUNNING"
    slurm.left("0:05")
    assert ended(job) == 1 and job.endings[-1].reason is Reason.TIME_LIMIT


def test_without_a_warning_it_warns_itself_before_the_end(make: MakeJob, slurm: Scheduler) -> None:
    slurm.left("0:02")
    job = slurm.start(make("sh", "-c", SAVES))
    assert ended(job) == 1 and job.endings[-1].reason is Reason.TIME_LIMIT


def test_sigterm_is_the_schedulers_end_and_asks_for_nothing(make: MakeJob, slurm: Scheduler) -> None:
    job = slurm.start(make("sh", "-c", SAVES))
    job.says("up")
    slurm.left("UNLIMITED", "CG")
    job.supervisor.terminate()
    assert ended(job) == 1
    assert (job.endings[-1].reason, job.endings[-1].next) == (Reason.SCHEDULER, "requeue")
    assert not any("requeue" in call for call in slurm.calls) and (job.run.code / "ckpt-1").exists()


def test_a_sigterm_when_the_time_is_over_is_the_time_limit(make: MakeJob, slurm: Scheduler) -> None:
    job = slurm.start(make("sh", "-c", SAVES))
    job.says("up")
    slurm.left("0:00", "CG", reason="TimeLimit")
    job.supervisor.terminate()
    assert ended(job) == 1
    assert job.endings[-1].reason is Reason.TIME_LIMIT and "scontrol requeue 77" in slurm.calls


def test_a_squeue_that_hangs_keeps_nobody_from_saving(make: MakeJob, slurm: Scheduler) -> None:
    slurm.answers("squeue", "-O", "exec sleep 60")
    job = slurm.start(make("sh", "-c", SAVES))
    job.says("up")
    began = time.monotonic()
    job.supervisor.terminate()
    assert ended(job) == 1 and time.monotonic() - began < 8
    assert job.endings[-1].reason is Reason.SCHEDULER and (job.run.code / "ckpt-1").exists()


def test_children_do_not_hear_the_supervisors_signals(make: MakeJob, slurm: Scheduler) -> None:
    job = slurm.start(make("sh", "-c", "echo up; sleep 60"))
    job.says("up")
    for one in job.members():
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            process.send(one.identity, number)
    job.ask(control.Stop("me@here"))  # the bell
    assert ended(job) == 1 and isinstance(job.status, Cancelled) and not job.endings[-1].exit_code == -signal.SIGUSR1


def test_a_kill_overrules_the_scheduler(make: MakeJob, slurm: Scheduler) -> None:
    slow = "trap 'echo told; sleep 1; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    job = slurm.start(make("sh", "-c", slow))
    job.says("up")
    slurm.warns(job)
    job.says("told")
    job.ask(control.Stop("me@here"))
    assert ended(job) == 1 and isinstance(job.status, Cancelled)
    assert not any("requeue" in call for call in slurm.calls)


def test_a_restart_asked_meanwhile_is_done_in_the_next_allocation(make: MakeJob, slurm: Scheduler) -> None:
    slow = "trap 'echo told; sleep 1; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    job = slurm.start(make("sh", "-c", slow))
    job.says("up")
    slurm.warns(job)
    job.says("told")
    new = replace(job.spec, argv=("echo", "changed"))
    job.ask(control.Restart("me@here", spec=new.to_json().decode()))
    assert ended(job) == 1 and job.endings[-1].next == "requeue"
    assert ended(slurm.start(job, restarts=1)) == 0 and "changed" in job.log()


def test_an_id_that_whoever_queued_it_never_heard_is_one_of_the_jobs(make: MakeJob, slurm: Scheduler) -> None:
    job = make("true")
    job.run.slurm.write_text('{"ids": ["70"]}')
    assert ended(slurm.start(job)) == 0
    assert json.loads(job.run.slurm.read_bytes()) == {"ids": ["70", "77"]}


# --- what follows -------------------------------------------------------------------------------------------

def test_where_requeue_is_forbidden_it_goes_on_under_a_new_id(make: MakeJob, slurm: Scheduler) -> None:
    slurm.answers("scontrol", "requeue", "echo 'Requested operation is presently disabled for job 77' >&2; exit 1")
    busy = "if mkdir asked 2>/dev/null; then echo 'Unable to contact slurm controller' >&2; exit 1; fi; "
    slurm.answers("squeue", "-t", busy + "echo '80|afterok:77(unfulfilled),afterany:60(unfulfilled)'; echo '81|afterok:777(unfulfilled)'")
    (slurm.directory / "sbatch.out").write_text("Submitted batch job 78\n")
    (slurm.directory / "sinfo.out").write_text("gpu01|main*|16|gpu:8|infinite|idle\n")
    job = slurm.start(make("sh", "-c", SAVES))
    job.says("up")
    slurm.warns(job)
    assert ended(job) == 1 and job.endings[-1].next == "requeue"
    assert '"78"' in job.run.slurm.read_text()
    [script] = [call.split()[-1] for call in slurm.calls if call.startswith("sbatch ")]
    assert "--dependency=afterany:77" in Path(script).read_text()
    updates = [call for call in slurm.calls if "update" in call]
    assert updates == ["scontrol update JobId=80 Dependency=afterok:78,afterany:60"]


def test_a_job_that_can_neither_be_requeued_nor_continued_ends_and_says_so(make: MakeJob, slurm: Scheduler) -> None:
    slurm.answers("scontrol", "requeue", "echo 'Requested operation is presently disabled' >&2; exit 1")
    (slurm.directory / "sinfo.out").write_text("gpu01|main*|16|gpu:8|infinite|idle\n")
    slurm.answers("sbatch", "--parsable", "exit 1")
    (slurm.directory / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2; exit 1\n")
    job = slurm.start(make("sh", "-c", SAVES))
    job.says("up")
    slurm.warns(job)
    assert ended(job) == 1
    assert isinstance(job.status, Timeout) and "presently disabled" in job.status.detail and "launch restart" in job.status.detail


def test_a_controller_that_does_not_answer_is_asked_again(make: MakeJob, slurm: Scheduler) -> None:
    busy = "rm scontrol-requeue; echo 'slurm_requeue error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    slurm.answers("scontrol", "requeue", busy)
    job = slurm.start(make("sh", "-c", SAVES))
    job.says("up")
    slurm.warns(job)
    assert ended(job) == 1
    assert slurm.calls.count("scontrol requeue 77") == 2 and not any("sbatch" in call for call in slurm.calls)


def test_three_allocations_without_progress_end_it_and_name_the_remedy(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done")
    for restarts in range(3):
        slurm.left("1:00:00")
        slurm.start(job, restarts=restarts)
        wait_until(lambda: len(job.run.attempts()) == restarts + 1 and "up" in job.log())
        slurm.warns(job)
        assert ended(job) == 1
    assert isinstance(job.status, Timeout) and "--time" in job.status.detail
    assert slurm.calls.count("scontrol requeue 77") == 2


def test_a_failure_is_retried_in_the_allocation_while_there_is_time(make: MakeJob, slurm: Scheduler) -> None:
    job = slurm.start(make("sh", "-c", "[ $LAUNCH_ATTEMPT = 1 ] || kill -9 $$", restart=RestartPolicy(1, 0.1, 0.1)))
    assert ended(job) == 0 and [start.by for start in starts(job)] == ["submit", "policy"]
    assert not any("requeue" in call for call in slurm.calls)


def test_a_retry_that_would_not_fit_is_made_in_the_next_allocation(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "sleep 0.3; kill -9 $$", restart=RestartPolicy(1, 0.1, 0.1))
    slurm.left("1:30")
    assert ended(slurm.start(job)) == 1
    assert (job.endings[-1].reason, job.endings[-1].next) == (Reason.SIGNAL, "requeue")
    assert ended(slurm.start(job, restarts=1)) == 1  # max_restarts counts across allocations
    assert job.endings[-1].next == "end" and "given up after 1 restarts" in job.endings[-1].detail


def test_requeues_are_no_restarts_of_the_policy(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", SAVES, resume_rule=GLOB, restart=RestartPolicy(0, 0.1, 0.1))
    for restarts in range(4):
        slurm.start(job, restarts=restarts)
        wait_until(lambda: len(job.run.attempts()) == restarts + 1 and "up" in job.log())
        slurm.left("UNLIMITED", "CG")
        job.supervisor.terminate()
        assert ended(job) == 1
    history = read_history(job.run)
    assert (history.retries, history.idle) == (0, 0) and job.endings[-1].next == "requeue"


def test_a_checkpoint_of_the_same_step_is_no_progress() -> None:
    history = History()
    for resumed in (None, 7, 7, 7):
        history.add(Reason.TIME_LIMIT, 7, 7, resumed, 60.0)
    assert history.idle == 2  # the first reached step 7, the second was the first to go on from there
    assert resumed_from("/run/checkpoints/step-00000007-a003", 7) == 7 and resumed_from("/x/last.pt", None) == "/x/last.pt"
    history.add(Reason.TIME_LIMIT, None, 7, 7, 3600.0)
    assert history.exhausted
    history.add(Reason.PREEMPTED, 8, 8, 7, 60.0)
    assert history.idle == 0


def test_a_request_that_came_while_it_was_pending_is_met_before_anything_starts(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "echo up")
    control.ask(job.run, control.Stop("me@here"))
    assert ended(slurm.start(job)) == 1 and isinstance(job.status, Cancelled) and "me@here" in job.status.detail
    assert not any(isinstance(event, Launched) for event in job.events)


def test_a_node_that_was_lost_leaves_an_attempt_to_go_on_from(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "case $1 in --from) exit 0;; esac; echo x > ckpt-5; echo up; sleep 60", "sh", resume_rule=GLOB)
    slurm.start(job).says("up")
    saved = (job.run.code / "ckpt-5").stat().st_mtime
    wait_until(lambda: process.read_heartbeat(job.attempt)["t"] > saved, what="a heartbeat after the checkpoint")
    job.supervisor.kill()
    job.supervisor.wait()
    process.sweep(None, job.spec.token)
    wait_until(lambda: not process.members(None, job.spec.token))
    assert ended(slurm.start(job, restarts=1)) == 0
    assert [start.by for start in starts(job)] == ["submit", "scheduler"]


DONE_THEN_HANGS = """
import json, os, time
attempt = os.path.join(os.environ["LAUNCH_RUN_DIR"], "attempts", os.environ["LAUNCH_ATTEMPT"].zfill(3))
with open(attempt + "/metrics.jsonl", "a") as file:
    file.write(json.dumps({"t": time.time(), "step": 9, "total": 9, "event": "done"}) + "\\n")
print("up", flush=True)
time.sleep(60)
"""


def power_cut(job: Job) -> None:
    job.supervisor.kill()
    job.supervisor.wait()
    process.sweep(None, job.spec.token)
    wait_until(lambda: not process.members(None, job.spec.token))


def test_a_node_that_was_lost_when_all_was_done_leaves_a_completed_job(make: MakeJob, slurm: Scheduler) -> None:
    """Also when the next node is lost before it could say so."""
    job = make(sys.executable, "-c", DONE_THEN_HANGS, resume_rule=ResumeRule("launch"))
    slurm.start(job).says("up")
    power_cut(job)
    job.run.attempt(1).path.mkdir()
    assert ended(slurm.start(job, restarts=2)) == 0  # so that what waits for it by afterok begins
    assert isinstance(job.status, Completed) and "attempt 0 had done all of it" in job.status.detail
    assert job.endings[-1].step == 9 and not job.run.attempt(2).metrics.exists()
    assert [start.by for start in starts(job)] == ["submit", "scheduler"]


def test_a_node_that_was_lost_after_the_ending_was_written_runs_nothing_again(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "echo x >> ../ran")
    assert ended(slurm.start(job)) == 0 and ended(slurm.start(job, restarts=1)) == 0
    assert (job.run.path / "ran").read_text() == "x\n" and isinstance(job.status, Completed)


def test_a_job_with_more_to_do_since_it_was_done_goes_on(make: MakeJob, slurm: Scheduler) -> None:
    """A person gave it more while SLURM was about to start it again."""
    job = make(sys.executable, "-c", DONE_THEN_HANGS, resume_rule=ResumeRule("launch"))
    slurm.start(job).says("up")
    power_cut(job)
    job.run.spec.write_bytes(replace(job.spec, argv=("sh", "-c", "echo more; exit 3")).to_json())
    assert ended(slurm.start(job, restarts=1)) == 1 and "more" in job.log()


# --- two at once --------------------------------------------------------------------------------------------

def test_of_two_live_supervisors_the_older_ends_and_spoils_nothing(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "echo up; sleep 60")
    older = slurm.start(job)
    older.says("up")
    newer = slurm.start(Job(job.run, job.spec), restarts=1)
    wait_until(lambda: len(job.run.attempts()) == 2 and "up" in job.log())
    job.run.control.joinpath("stop").write_text("{}")  # meant for the newer one, seen by both
    assert ended(older) == 1 and ended(newer) == 1
    first, second = job.endings
    assert (first.reason, first.next) == (Reason.SUPERSEDED, "requeue")
    assert (second.reason, second.next) == (Reason.KILLED, "end") and second.exit_code != 0
    assert isinstance(job.status, Cancelled) and not any("requeue" in call for call in slurm.calls)


def test_an_older_supervisor_notices_by_itself_and_leaves_the_newer_ones_processes(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "echo up; sleep 60", restart=RestartPolicy(5, 0.1, 0.1))
    older = slurm.start(job)
    older.says("up")
    newer = slurm.start(Job(job.run, job.spec), restarts=1)
    older.supervisor.wait(25)  # it looks every 10 s
    assert job.run.attempts()[-1].number == 1 and newer.members()
    newer.stop(now=True)


def test_an_older_copy_that_comes_to_its_end_completes_nothing(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "echo up; read line < $LAUNCH_RUN_DIR/go")
    os.mkfifo(job.run.path / "go")
    slurm.start(job).says("up")
    job.run.attempt(1).path.mkdir()
    (job.run.path / "go").write_text("on\n")
    job.supervisor.wait(20)
    assert job.supervisor.returncode == 1 and job.endings[0].reason is Reason.SUPERSEDED


def test_an_older_supervisor_starts_no_attempt_after_a_newer_one(make: MakeJob, slurm: Scheduler) -> None:
    job = make("sh", "-c", "kill -9 $$", restart=RestartPolicy(5, 3, 3))
    older = slurm.start(job)
    job.wait_for("RESTARTING")
    job.run.attempt(1).path.mkdir()
    older.supervisor.wait(10)
    assert [attempt.number for attempt in job.run.attempts()] == [0, 1]


# --- its world ----------------------------------------------------------------------------------------------

def test_a_job_does_not_believe_that_it_is_one_task_of_srun(make: MakeJob, slurm: Scheduler) -> None:
    job = slurm.start(make(sys.executable, "-c", "import os; print(*os.environ)"), SLURM_STEP_ID="0", SLURM_NTASKS="1",
                      SLURM_TASKS_PER_NODE="1", SLURM_JOB_NODELIST="gpu01", LAUNCH_TOKEN="another")
    assert ended(job) == 0
    names = set(job.log().split())
    assert {"SLURM_JOB_ID", "SLURM_JOB_NODELIST"} <= names
    assert not names & {"SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE", "SUBMITIT_EXECUTOR"}


def test_only_a_completed_job_ends_with_0(make: MakeJob, slurm: Scheduler) -> None:
    assert ended(slurm.start(make("true"))) == 0
    assert ended(slurm.start(make("false"))) == 1
    assert ended(slurm.start(make("no-such-program"))) == 1


CARDS = [Gpu(index, f"GPU-{index}", "H100", 80000, 0, "550") for index in range(4)]


@pytest.mark.parametrize(("visible", "env", "chosen"), [
    (CARDS[:2], {"SLURM_JOB_GPUS": "2,3", "CUDA_VISIBLE_DEVICES": "0,1"}, ["GPU-0", "GPU-1"]),  # the others are hidden
    (CARDS, {"SLURM_JOB_GPUS": "2,3", "CUDA_VISIBLE_DEVICES": "0,1"}, ["GPU-2", "GPU-3"]),
    (CARDS, {"SLURM_JOB_GPUS": "0,1", "SLURM_STEP_GPUS": "2-3"}, ["GPU-2", "GPU-3"]),
    (CARDS, {"CUDA_VISIBLE_DEVICES": "3"}, ["GPU-0", "GPU-1"]),  # SLURM does not count them
    ([], {"SLURM_JOB_GPUS": "2,3"}, []),
])
def test_gpus_are_the_allocations_by_uuid(visible: list[Gpu], env: dict[str, str], chosen: list[str]) -> None:
    assert [gpu.uuid for gpu in allocated(visible, 2, env)] == chosen


def test_an_allocation_with_too_few_gpus_says_so() -> None:
    with pytest.raises(Unusable, match="asks for 2 GPUs, SLURM gave it 1"):
        allocated(CARDS, 2, {"SLURM_JOB_GPUS": "3"})


def test_a_foreign_process_on_the_allocations_gpu_is_a_note(make: MakeJob, slurm: Scheduler) -> None:
    (slurm.directory / "nvidia-smi").write_text(
        "#!/bin/sh\ncase $1 in *apps*) echo 'GPU-b, 4711, 9000, python';; *) echo '0, GPU-b, 80000, 9000, 550, H100';; esac\n")
    (slurm.directory / "nvidia-smi").chmod(0o755)
    job = slurm.start(make("sh", "-c", "echo $CUDA_VISIBLE_DEVICES", gpus=1), SLURM_JOB_GPUS="3", CUDA_VISIBLE_DEVICES="0")
    assert ended(job) == 0 and job.log() == "GPU-b\n"
    assert any(isinstance(event, Note) and "pid 4711 " in event.text and "uses GPU 0" in event.text for event in job.events)


def test_without_nvidia_smi_slurms_word_stays(make: MakeJob, slurm: Scheduler) -> None:
    job = slurm.start(make("sh", "-c", "echo $CUDA_VISIBLE_DEVICES", gpus=2), SLURM_JOB_GPUS="2,3", CUDA_VISIBLE_DEVICES="0,1")
    assert ended(job) == 0 and job.log() == "0,1\n"


@pytest.mark.parametrize(("dependency", "changed"), [
    ("afterok:12(unfulfilled)", "afterok:20"), ("afterok:9,afterany:12(unfulfilled)", "afterok:9,afterany:20"),
    ("afterok:12:13(unfulfilled)", "afterok:20:13"), ("afterok:120(unfulfilled)", None), ("afterok:12_*(unfulfilled)", None),
    ("(null)", None),
])
def test_dependents_are_repointed(dependency: str, changed: str | None) -> None:
    assert repointed(dependency, "12", "20") == changed
