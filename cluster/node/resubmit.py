"""Starts the next attempt of a job that SLURM runs, asked on the login node: in its allocation where it has one, with
what was changed in the queue where it waits (a hold ends), and by a new place in the queue where it has ended."""
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cluster.contract import AttemptDir, RunDir
from cluster.errors import NodeFailure, Refused, Unreachable
from cluster.node import cancel, control, release, sbatch
from cluster.node.kill import GRACE_S
from cluster.node.slurm_words import Phase, phase_of
from cluster.node.submit import begun
from cluster.node.view import read_view
from cluster.spec import JobSpec
from cluster.states import ENDED_WORDS

PREPARE_S = 150.0  # hashing a checkpoint, activating conda, and a shared file system that shows things late
_RING_S = 10.0
_POLL_S = 0.5


def resubmit(run: RunDir, view: dict[str, Any], attempt: AttemptDir, change: control.Restart,
             agent: Sequence[str]) -> str | None:
    """Have `attempt` started -> the SLURM id under which it waits in the queue; None: it has begun.

    Raises ClusterError; nothing has changed when SLURM refused the job or could not be asked.
    """
    if view["state"] in ENDED_WORDS:
        return _queue(run, change, agent)
    if view["unasked"] or not view["queue"]:
        why = view["unasked"] or "it does not show it yet"
        raise Unreachable(f"SLURM could not be asked about {view['id']}: {why}",
                          hint=f"see it with: launch status {view['id']}; then restart it again")
    if phase_of(view["queue"]["state"]) is Phase.WAITING and _change_in_queue(run, attempt, change):
        release.by_person(run, view, change.by)
        return str(view["queue"]["id"])
    return _by_supervisor(run, view["id"], attempt, change, agent)


def _queue(run: RunDir, change: control.Restart, agent: Sequence[str]) -> str:
    spec = _spec(run, change)
    sbatch.forecast(spec, run.path.parent.parent, agent)  # a refusal leaves the job as it was
    control.Control(run).discard()  # requests that nobody saw were for what has ended
    _install(run, change)
    return sbatch.queue(run, spec, agent)


def _change_in_queue(run: RunDir, attempt: AttemptDir, change: control.Restart) -> bool:
    """Whether the job begins with the change; False: it began meanwhile, perhaps without it."""
    _install(run, change)
    return not attempt.path.exists()


def _by_supervisor(run: RunDir, name: str, attempt: AttemptDir, change: control.Restart,
                   agent: Sequence[str]) -> str | None:
    if not control.ask(run, change):
        raise Refused(f"a restart of {name} was asked before and is under way",
                      hint=f"see it with: launch status {name}")
    asked, rung = time.monotonic(), 0.0
    while not begun(attempt):
        view = read_view(run)
        if view["state"] in ENDED_WORDS:  # before it saw the request
            return _queue(run, change, agent)
        if view["queue"] and phase_of(view["queue"]["state"]) is Phase.WAITING:
            return str(view["queue"]["id"])  # requeued meanwhile: it meets the request when it begins
        now = time.monotonic()
        if now > rung + _RING_S:
            cancel.ring(run)
            rung = now
        if now > asked + (view["grace_s"] or change.grace_s or GRACE_S) + PREPARE_S:
            raise NodeFailure(f"{name} has not started again {now - asked:.0f} s after it was asked to",
                              hint=f"see it with: launch status {name}")
        time.sleep(_POLL_S)
    return None


def _spec(run: RunDir, change: control.Restart) -> JobSpec:
    return JobSpec.from_json(run.spec.read_bytes() if change.spec is None else change.spec.encode())


def _install(run: RunDir, change: control.Restart) -> None:
    control.install(run, change)
    control.install_code(run, change.code_digest)
