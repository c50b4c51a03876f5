"""A SLURM allocation as the place of a supervisor: what it says about itself, its signals, and the way to the next one.

    SIGUSR2   the bell: look into control/ at once (the loop wakes for any signal)
    SIGUSR1   the warning, of a preemption or of the time limit: save, then requeue; where the end is known the clock
              warns of it, for SLURM may be a minute early
    SIGTERM   the scheduler ends it; whether the job comes again the queue says

No lock: where a lost node comes back two supervisors of one job may live, on hosts that see the same files late. The
newest attempt's directory owns the job; the supervisor of an older one ends itself and asks for nothing.
"""
from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.errors import ClusterError
from cluster.events import AttemptEnded, AttemptStarted, Launched, Reason
from cluster.journal import read_events, read_journal
from cluster.node import slurm_tools
from cluster.node.aside import Aside, AsideFailed
from cluster.node.control import Restart, Stop
from cluster.node.history import History, read_history
from cluster.node.loop import Loop
from cluster.node.place import Place
from cluster.node.process import agent_command
from cluster.node.slurm_tools import SlurmFailed
from cluster.spec import JobSpec

FENCE_S = 10.0  # from one look for a newer attempt to the next
FENCE_GRACE_S = 20.0
WARNING_S = 120.0  # before the end it saves, or by its own grace if that is longer; a third of the allocation at most
SAVES = 3.0  # times the last measured save is enough for the next
LAST_S = 5.0  # of the allocation: for the ending and the requeue
ROOM_S = 120.0  # an attempt that would have less than this is made in the next allocation
KILL_WAIT_S = 30.0  # SLURM's default: from SIGTERM to SIGKILL
ALARM_S = 2.0  # for squeue to say what a signal means
_TOOL_S = 20.0
_UNLIMITED_DAYS = 360  # the backfill scheduler writes a year for a job without a limit
_FIELDS = "StateCompact:12,TimeLeft:24,PreemptTime:24,EndTime:24,Reason:40"
_AGAIN_S = 2.0  # between two tries to be requeued by a controller that does not answer
_PATIENCE_S = 600.0  # with it, when the end of the allocation is not known
_TICK_S = 0.5
_NO_CONTROLLER = r"(?i)contact|connect|timed? out|did not answer|resource temporarily"


def main(run_dir: Path, env: Mapping[str, str] = os.environ) -> int:
    """Supervise the job in this allocation, in the foreground -> 0 when it has completed and in no other case."""
    from cluster.node.supervisor import forget_outer_job, supervise

    forget_outer_job()
    run = RunDir(run_dir)
    if not env.get("SLURM_JOB_ID"):
        sys.stderr.write("error: there is no SLURM allocation around this process\n")
        return 2
    if (node := int(env.get("SLURM_NODEID") or 0)) > 0:
        from cluster.node import member  # of several nodes, not the first

        return member.main(run_dir, node, allocation_of(env))
    loop = Loop()
    place = Allocation(run, loop, env)
    remember(run, place.id)
    by = started_by(run, place.id)
    return supervise(run, loop, place, read_history(run) if by == "scheduler" else History(), by)


def remember(run: RunDir, id: str) -> None:
    """The id of this allocation is the job's newest, also where whoever queued it never heard what sbatch answered."""
    from cluster.node import sbatch

    with contextlib.suppress(ClusterError, OSError):  # then it is shown by its heartbeat alone
        if sbatch.ids_of(run)[-1:] != [id]:
            sbatch.record(run, id)


def started_by(run: RunDir, id: str) -> str:
    """Whose wish the next attempt is: a job that goes on, or one that had not ended when its node was lost, is the
    scheduler's, and one that had just completed; else one that had ended is a person's. One that never began (it waited
    for another) has to wait again."""
    attempts = run.attempts()
    events = read_journal(attempts[-1].journal)[0] if attempts else []
    end = next((event for event in reversed(events) if isinstance(event, AttemptEnded)), None)
    starts = [event for event in events if isinstance(event, AttemptStarted)]
    here = bool(starts) and starts[-1].slurm_id == id
    if end is not None and end.next == "end":
        return "scheduler" if here and end.reason is Reason.DONE else "restart"
    if end is None and starts and not here:
        return "restart"
    began = any(isinstance(event, Launched) for event in read_events(run)[0])
    return "scheduler" if began else "submit"


@dataclass(frozen=True)
class Told:
    """What squeue said about the job."""

    t: float  # time.monotonic
    left_s: float | None = None  # until the end of the allocation; infinite: no limit, None: not told
    ending: bool = False  # SLURM has begun to end it
    timed_out: bool = False  # … because its time is over
    preempted: bool = False  # somebody else gets its nodes when `left_s` is over


