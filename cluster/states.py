"""The status of a job: a sum type whose variants carry their own facts, and the function that changes it.

    PENDING -> RUNNING -> STOPPING -> CANCELLED | TIMEOUT | RESTARTING | what the program did first
                  |  -> COMPLETED | FAILED | OUT_OF_MEMORY | NODE_FAIL
                  +  -> RESTARTING -> PENDING of the next attempt

`apply` is used by the supervisor when it writes an event and by every reader when it replays them.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cluster.events import AttemptEnded, AttemptStarted, Event, Fired, Launched, Note, Reason, StopAsked


@dataclass(frozen=True)
class Pending:
    """Submitted, or an attempt is being prepared."""

    since: float
    attempt: int | None  # None: no supervisor has started yet
    why: str = ""


@dataclass(frozen=True)
class Running:
    """The program's processes exist."""

    since: float
    attempt: int


@dataclass(frozen=True)
class Stopping:
    """Somebody asked it to stop; it may take `grace_s` to save."""

    since: float
    attempt: int
    by: str
    why: Literal["kill", "restart", "time limit", "scheduler", "superseded", "guard"]
    grace_s: float


@dataclass(frozen=True)
class Restarting:
    """Between two attempts: backing off after a failure, on a person's word, or until the scheduler goes on."""

    since: float
    attempt: int  # the one that ended
    reason: Reason
    detail: str
    until: float | None


@dataclass(frozen=True)
class Ended:
    """For good, unless a person restarts it."""

    at: float
    attempt: int | None
    reason: Reason
    detail: str
    checkpoint_step: int | None = None


class Completed(Ended):
    pass


class Failed(Ended):
    pass


class Cancelled(Ended):
    pass


class Timeout(Ended):
    pass


class OutOfMemory(Ended):
    pass


class NodeFail(Ended):
    pass


Status = Pending | Running | Stopping | Restarting | Completed | Failed | Cancelled | Timeout | OutOfMemory | NodeFail

WORDS: dict[type, str] = {
    Pending: "PENDING", Running: "RUNNING", Stopping: "STOPPING", Restarting: "RESTARTING", Completed: "COMPLETED",
    Failed: "FAILED", Cancelled: "CANCELLED", Timeout: "TIMEOUT", OutOfMemory: "OUT_OF_MEMORY", NodeFail: "NODE_FAIL",
}
ENDED_WORDS = frozenset(word for cls, word in WORDS.items() if issubclass(cls, Ended))

ENDING: dict[Reason, type[Ended]] = {
    Reason.DONE: Completed, Reason.KILLED: Cancelled, Reason.RESTART_ASKED: Cancelled, Reason.ERROR: Failed,
    Reason.BAD_EXIT: Failed, Reason.CANNOT_START: Failed, Reason.PREFLIGHT: Failed, Reason.CUDA_OOM: OutOfMemory,
    Reason.HOST_OOM: OutOfMemory, Reason.SIGNAL: Failed, Reason.NON_FINITE: Failed, Reason.COMMUNICATION: Failed,
    Reason.DISK_FULL: Failed, Reason.TIME_LIMIT: Timeout, Reason.SUPERVISOR_LOST: Failed, Reason.NODE_LOST: NodeFail,
    Reason.PREEMPTED: Cancelled, Reason.SCHEDULER: Cancelled, Reason.SUPERSEDED: Cancelled,
    Reason.DEPENDENCY: Cancelled, Reason.EXIT_UNKNOWN: Failed, Reason.GUARD: Failed,
}

# Which events may meet which status. A restart by a person may revive any ending.
_LEGAL: dict[type, tuple[type, ...]] = {
    Pending: (AttemptStarted, Launched, StopAsked, AttemptEnded),
    Running: (StopAsked, AttemptEnded),
    Stopping: (StopAsked, AttemptEnded),  # a second, shorter stop: `kill --now` after `kill`
    Restarting: (AttemptStarted, StopAsked, AttemptEnded),
    **dict.fromkeys(set(ENDING.values()), (AttemptStarted,)),
}


class IllegalMove(Exception):
    """An event that cannot follow the status it met."""


def apply(status: Status, event: Event) -> Status:
    """The status after `event`. Raises IllegalMove when the table does not allow it."""
    if isinstance(event, Note | Fired):
        return status
    if not isinstance(event, _LEGAL[type(status)]):
        raise IllegalMove(f"{type(event).__name__} while {WORDS[type(status)]}")
    match event:
        case AttemptStarted():  # submitted, retried or restarted
            return Pending(event.t, event.attempt, "starting")
        case Launched():  # processes exist
            return Running(event.t, _attempt(status))
        case StopAsked():  # kill, restart or time limit
            return Stopping(event.t, _attempt(status), event.by, event.why, event.grace_s)
        case AttemptEnded(next="end"):  # the supervisor's last word
            return ENDING[event.reason](event.t, status_attempt(status), event.reason, event.detail,
                                        event.checkpoint_step)
        case AttemptEnded():  # the job goes on by itself
            return Restarting(event.t, _attempt(status), event.reason, event.detail, event.retry_at)
    raise AssertionError(event)


def fold(events: Iterable[Event], submitted_at: float = 0.0) -> tuple[Status, int]:
    """Replay the events of all attempts in order -> (status, number of events that did not fit).

    An attempt whose supervisor died wrote no ending; the next AttemptStarted then simply opens the next one.
    """
    status: Status = Pending(submitted_at, None, "submitted")
    misfits = 0
    for event in events:
        if isinstance(event, AttemptStarted):
            status = Pending(event.t, event.attempt, "starting")
            continue
        try:
            status = apply(status, event)
        except IllegalMove:
            misfits += 1
    return status, misfits


@dataclass(frozen=True)
class Heard:
    """What the host that a heartbeat names says about its supervisor. Judged there and nowhere else."""

    alive: bool
    last: float  # unix seconds of the last heartbeat, or of the attempt's start
    rebooted: bool = False  # the host runs, but not the boot that the heartbeat names


def with_liveness(status: Status, heard: Heard | None, checkpoint_step: int | None = None) -> Status:
    """The status once liveness is known; None means "could not ask", which changes nothing."""
    if heard is None or heard.alive or isinstance(status, Ended):
        return status
    if heard.rebooted:
        return NodeFail(heard.last, status_attempt(status), Reason.NODE_LOST, "the node was restarted", checkpoint_step)
    return Failed(heard.last, status_attempt(status), Reason.SUPERVISOR_LOST, "it wrote no ending", checkpoint_step)


def status_attempt(status: Status) -> int | None:
    return status.attempt


def _attempt(status: Status) -> int:
    return 0 if status.attempt is None else status.attempt
