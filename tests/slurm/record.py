"""Writes tests/slurm/records anew, from the test bed's SLURM: `python -m tests.slurm.record` (root, some 4 minutes).

Times, addresses and job ids in the records are whatever they were; nothing in a test depends on them.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.testbed.bed import TestbedError, poll
from tests.testbed.slurmbed import SlurmBed

RECORDS = Path(__file__).with_name("records")
SQUEUE_FIELDS = (
    "JobID", "ArrayJobID", "ArrayTaskID", "JobArrayID", "Name", "UserName", "UserID", "Partition", "Account", "State", "StateCompact",
    "Reason", "ReasonList", "NodeList", "ReqNodes", "SchedNodes", "NumNodes", "RestartCnt", "Requeue", "SubmitTime",
    "EligibleTime", "StartTime", "EndTime", "TimeLimit", "TimeUsed", "PriorityLong", "Dependency", "Comment", "exit_code",
)
SACCT_FIELDS = (
    "JobID", "JobIDRaw", "JobName", "User", "Account", "Partition", "State", "ExitCode", "DerivedExitCode", "Reason",
    "NodeList", "Submit", "Eligible", "Start", "End", "Elapsed", "Timelimit", "Comment",
)
# What is asked when nothing is wrong: name of the record, and the command.
ANSWERS = {
    "sbatch.submitted": "sbatch --wrap true",
    "sbatch.parsable": "sbatch --parsable --wrap true",
    "sbatch.array": "sbatch --parsable --array=0-1 --wrap true",
    "sbatch.impossible": "sbatch --gres=gpu:9 --wrap true",
    "sbatch.memory": "sbatch --mem=64G --wrap true",
    "sbatch.bad-time": "sbatch --time=abc --wrap true",
    "sbatch.unknown-option": "sbatch --nonsense=abc --wrap true",
    "sbatch.no-file": "sbatch /nonexistent",
    "test-only.possible": "sbatch --test-only --wrap true",
    "test-only.array": "sbatch --test-only --array=0-1 --wrap true",
    "test-only.impossible": "sbatch --test-only --gres=gpu:9 --wrap true",
    "test-only.nodes": "sbatch --test-only -N 6 --wrap true",
    "test-only.partition": "sbatch --test-only -p nix --wrap true",
    "test-only.account": "sbatch --test-only -A nix --wrap true",
    "test-only.constraint": "sbatch --test-only -C nix --wrap true",
    "test-only.nodelist": "sbatch --test-only -w gpu77 --wrap true",
    "test-only.gres": "sbatch --test-only --gres=foo:1 --wrap true",
    "test-only.array-size": "sbatch --test-only --array=0-30000 --wrap true",
    "squeue.empty": "squeue -h -u bob",
    "squeue.unknown-id": "squeue -h -j 9999",
    "squeue.unknown-ids": "squeue -h -j 9999,9998",
    "squeue.bad-id": "squeue -h -j x",
    "squeue.bad-field": "squeue -h -O nonsense",
    "sacct.unknown-id": "sacct -nPX -j 9999 -o JobID,State",
    "sacct.bad-field": "sacct -nPX -o Restarts",
    "scancel.unknown-id": "scancel 9999",
    "scancel.bad-id": "scancel x",
    "scancel.signal-unknown-id": "scancel --signal=USR2 9999",
    "scontrol.requeue-unknown-id": "scontrol requeue 9999",
    "scontrol.show-unknown-id": "scontrol show job 9999",
    "scontrol.update-unknown-id": "scontrol update JobId=9999 TimeLimit=3",
    "scontrol.ping": "scontrol ping",
    "scontrol.hostnames": "scontrol show hostnames gpu[01-02,05]",
    "sinfo.nodes": "sinfo -hN -p main -o %N|%P|%T|%G|%c|%m|%a|%l",
    "sinfo.version": "sinfo --version",
}
ASK_ALL = {
    "squeue": "squeue -h -o %i|%T", "sacct": "sacct -nPX -o JobID,State", "sbatch": "sbatch --wrap true",
    "test-only": "sbatch --test-only --wrap true", "scancel": "scancel 1", "requeue": "scontrol requeue 1",
    "ping": "scontrol ping", "sinfo": "sinfo -hN -o %N",
}


class Recorder:
    """Collects what the bed says."""

    bed: SlurmBed

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.queue: list[str] = []
        self.accounted: list[str] = []

    def answer(self, name: str, command: str) -> None:
        done = self.bed.exec("head", *command.split(), user="alice", check=False)
        out = [f"> {line}" for line in done.stdout.splitlines()]
        err = [f"! {line}" for line in done.stderr.splitlines()]
        self.answers.append("\n".join([f"# {name}", f"$ {command}", *out, *err, f"= {done.returncode}"]))

    def row(self, name: str, job: str, *options: str) -> None:
        """The lines of squeue about a job: those of an array are name, name.2, …"""
        columns = ",".join(f"{field}:|" for field in SQUEUE_FIELDS)
        self._rows(self.queue, name, SQUEUE_FIELDS, self.bed.slurm("squeue", "-h", *options, "-j", job, "-O", columns))

    def past(self, name: str, job: str, *options: str) -> None:
        said = self.bed.slurm("sacct", "-nPX", *options, "-j", job, "-o", ",".join(SACCT_FIELDS))
        self._rows(self.accounted, name, SACCT_FIELDS, said)

    def past_in(self, name: str, job: str, state: str) -> None:
        """The same, once accounting has caught up."""
        if not poll(lambda: state in self.bed.slurm("sacct", "-nPX", "-j", job, "-o", "State"), 60):
            raise TestbedError(f"sacct does not show {state} for job {job}")
        self.past(name, job)

    def _rows(self, rows: list[str], name: str, fields: tuple[str, ...], said: str) -> None:
        if not said:
            raise TestbedError(f"nothing to record as {name}")
        for number, line in enumerate(said.splitlines(), 1):
            values = [f"{field}={value}" for field, value in zip(fields, line.split("|"))]
            rows.append("\n".join([f"# {name}" + (f".{number}" if number > 1 else ""), *values]))

    def write(self) -> None:
        for name, blocks in (("answers", self.answers), ("squeue", self.queue), ("sacct", self.accounted)):
            RECORDS.joinpath(f"{name}.txt").write_text("\n\n".join(blocks) + "\n")


def waiting(rec: Recorder) -> None:
    """Why a job waits, in squeue's words."""
    bed = rec.bed
    first = bed.sbatch("sleep 600", "--job-name=a b", "--comment=launch:token")
    bed.await_job(first, "RUNNING")
    rec.row("running", first)
    rec.past_in("running", first, "RUNNING")
    whole = bed.sbatch("sleep 600", "-N5", "--exclusive")
    held, later = bed.sbatch("true", "-H"), bed.sbatch("true", "--begin=now+1hour")
    after = bed.sbatch("true", f"--dependency=afterok:{first}")
    array = bed.sbatch("sleep 600", "--array=0-9%2", "-p", "low")
    scattered = bed.sbatch("true", "--array=1,3,5", f"--dependency=afterany:{first}")
    lost = bed.sbatch("true", "--dependency=afterok:" + failing(bed))
    behind = bed.sbatch("true", "-N5", "--exclusive")
    bed.slurm("scontrol", "update", "PartitionName=high", "State=DOWN", user="root")
    closed = bed.sbatch("true", "-p", "high")
    for job, name, reason in (
        (whole, "resources", "Resources"), (held, "held", "JobHeldUser"), (later, "begin-time", "BeginTime"),
        (after, "dependency", "Dependency"), (scattered, "array-dependency", "Dependency"), (behind, "priority", "Priority"),
        (lost, "dependency-never", "DependencyNeverSatisfied"), (closed, "partition-down", "PartitionDown"),
    ):
        if not poll(lambda: reason in {one.reason for one in bed.queue() if one.id.split("_")[0] == job}, 20):
            raise TestbedError(f"job {job} does not wait for {reason}: {bed.queue()}")
        rec.row(f"pending.{name}", job)
    rec.past_in("pending", whole, "PENDING")
    rec.row("array", array)
    rec.row("array-each", array, "-r")
    rec.past_in("array", array, "RUNNING")
    bed.slurm("scontrol", "update", "PartitionName=high", "State=UP", user="root")
    empty(bed)


