"""SLURM's words, classified by ourselves and said in a person's. A word we do not know is never an ending."""
from __future__ import annotations

from enum import Enum

from cluster.events import Reason


class Phase(Enum):
    """What a state of a job means for us."""

    WAITING = "waiting"  # it will get nodes, now or again
    RUNNING = "running"  # its processes exist, be they stopped
    LEAVING = "leaving"  # its processes are being ended, what follows is not said yet
    ENDED = "ended"
    UNKNOWN = "unknown"


_PHASES = {
    Phase.WAITING: ("PENDING", "CONFIGURING", "POWER_UP_NODE", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD",
                    "RESV_DEL_HOLD", "SPECIAL_EXIT"),
    Phase.RUNNING: ("RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"),
    Phase.LEAVING: ("COMPLETING", "STAGE_OUT"),
    Phase.ENDED: ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL",
                  "OUT_OF_MEMORY"),
}
_PHASE_OF = {state: phase for phase, states in _PHASES.items() for state in states}

# What an ending that only SLURM tells means; of COMPLETED and FAILED the run directory should have told.
ENDINGS = {
    "CANCELLED": Reason.KILLED, "TIMEOUT": Reason.TIME_LIMIT, "DEADLINE": Reason.TIME_LIMIT,
    "PREEMPTED": Reason.PREEMPTED, "NODE_FAIL": Reason.NODE_LOST, "BOOT_FAIL": Reason.NODE_LOST,
    "OUT_OF_MEMORY": Reason.HOST_OOM,
}
# States that SLURM also goes through on the way to a requeue.
PASSING = frozenset({"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"})

_STATES = {
    "CONFIGURING": "its nodes are being made ready", "POWER_UP_NODE": "its nodes are being switched on",
    "REQUEUED": "requeued", "REQUEUE_FED": "requeued on another cluster",
    "REQUEUE_HOLD": "requeued and held: launch restart lets it go on",
    "SPECIAL_EXIT": "requeued and held, by its exit code: launch restart lets it go on",
    "RESV_DEL_HOLD": "held: its reservation was deleted",
    "SUSPENDED": "suspended by SLURM", "STOPPED": "stopped by a signal: SLURM keeps its nodes for it",
    "COMPLETING": "SLURM is ending it", "STAGE_OUT": "SLURM is copying its files away",
}
_REASONS = {
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "a job it waits for did not complete, so it can never start",
    "BeginTime": "waits for its begin time",
    "JobHeldUser": "held by its owner: launch restart lets it go on",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "PartitionNodeLimit": "asks for more nodes than the partition has, or some of them are down",
    "PartitionDown": "the partition is down", "PartitionInactive": "the partition is inactive",
    "AccountNotAllowed": "its account may not use the partition", "QOSNotAllowed": "its QOS may not use the partition",
    "Licenses": "waits for a licence", "Reservation": "waits for its reservation",
    "ReservationDeleted": "its reservation was deleted",
    "JobArrayTaskLimit": "so many points of its array as may run at a time are running",
    "BadConstraints": "no node has what it asks for", "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid", "Prolog": "its nodes are being made ready",
    "NodeDown": "a node it asks for is down", "JobHoldMaxRequeue": "held: it was requeued too often",
    "DeadLine": "it could not end before its deadline", "Cleaning": "its last run is being cleaned up",
    "Resources": "Resources", "Priority": "Priority", "None": "",
}
# Families of reasons, by how they begin; which limit it is stays visible.
_LIMITS = {
    "QOS": "the limits of its QOS are used up", "Assoc": "the limits of its account are used up",
    "MaxJobsPer": "the limit of jobs at a time is used up",
}
_LONG = {  # reasons that are sentences, by how they begin
    "Nodes required for job are DOWN": "nodes it asks for are down, drained or reserved",
    "launch failed requeued held": "its node could not start it, and SLURM holds it",
    "launch_failed_requeued_held": "its node could not start it, and SLURM holds it",
    "job requeued in held state": "requeued and held: launch restart lets it go on",
}
_LAUNCH_FAILED = ("launch failed", "launch_failed")
# Holds that the owner of a job may end.
_RELEASABLE = (*_LAUNCH_FAILED, "JobHeldUser", "JobHoldMaxRequeue", "job requeued in held state")
# Reasons of jobs that do not compete for nodes now.
_NOT_IN_LINE = ("Dependency", "BeginTime", "JobHeld", "JobArrayTaskLimit", "ReqNodeNotAvail", *_LAUNCH_FAILED,
                "job requeued in held state", "PartitionTimeLimit", "PartitionNodeLimit")


def phase_of(state: str) -> Phase:
    return _PHASE_OF.get(state, Phase.UNKNOWN)


def state_words(state: str) -> str:
    """What a person reads about a state beside our own; empty where ours says it all."""
    if state in _STATES:
        return _STATES[state]
    return f"SLURM says {state}" if phase_of(state) is Phase.UNKNOWN else ""


def reason_words(reason: str) -> str:
    """Why a job waits; a reason we do not know is shown as it is."""
    reason = reason.strip().strip("()")
    if reason in _REASONS:
        return _REASONS[reason]
    if reason.startswith("ReqNodeNotAvail"):
        nodes = reason.partition("UnavailableNodes:")[2]
        return "the node it asks for is not available" + (f" ({nodes})" if nodes else "")
    for beginning, words in _LIMITS.items():
        if reason.startswith(beginning):
            return f"{words} ({reason})"
    for beginning, words in _LONG.items():
        if reason.startswith(beginning):
            return words
    return reason


def in_line(reason: str, priority: int) -> bool:
    """Whether a waiting job would take nodes that became free."""
    return priority > 0 and not reason.strip("()").startswith(_NOT_IN_LINE)


def launch_failed(reason: str) -> bool:
    """Whether SLURM holds a job because its node could not start it: nobody asked for that."""
    return reason.strip("()").startswith(_LAUNCH_FAILED)


def releasable(state: str, reason: str) -> bool:
    """Whether a job is held in a way that its owner may end."""
    return state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or reason.strip("()").startswith(_RELEASABLE)


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 11th, 22nd."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
