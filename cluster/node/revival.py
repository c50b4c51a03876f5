"""What a job is whose node was restarted, or cannot be asked by this one."""
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cluster.contract import AttemptDir, RunDir
from cluster.events import TERMINATED, AttemptEnded, AttemptStarted, Event, Reason
from cluster.journal import read_journal
from cluster.node import process
from cluster.states import Cancelled, NodeFail, Pending, Status, Stopping, status_attempt

SHUTDOWN_S = 300.0  # from the SIGTERM of a shutdown to the next boot, at most


def after_shutdown(status: Status, beat: dict[str, Any]) -> Status:
    """A shutdown tells every process to end. A supervisor takes that for somebody's word, until its host has booted."""
    if not isinstance(status, Cancelled) or not status.detail.startswith(f"by {TERMINATED}"):
        return status
    if beat.get("hostname") != process.hostname() or beat.get("boot_id") in (None, process.boot_id()):
        return status
    with open("/proc/uptime") as file:
        booted = time.time() - float(file.read().split()[0])
    if status.at < booted - SHUTDOWN_S:
        return status
    return NodeFail(status.at, status.attempt, Reason.NODE_LOST, "the node was restarted", status.checkpoint_step)


def told_by_others(attempt: AttemptDir, spec: dict[str, Any], beat: dict[str, Any], status: Status) -> Status:
    """Of a job on several nodes, read on another one than its first: the supervisors there may have lost that one."""
    if beat.get("hostname") == process.hostname():
        return status
    for node in range(1, spec["nodes"]):
        for event in read_journal(AttemptDir(attempt.path, node).journal)[0]:
            if isinstance(event, AttemptEnded) and event.reason is Reason.NODE_LOST:
                since = time.strftime("%H:%M", time.localtime(event.t))
                return Pending(event.t, status_attempt(status), f"waits for {spec['node']} (lost {since})")
    return status


def revivable(run: RunDir, folded: Status, status: Status) -> bool:
    """Whether it was lost with its node, which runs again, and nobody asked for its end."""
    lost = isinstance(status, NodeFail) and not isinstance(folded, Stopping | NodeFail)
    return lost and not (run.control / "stop").exists()


def in_vain(events: Sequence[Event], status: Status) -> int:
    """How many attempts in a row, the last one too, were lost with their node before they had saved anything new: a
    job may be what brings its node down. One that a person began ends the row.
    """
    starts = [number for number, event in enumerate(events) if isinstance(event, AttemptStarted)]
    reached = status.checkpoint_step if isinstance(status, NodeFail) else None
    count = 0
    for begin, end in reversed(list(zip(starts, [*starts[1:], len(events)]))):
        start = events[begin]
        assert isinstance(start, AttemptStarted)
        told = any(isinstance(event, AttemptEnded) for event in events[begin:end])
        if told or (reached or 0) > (start.resume_step or 0):
            break
        count, reached = count + 1, start.resume_step
        if start.by != "policy":
            break
    return count