def failing(bed: SlurmBed) -> str:
    job = bed.sbatch("exit 3")
    bed.await_job(job, "FAILED")
    return job


def restarts(rec: Recorder) -> None:
    """Requeued by hand, by preemption and by a dead node; and the one that may not be."""
    bed = rec.bed
    job, fixed = bed.sbatch("sleep 600"), bed.sbatch("sleep 600", "--no-requeue")
    bed.await_job(job, "RUNNING")
    bed.await_job(fixed, "RUNNING")
    rec.answer("scontrol.requeue", f"scontrol requeue {job}")
    rec.answer("scontrol.requeue-disabled", f"scontrol requeue {fixed}")
    bed.await_job(job, "PENDING")
    rec.row("pending.requeued", job)
    rec.past("requeued", job, "-D")
    rec.answer("scontrol.requeue-pending", f"scontrol requeue {job}")
    low = bed.sbatch("sleep 600", "-p", "low", "--exclusive", "-w", "gpu05")
    bed.await_job(low, "RUNNING")
    urgent = bed.sbatch("sleep 600", "-p", "main", "--exclusive", "-w", "gpu05")
    bed.await_job(urgent, "RUNNING", timeout_s=60)
    bed.await_job(low, "PENDING")
    rec.row("pending.preempted", low)
    rec.past("preempted", low, "-D")
    empty(bed)
    job, fixed = bed.sbatch("sleep 600", "-w", "gpu01"), bed.sbatch("sleep 600", "-w", "gpu01", "--no-requeue")
    bed.await_job(job, "RUNNING")
    bed.await_job(fixed, "RUNNING")
    with bed.daemon_down("gpu01", "slurmd", "kill9"):
        bed.await_job(fixed, "NODE_FAIL", timeout_s=60)
        bed.await_job(job, "PENDING")
        rec.row("pending.node-failed", job)
        rec.past("node-fail-requeued", job, "-D")
        rec.past_in("node-fail", fixed, "NODE_FAIL")
        rec.answer("sinfo.down", "sinfo -hN -p main -n gpu01 -o %N|%T|%E")
        rec.answer("scontrol.requeue-ended", f"scontrol requeue {fixed}")
    empty(bed)