class Allocation(Place):
    def __init__(self, run: RunDir, loop: Loop, env: Mapping[str, str]) -> None:
        super().__init__(run, loop)
        self.id = id_of(env)
        self.facts = {"slurm_id": self.id, "slurm_restarts": int(env.get("SLURM_RESTART_COUNT") or 0)}
        self.allocation = allocation_of(env)
        self._raw_id = env["SLURM_JOB_ID"]
        self._warning_s = WARNING_S
        self._kill_wait_s = KILL_WAIT_S
        self._told: Told | None = None
        self._answered = False  # the last question
        self._last_call = math.inf  # time.monotonic: when it warns itself
        self._alarm: float | None = None  # time.monotonic of a signal whose meaning squeue is being asked for
        self._ending = False  # SLURM ends the job by its own will
        self._fenced = False
        self._next_fence = 0.0
        self._question: Aside | None = self._aside(ask, self._raw_id)

    def begin(self, spec: JobSpec, save_s: float | None) -> None:
        self._warning_s = max(WARNING_S, spec.grace_s or 0.0, SAVES * (save_s or 0.0))

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        yield  # an allocation goes by whatever is done in it

    @property
    def left_s(self) -> float | None:
        """Until the end of the allocation; infinite without a limit, None when nobody said."""
        self._hear()
        told = self._told
        return None if told is None or told.left_s is None else told.left_s - (time.monotonic() - told.t)

    @property
    def ending_s(self) -> float:
        left_s = self.left_s
        if self._ending:
            return self._kill_wait_s / 3
        return math.inf if left_s is None else max(1.0, left_s - LAST_S)

    def has_room(self, pause_s: float) -> bool:
        left_s = self.left_s
        return left_s is None or left_s - pause_s > ROOM_S

    # --- what is asked of it ----------------------------------------------------------------------------------

    def requests(self, number: int) -> list[Stop | Restart]:
        self._hear()
        found = self.control.new_requests()
        if self._fenced:
            return []
        if (found or time.monotonic() >= self._next_fence) and self.superseded(number):
            return [Stop(by="launch", why="superseded", grace_s=FENCE_GRACE_S, reason=Reason.SUPERSEDED)]
        return [*found, *self._signals()]

    def superseded(self, number: int) -> bool:
        self._next_fence = time.monotonic() + FENCE_S
        self._fenced = any(attempt.number > number for attempt in self._run.attempts())
        if self._fenced:
            self.control.keep("stop", "restart")  # what is asked there is asked of the newer attempt
        return self._fenced

    def _signals(self) -> list[Stop]:
        """A signal says little: squeue is asked what it means, and after a moment it is judged by the clock."""
        now = time.monotonic()
        if self._loop.terminated or self._loop.warned or now >= self._last_call:
            if self._alarm is None:
                self._alarm = now
                self._ask_again()
            elif self._question is None or now > self._alarm + ALARM_S:
                terminated = self._loop.terminated
                self._loop.terminated = self._loop.warned = False
                self._alarm, self._last_call = None, math.inf
                stop = self._stop(terminated)
                return [stop] if stop else []
        return []

    def _stop(self, terminated: bool) -> Stop | None:
        """None: the warning is an early one, its time will come."""
        told, left_s = self._told or Told(0.0), self.left_s
        if terminated and not (self._answered and told.preempted and not told.ending):
            timed_out = told.timed_out or left_s is not None and left_s <= LAST_S
            self._ending = not timed_out
            return Stop("SLURM", "scheduler", self._kill_wait_s * 2 / 3,
                        reason=Reason.TIME_LIMIT if timed_out else Reason.SCHEDULER)
        preempted = self._answered and told.preempted
        grace_s = None if left_s is None or math.isinf(left_s) else max(left_s / 2, left_s - LAST_S)
        if preempted or grace_s is None or left_s is None:
            return Stop("SLURM", "scheduler", grace_s, reason=Reason.PREEMPTED if preempted else Reason.SCHEDULER)
        if left_s <= self._warning_s + LAST_S:
            return Stop("SLURM", "scheduler", max(0.0, grace_s), reason=Reason.TIME_LIMIT)
        if not self._answered:
            return Stop("SLURM", "scheduler", reason=Reason.SCHEDULER)
        self._last_call = time.monotonic() + left_s - self._warning_s
        return None

    # --- what follows -----------------------------------------------------------------------------------------

    def go_on(self, spec: JobSpec, meanwhile: Callable[[], None]) -> str:
        """Have it requeued, else continued under a new id. A controller that does not answer is asked again while the
        allocation lasts."""
        if self._ending:
            return ""
        left_s = self.left_s
        patience_s = _PATIENCE_S if left_s is None else min(_PATIENCE_S, max(self._kill_wait_s, left_s))
        work = self._aside(carry_on, str(self._run.path), self._raw_id, self.id, patience_s)
        while not work.done():
            self._loop.wait(_TICK_S)
            meanwhile()
        try:
            return work.result()["problem"]
        except AsideFailed as error:
            return f"launch itself failed to have it started again: {error}"

    # --- what SLURM says about it -----------------------------------------------------------------------------

    def _ask_again(self) -> None:
        if self._question:
            self._question.kill()
        self._question, self._answered = self._aside(ask, self._raw_id), False

    def _hear(self) -> None:
        """Take in the answer about the end of the allocation; not being told is fine."""
        if self._question is None or not self._question.done():
            return
        with contextlib.suppress(AsideFailed):
            answer = self._question.result()
            self._kill_wait_s = answer.pop("kill_wait_s") or KILL_WAIT_S
            if "t" in answer:
                self._told, self._answered = Told(**answer), True
        self._question = None
        left_s = self.left_s
        if self._alarm is None and left_s is not None:
            self._warning_s = min(self._warning_s, left_s / 3)
            self._last_call = time.monotonic() + left_s - self._warning_s


