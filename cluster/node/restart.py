"""Starts the next attempt of a job: by its living supervisor, or by a new one where that has ended."""
from __future__ import annotations

import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cluster.contract import AttemptDir, RunDir
from cluster.errors import NodeFailure, Refused
from cluster.events import AttemptEnded, AttemptStarted
from cluster.journal import read_journal
from cluster.node import control, environment, process
from cluster.node.kill import GRACE_S, end_leftovers, refuse_foreign, ring, supervisor_of
from cluster.node.move import refuse_moved
from cluster.node.submit import START_S, agent_of, begun, read_spec, start_supervisor, unpack_code
from cluster.node.view import read_view
from cluster.states import ENDED_WORDS

PREPARE_S = 120.0  # hashing a checkpoint and activating conda come before an attempt's first word
_POLL_S = 0.02


def restart(request: dict[str, Any], payload: BinaryIO) -> dict[str, Any]:
    """-> {attempt, pid, resume_step} of the attempt that has begun, or {attempt, slurm_id} of one that waits for
    SLURM, or {attempt, waits} of one that waits for other jobs or for GPUs. `released`: the node that had it before has
    been asked, and nothing of the job lives there.
    """
    run = RunDir(Path(request["run_dir"]))
    view = read_view(run)
    refuse_moved(view)
    ended = view["state"] in ENDED_WORDS or bool(request.get("released"))
    if not ended:
        refuse_foreign(run, view)
    workdir = run.path.parent.parent
    change = _change(run, request, view)
    if change.code_digest:
        unpack_code(workdir, change.code_digest, payload, request.get("payload_size", 0))
    if request.get("secrets"):
        environment.write_secrets(workdir, request["secrets"])
    with one_at_a_time(run, view["id"]):
        attempts = run.attempts()
        attempt = run.attempt(attempts[-1].number + 1 if attempts else 0)
        if view["backend"] == "slurm":
            from cluster.node.resubmit import resubmit  # most nodes have no scheduler
            if waits := resubmit(run, view, attempt, change, agent_of(request)):
                return {"attempt": attempt.number, "pid": None, "resume_step": None, "slurm_id": waits}
        elif ended or not _by_supervisor(run, attempt, change, view["id"]):
            _by_new_supervisor(run, attempt, change, request)
    start = _await_start(attempt)
    identity = supervisor_of(run)
    return {"attempt": attempt.number, "pid": identity[0] if identity else None,
            "resume_step": start.resume_step if start else None, "slurm_id": None,
            "waits": "" if start else _waits(attempt)}


def _change(run: RunDir, request: dict[str, Any], view: dict[str, Any]) -> control.Restart:
    """What is asked, with the id and token that the job has on this node, whatever the client believed. The code stays
    as it is, with what the job has written into it, unless it is to be another one.
    """
    text, digest = None, None
    if request.get("spec") is not None:
        spec = dataclasses.replace(read_spec(request["spec"]), id=view["id"], token=view["token"])
        before = read_spec(json.loads(run.spec.read_bytes())).code.digest
        text, digest = spec.to_json().decode(), spec.code.digest if spec.code.digest != before else None
    return control.Restart(request["by"], time.time(), request.get("grace_s"), text, request.get("config"),
                           digest)


@contextmanager
def one_at_a_time(run: RunDir, name: str) -> Iterator[None]:
    with open(run.path / ".restart.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"{name} is being restarted by somebody else",
                          hint=f"see it with: launch status {name}") from None
        yield


def _by_supervisor(run: RunDir, attempt: AttemptDir, change: control.Restart, name: str) -> bool:
    """Ask the living supervisor and wait until the next attempt has begun; False when it ended before it saw
    that.
    """
    asked = time.monotonic()
    if not control.ask(run, change):
        raise Refused(f"a restart of {name} was asked before and is under way",
                      hint=f"see it with: launch status {name}")
    ring(run)
    while not begun(attempt):
        if supervisor_of(run) is None and not begun(attempt):
            return False
        grace_s = read_view(run)["grace_s"] or change.grace_s or GRACE_S
        if time.monotonic() > asked + grace_s + PREPARE_S:
            late_s = time.monotonic() - asked
            raise NodeFailure(f"{name} has not started again {late_s:.0f} s after it was asked to",
                              hint=f"see it with: launch status {name}")
        time.sleep(_POLL_S)
    return True


def _by_new_supervisor(run: RunDir, attempt: AttemptDir, change: control.Restart,
                       request: dict[str, Any]) -> None:
    deadline = time.monotonic() + START_S
    while supervisor_of(run):  # it has written the ending and is about to leave
        if time.monotonic() > deadline:
            raise NodeFailure(f"the supervisor of {run.path.name} has ended its job but does not end itself",
                              hint="see logs/supervisor.log of its last attempt")
        time.sleep(_POLL_S)
    if left := end_leftovers(run, read_view(run), change.grace_s):
        pids = ", ".join(str(one.pid) for one in left)
        raise NodeFailure(f"processes of the last attempt cannot be ended: {pids}",
                          hint="they hang in the kernel: a dead file system or driver; restart afterwards")
    control.install(run, change)
    control.install_code(run, change.code_digest)
    start_supervisor(run, "restart", agent_of(request), attempt.number)


def _await_start(attempt: AttemptDir) -> AttemptStarted | None:
    """The attempt's first event; None when it waits, takes too long or ended without one."""
    deadline = time.monotonic() + PREPARE_S
    while time.monotonic() < deadline:
        events, _ = read_journal(attempt.journal)
        if start := next((event for event in events if isinstance(event, AttemptStarted)), None):
            return start
        if _waits(attempt) or any(isinstance(event, AttemptEnded) for event in events):
            return None
        time.sleep(_POLL_S)
    return None


def _waits(attempt: AttemptDir) -> str:
    """For what an attempt waits that has not begun."""
    return (process.read_heartbeat(attempt) or {}).get("waits") or ""