def endings(rec: Recorder) -> None:
    """The words of sacct for everything that has ended."""
    bed = rec.bed
    slow = bed.sbatch("sleep 600", "--time=1")
    cancelled, killed = bed.sbatch("sleep 600"), bed.sbatch("sleep 600")
    waiting, full = bed.sbatch("true", "-H"), bed.sbatch("sleep 600", "-w", "gpu05", "--exclusive")
    bed.await_job(full, "RUNNING")
    late = bed.sbatch("true", "-w", "gpu05", "--time=1", "--deadline=now+80")
    # A Python that keeps 64 MB more than it may.
    hungry = bed.sbatch("/usr/bin/python3 -c 'x = bytearray(192 << 20); print(len(x))'", "--mem=128M")
    done, failed, signalled = bed.sbatch("true"), bed.sbatch("exit 3"), bed.sbatch("kill -9 $$")
    bed.await_job(killed, "RUNNING")
    bed.slurm("scancel", cancelled)
    bed.slurm("scancel", killed, user="root")
    bed.slurm("scancel", waiting)
    for job, name, state in (
        (done, "completed", "COMPLETED"), (failed, "failed", "FAILED"), (signalled, "failed-by-signal", "FAILED"),
        (cancelled, "cancelled", "CANCELLED by 2001"), (killed, "cancelled-by-root", "CANCELLED by 0"),
        (waiting, "cancelled-pending", "CANCELLED by"), (hungry, "out-of-memory", "OUT_OF_MEMORY"),
    ):
        rec.past_in(name, job, state)
    rec.answer("scancel.ended", f"scancel {killed}")
    rec.answer("squeue.ended-id", f"squeue -h -j {killed}")
    rec.row("ended", signalled, "-t", "all")
    rec.row("ended-cancelled", killed, "-t", "all")
    bed.await_job(slow, "TIMEOUT", timeout_s=150)
    rec.past_in("timeout", slow, "TIMEOUT")
    rec.past_in("deadline", late, "DEADLINE")
    empty(bed)


def troubles(rec: Recorder) -> None:
    """What each tool says when something is not there."""
    bed = rec.bed
    for name, fault in {
        "controller-down": bed.controller_down, "accounting-down": bed.accounting_down,
        "munge-down": lambda: bed.daemon_down("head", "munged"),
    }.items():
        with fault():
            for tool, command in ASK_ALL.items():
                rec.answer(f"{tool}.{name}", command)
        bed.repair_nodes()
    with bed.controller_hung():
        for tool in ("squeue", "sbatch", "scancel", "requeue"):
            rec.answer(f"{tool}.controller-hung", ASK_ALL[tool])
    empty(bed)


def bare(rec: Recorder) -> None:
    rec.answer("sacct.disabled", "sacct -nPX -o JobID,State")


def empty(bed: SlurmBed) -> None:
    bed.slurm("scancel", "-u", "alice")
    bed.await_idle_nodes()


def on_bed(rec: Recorder, bed: SlurmBed, *parts: Callable[[Recorder], None]) -> None:
    rec.bed = bed
    try:
        bed.up()
        for part in parts:
            part(rec)
            rec.write()
    finally:
        bed.down()


def plain(rec: Recorder) -> None:
    for name, command in ANSWERS.items():
        rec.answer(name, command)
    empty(rec.bed)


def main() -> None:
    RECORDS.mkdir(exist_ok=True)
    rec = Recorder()
    on_bed(rec, SlurmBed(f"record-{os.getpid()}"), plain, troubles, waiting, restarts, endings)
    on_bed(rec, SlurmBed(f"record-{os.getpid()}", accounting=False), bare)


if __name__ == "__main__":
    main()