def id_of(env: Mapping[str, str]) -> str:
    """What squeue calls the job: `123`, or `120_3` for one of an array."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else env["SLURM_JOB_ID"]


def allocation_of(env: Mapping[str, str]) -> str:
    """Another one for each time that the job was given nodes."""
    return f"{env['SLURM_JOB_ID']}.{env.get('SLURM_RESTART_COUNT') or 0}"


# --- SLURM's programs: each call may take its time, so they run aside -------------------------------------------

def ask(id: str) -> dict[str, Any]:
    """-> the fields of Told, none when squeue did not say, and kill_wait_s (None: not told)."""
    said = _said("squeue", "-h", "-j", id, "-O", _FIELDS).split()
    return (_told(said) if len(said) == 5 else {}) | {"kill_wait_s": _kill_wait(_said("scontrol", "show", "config"))}


def _told(said: Sequence[str]) -> dict[str, Any]:
    state, left, preempt_time, end_time, reason = said
    preempted = preempt_time.isdecimal() and state == "R"
    left_s = float(end_time) - time.time() if preempted and end_time.isdecimal() else _seconds(left)
    return {"t": time.monotonic(), "left_s": left_s, "preempted": preempted, "ending": state != "R",
            "timed_out": state != "R" and reason == "TimeLimit"}


def _said(*argv: str) -> str:
    try:
        return slurm_tools.run(argv, _TOOL_S)
    except SlurmFailed:
        return ""


def _seconds(text: str) -> float | None:
    """`1-02:03:04`, `59:00`, `UNLIMITED`; None for anything else (`INVALID`, `NOT_SET`, nothing at all)."""
    if text == "UNLIMITED":
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    if days >= _UNLIMITED_DAYS:
        return math.inf
    return ((days * 24.0 + hours) * 60 + minutes) * 60 + seconds


def _kill_wait(text: str) -> float | None:
    match = re.search(r"(?m)^KillWait\s*=\s*(\d+)", text)
    return float(match[1]) if match else None


def carry_on(run_dir: str, raw_id: str, id: str, patience_s: float) -> dict[str, str]:
    """Requeue the job, else queue it once more and re-point those that wait for it -> {problem}, empty when it was
    done."""
    until = time.monotonic() + patience_s
    refused = _until_told(lambda: slurm_tools.run(["scontrol", "requeue", raw_id], _TOOL_S), until)
    if not refused:
        return {"problem": ""}
    run = RunDir(Path(run_dir))
    try:
        new = _continue(run, id)
    except ClusterError as error:
        return {"problem": f"SLURM takes it neither again ({refused}) nor anew ({error}); launch restart goes on"}
    _repoint(id, new, until)
    return {"problem": ""}


def _until_told(call: Callable[[], object], until: float) -> str:
    """Call until SLURM has done it or refused it -> why it refused."""
    while True:
        try:
            call()
            return ""
        except SlurmFailed as error:
            if time.monotonic() > until or not re.search(_NO_CONTROLLER, f"{error} {error.words}"):
                return str(error)
        time.sleep(_AGAIN_S)


def _continue(run: RunDir, id: str) -> str:
    from cluster.node import sbatch  # most jobs are never continued under a new id

    spec = JobSpec.from_json(run.spec.read_bytes())
    agent = agent_command()
    return sbatch.queue(run, spec, agent, dependency=f"afterany:{id}")


def _repoint(old: str, new: str, until: float) -> None:
    """Jobs that wait for `old` wait for `new`: the old one is about to end without having completed."""
    said: list[str] = []
    _until_told(lambda: said.append(slurm_tools.run(["squeue", "-h", "-t", "PD", "-o", "%i|%E"], _TOOL_S)), until)
    for line in "".join(said).splitlines():
        waiter, _, dependency = line.strip().partition("|")
        if waiter == new or (changed := repointed(dependency, old, new)) is None:
            continue
        _until_told(lambda: slurm_tools.run(
            ["scontrol", "update", f"JobId={waiter}", f"Dependency={changed}"], _TOOL_S), until)  # noqa: B023


def repointed(dependency: str, old: str, new: str) -> str | None:
    """`afterok:12(unfulfilled),afterany:9` with 20 in the place of 12; None: it does not wait for `old`."""
    plain = re.sub(r"\([^)]*\)", "", dependency)
    changed = re.sub(rf":{re.escape(old)}(?![\d_])", f":{new}", plain)
    return None if changed == plain else changed
