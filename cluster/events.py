"""The events of a job's journal: one frozen dataclass per kind, one JSON object per event. Standard library only."""
from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any, Literal

EVENT_VERSION = 1
TERMINATED = "a SIGTERM to the supervisor"  # who asked for a stop, when that is all that is known


class Reason(str, Enum):
    """Why a job or an attempt ended. Closed: every ending has exactly one. The value is what a person reads."""

    DONE = "done"
    KILLED = "killed by a person"
    RESTART_ASKED = "restart asked by a person"
    ERROR = "error in the program"
    BAD_EXIT = "ended early without an error"  # exit 0 before its last step: never a success
    CANNOT_START = "could not be started"
    PREFLIGHT = "preflight failed"
    CUDA_OOM = "out of GPU memory"
    HOST_OOM = "killed by the kernel: out of memory"
    SIGNAL = "killed by a signal from outside"
    NON_FINITE = "stopped by the non-finite guard"
    COMMUNICATION = "ranks lost each other (NCCL, gloo or rendezvous)"
    DISK_FULL = "disk full"
    TIME_LIMIT = "time limit"
    SUPERVISOR_LOST = "supervisor lost"
    NODE_LOST = "node lost"
    PREEMPTED = "preempted"
    SCHEDULER = "ended by the scheduler"
    SUPERSEDED = "a newer attempt runs elsewhere"
    DEPENDENCY = "a job it waits for did not complete"
    GUARD = "stopped by a guard"  # as its stage file asks for
    EXIT_UNKNOWN = "ended, exit code unknown"  # of a program that was adopted: only its parent is told


@dataclass(frozen=True)
class AttemptStarted:
    """First line of every journal."""

    t: float
    attempt: int
    by: Literal["submit", "restart", "policy", "scheduler", "adopt"]
    hostname: str
    boot_id: str
    pid: int
    pid_started: float
    checkpoints: tuple[str, ...]  # names found at the start; one written later by an older attempt never counts
    resume: str | None  # path resumed from
    resume_step: int | None
    slurm_id: str | None = None  # SLURM's id of the allocation
    slurm_restarts: int | None = None  # SLURM_RESTART_COUNT
    nodes: tuple[str, ...] = ()  # hostnames, that of node 0 first; empty: this host alone


@dataclass(frozen=True)
class Launched:
    """The program's processes have been started."""

    t: float
    argv: tuple[str, ...]
    gpus: tuple[str, ...]  # UUIDs
    pid: int


@dataclass(frozen=True)
class StopAsked:
    """Somebody, its time limit or the scheduler wants the program to stop."""

    t: float
    by: str  # user@host, "launch" for a time limit, "SLURM", "guard RULE"
    why: Literal["kill", "restart", "time limit", "scheduler", "superseded", "guard"]
    grace_s: float


@dataclass(frozen=True)
class Note:
    """Something a person should know: a checkpoint that was passed over, a survivor, a warning."""

    t: float
    text: str


@dataclass(frozen=True)
class Fired:
    """A guard found something while the job ran. Each does so once per attempt and severity."""

    t: float
    rule: str  # its name in docs/doctor.md
    severity: Literal["error", "warning", "info"]
    what: str  # with its numbers
    cause: str  # the likely one
    fix: str  # a command
    policy: Literal["log", "notify", "checkpoint-and-stop", "restart-with"]  # what follows
    evidence: str | None = None  # a file, by its path in the run directory


@dataclass(frozen=True)
class AttemptEnded:
    """Last line of a journal. `next` says whether the job goes on by itself."""

    t: float
    reason: Reason
    detail: str  # the first exception of the rank that failed first, or what was freed
    exit_code: int | None
    step: int | None
    checkpoint: str | None  # newest verified checkpoint
    checkpoint_step: int | None
    next: Literal["end", "retry", "restart", "requeue"]  # requeue: the scheduler starts the next attempt
    retry_at: float | None  # unix seconds, with next = "retry"
    survivors: tuple[int, ...] = ()  # pids that could not be ended


Event = AttemptStarted | Launched | StopAsked | Note | Fired | AttemptEnded
_KINDS: dict[str, type] = {
    "attempt_started": AttemptStarted, "launched": Launched, "stop_asked": StopAsked, "note": Note,
    "guard": Fired, "attempt_ended": AttemptEnded,
}
_NAMES = {cls: name for name, cls in _KINDS.items()}


def encode(event: Event) -> dict[str, Any]:
    values = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(event).items()}
    return {"v": EVENT_VERSION, "event": _NAMES[type(event)]} | values


def decode(raw: dict[str, Any]) -> Event:
    """Raises ValueError for an event this version does not know or cannot read (a reader skips and counts those)."""
    cls = _KINDS.get(str(raw.get("event")))
    if cls is None or raw.get("v") != EVENT_VERSION:
        raise ValueError(f"unknown event {raw.get('event')!r} version {raw.get('v')!r}")
    values = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
    if "reason" in values:
        values["reason"] = Reason(values["reason"])
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise ValueError(f"event {raw['event']!r}: {error}") from None
