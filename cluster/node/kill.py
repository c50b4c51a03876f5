"""Ends a job and says it only when it is true: its ending is written and nothing of it is left."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM, SIGUSR2
from typing import TYPE_CHECKING, Any

from cluster.contract import RunDir
from cluster.errors import ClusterError, NodeFailure, Refused
from cluster.events import AttemptEnded
from cluster.journal import read_journal
from cluster.node import control, gpus, process, stopping, trees
from cluster.node.view import newest_heartbeat, read_view
from cluster.states import ENDED_WORDS

if TYPE_CHECKING:
    from cluster.node.view import Ask

GRACE_S = 60.0  # of a job whose supervisor cannot say it any more
MARGIN_S = 15.0  # a supervisor may take this much longer than the grace to end everything
_POLL_S = 0.02
_AT_ONCE = 16  # jobs that are waited for at the same time


def kill(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Ask the supervisor to stop the job and wait for its verified end; without one, end what it left."""
    return _finish(_begin(RunDir(Path(request["run_dir"])), request), request)


def kill_all(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """`kill` for each of `run_dirs` -> {jobs}, an answer or an error each.

    All are asked before the first is waited for, the last first: what waits for another job must not begin meanwhile.
    """
    from concurrent.futures import ThreadPoolExecutor

    runs = [RunDir(Path(run_dir)) for run_dir in request["run_dirs"]]
    ask = told = None
    if scheduled := [run for run in runs if run.slurm.exists()]:
        from cluster.node import cancel
        ask = cancel.once(scheduled)
    begun = [_or_error(_begin, run, request, ask) for run in reversed(runs)]
    asked = [one.run for one in begun if isinstance(one, _Asked) and one.view["backend"] == "slurm"]
    if ask and asked:
        told = cancel.tell(asked, ask)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return {"jobs": list(pool.map(
            lambda one: one if isinstance(one, dict) else _or_error(_finish, one, request, told), reversed(begun)))}


def _or_error(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except ClusterError as error:
        return {"error": {"exit_code": error.exit_code, "what": error.what, "hint": error.hint}}


@dataclass(frozen=True)
class _Asked:
    """A kill that was asked for."""

    run: RunDir
    view: dict[str, Any]  # before that
    already: bool  # it had ended, or was asked before
    before: list[process.Proc]
    used_mb: int


def _begin(run: RunDir, request: dict[str, Any], ask: Ask | None = None) -> _Asked:
    view = read_view(run, ask)
    refuse_foreign(run, view)
    if view["backend"] == "slurm":
        from cluster.node import cancel  # most nodes have no scheduler
        return _Asked(run, view, cancel.request_stop(run, view, request), [], 0)
    already = view["state"] in ENDED_WORDS
    before, used = _members(run, view["token"], already), _used_mb(view)
    if not already or view["revivable"]:  # it will not be gone on with, then
        asked = control.ask(run, control.Stop(
            request["by"], "kill", request.get("grace_s"), bool(request.get("now")), time.time()))
        already = already or not asked
        ring(run)
    return _Asked(run, view, already, before, used)


def _finish(asked: _Asked, request: dict[str, Any], told: Ask | None = None) -> dict[str, Any]:
    run, view = asked.run, asked.view
    if view["backend"] == "slurm":
        from cluster.node import cancel
        return cancel.finish(run, view, request, asked.already, told)
    if view["state"] not in ENDED_WORDS:
        view = _await_end(run, request.get("grace_s"))
    left = end_leftovers(run, view, 0.0 if request.get("now") else request.get("grace_s"))
    survivors = _survivors(run, left)
    return {
        "state": view["state"], "already": asked.already, "had_ended": asked.view["state"] in ENDED_WORDS,
        "detail": view["detail"],
        "freed": {"processes": max(0, len(asked.before) - len(survivors)),
                  "gpu_mb": max(0, asked.used_mb - _used_mb(view))},
        "checkpoint_step": read_view(run)["checkpoint_step"], "survivors": survivors,
    }


def refuse_foreign(run: RunDir, view: dict[str, Any]) -> None:
    """Raises Refused for a job that no supervisor of this host answers for."""
    if view["by_hand"]:
        raise Refused(f"{view['id']} was started by hand, without a supervisor",
                      hint="end it where it was started: Ctrl-C, or kill its process")
    attempts = run.attempts()
    if view["backend"] == "slurm":  # SLURM answers for it
        return
    if attempts and view["state"] not in ENDED_WORDS and process.heard(attempts[-1]) is None:
        host = (process.read_heartbeat(attempts[-1]) or {}).get("hostname")
        raise Refused(f"{view['id']} runs on {host}, this is {process.hostname()}",
                      hint=f"ask the node {host} for it")


def supervisor_of(run: RunDir) -> tuple[int, int] | None:
    """Pid and start time of the living supervisor, or None."""
    beat = newest_heartbeat(run)
    if beat is None or beat.get("hostname") != process.hostname() or beat.get("boot_id") != process.boot_id():
        return None
    identity = (beat["pid"], beat["pid_started"])
    return identity if process.alive(*identity) else None


def ring(run: RunDir) -> None:
    """Wake the supervisor: it looks into control/ at once."""
    if identity := supervisor_of(run):
        process.send(identity, SIGUSR2)
    elif run.slurm.exists():
        from cluster.node import cancel
        cancel.ring(run)


def end_leftovers(run: RunDir, view: dict[str, Any], grace_s: float | None) -> list[process.Proc]:
    """Let what a dead supervisor left save and end, then kill it. -> what could not be ended.

    Its ranks got SIGTERM from the kernel when it died and are on their way; the others hear it now, once.
    """
    if supervisor_of(run) or not (left := trees.leftovers(run, view["token"])):
        return []
    deadline = time.monotonic() + (GRACE_S if grace_s is None else grace_s)
    told: set[stopping.Identity] = set()
    while left and time.monotonic() < deadline:
        fresh = set(stopping.untold(left, run.attempts()[-1])) - told
        for identity in fresh:
            process.send(identity, SIGTERM)
        told |= fresh
        time.sleep(_POLL_S)
        left = trees.leftovers(run, view["token"])
    return trees.sweep(run, view["token"]) if left else []


def _await_end(run: RunDir, grace_s: float | None) -> dict[str, Any]:
    """The view of the job once it has ended. Raises NodeFailure when it does not, long after its grace."""
    begun = time.monotonic()
    ring(run)
    while True:
        view = read_view(run)
        if view["state"] in ENDED_WORDS:
            return view
        grace = view["grace_s"] if view["grace_s"] is not None else GRACE_S if grace_s is None else grace_s
        if time.monotonic() > begun + grace + MARGIN_S:
            late_s = time.monotonic() - begun
            raise NodeFailure(f"{view['id']} is {view['state']} {late_s:.0f} s after it was asked to end",
                              hint="launch kill --now, then launch logs --rank all")
        time.sleep(_POLL_S)


def _members(run: RunDir, token: str, ended: bool) -> list[process.Proc]:
    identity = supervisor_of(run)
    if ended and identity:  # it only finishes what it wrote about the job
        return []
    return [*process.members(identity[0] if identity else None, token), *trees.left_of(run)]


def _used_mb(view: dict[str, Any]) -> int:
    if not view["gpus"]:
        return 0
    try:
        return gpus.used_mb(view["gpus"])
    except NodeFailure:  # a driver that hangs must not keep anybody from killing a job
        return 0


def _survivors(run: RunDir, left: list[process.Proc]) -> list[dict[str, Any]]:
    attempts = run.attempts()
    events, _ = read_journal(attempts[-1].journal) if attempts else ([], 0)
    named = [pid for event in events if isinstance(event, AttemptEnded) for pid in event.survivors]
    alive = [pid for pid in named if process.start_time(pid) is not None]
    pids = dict.fromkeys([*(one.pid for one in left), *alive])
    return [{"pid": pid, "cmd": " ".join(process.command_of(pid))} for pid in pids]
