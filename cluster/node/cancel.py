"""Ends a job that SLURM runs, asked on the login node: by its supervisor where that lives, by SLURM where not.

The request lies in control/ before anything else, so a job that starts just then finds it and ends by itself.
"""
from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.contract import RunDir
from cluster.errors import NodeFailure, Refused, Unreachable
from cluster.events import AttemptEnded, AttemptStarted
from cluster.journal import read_journal
from cluster.node import control, scheduled
from cluster.node.kill import GRACE_S, MARGIN_S
from cluster.node.queue import CHUNK, Entry, Queue
from cluster.node.slurm_tools import SlurmFailed, run as run_tool
from cluster.node.slurm_words import Phase
from cluster.node.view import read_view
from cluster.spec import JobSpec
from cluster.states import ENDED_WORDS

if TYPE_CHECKING:
    from cluster.node.view import Ask

NOW_S = 10.0  # `--now`: a supervisor may take this long, then SLURM ends the job
LEAVE_S = 90.0  # after scancel a node may take this long: KillWait, and what it waits for stuck processes
UNASKED_S = 10.0  # a job that has ended is not kept for a controller that does not answer
UNSAID_S = scheduled.FORGOTTEN_S + MARGIN_S  # a job that is gone has an ending after this time
_RING_S = 10.0  # a bell that nobody heard is rung again
_SCANCEL_S = 10.0
_FRESH_S = 0.5  # so old an answer of squeue will do
_PAUSE_S = (0.2, 2.0)
_BACK_OFF_S = 4.0  # a person waits for the end of the job: a controller that was silent is soon asked again
_DENIED = "permission denied"


def ring(run: RunDir) -> None:
    """Wake the supervisor: a shared file system may show it a request a minute late."""
    _scancel("--signal=USR2", scheduled.ids_of(run)[-1:])


def once(runs: Sequence[RunDir], max_age_s: float = _FRESH_S) -> Ask:
    """Asks SLURM about all of these at the first question, and answers the others from that."""
    queues: dict[Path, Queue] = {}

    def ask(workdir: Path, _ids: Sequence[str]) -> Queue:
        if workdir not in queues:
            ids = [id for run in runs if run.path.parent.parent == workdir for id in scheduled.ids_of(run)]
            queues[workdir] = Queue.ask(workdir, ids, max_age_s, pause_max_s=_BACK_OFF_S)
        return queues[workdir]

    return ask


def request_stop(run: RunDir, view: dict[str, Any], request: dict[str, Any]) -> bool:
    """Leave the request where the supervisor finds it -> whether it had ended, or somebody had asked before."""
    return view["state"] in ENDED_WORDS or not control.ask(run, control.Stop(
        request["by"], "kill", request.get("grace_s"), bool(request.get("now")), time.time()))


def tell(runs: Sequence[RunDir], ask: Ask) -> Ask:
    """Take those that wait out of the queue and wake those that run, with one scancel for all -> the queue then.

    What it cannot do for one of them is said when that one is waited for.
    """
    there = [entry for run in runs for entry in _there(run, ask(run.path.parent.parent, ()))]
    guarded, waiting, running = _sorted(there)
    for option, ids in (("--state=PENDING", guarded), ("--quiet", waiting), ("--signal=USR2", running)):
        for start in range(0, len(ids), CHUNK):
            with contextlib.suppress(Refused):
                _scancel(option, ids[start:start + CHUNK])
    after = once(runs, 0.0)
    for workdir in {run.path.parent.parent for run in runs}:
        after(workdir, ())
    return after


def finish(run: RunDir, view: dict[str, Any], request: dict[str, Any], already: bool,
           told: Ask | None = None) -> dict[str, Any]:
    """Wait until a job that was asked to stop has ended and SLURM has let go of it. `told`: it was, by `tell`.

    Raises ClusterError.
    """
    ended = view["state"] in ENDED_WORDS
    if scheduled.unnamed(run):
        from cluster.node import sbatch  # its submit was cut off: it may be in the queue all the same
        sbatch.adopt(run, JobSpec.from_json(run.spec.read_bytes()))
    view = _Cancelling(run, request | {"now": ended or request.get("now")}, told).until_gone()
    return {"state": view["state"], "already": already, "had_ended": ended, "detail": view["detail"],
            "freed": {"processes": 0, "gpu_mb": 0},  # of another host
            "checkpoint_step": view["checkpoint_step"], **_left(run)}


def _there(run: RunDir, queue: Queue) -> list[Entry]:
    return [entry for id in scheduled.ids_of(run) if (entry := queue.current(id)) and entry.phase is not Phase.ENDED]


def _sorted(there: Sequence[Entry]) -> tuple[list[str], list[str], list[str]]:
    """Ids of those that wait and may be guarded against having started meanwhile, of others that wait, of the rest.

    One that has started may save. (Of an array, SLURM 22.05 would cancel every point with such a guard.)
    """
    guarded: list[str] = []
    waiting: list[str] = []
    for one in there:
        if one.phase is Phase.WAITING:
            (guarded if one.state == "PENDING" and "_" not in one.id else waiting).append(one.id)
    return guarded, waiting, [one.id for one in there if one.phase in (Phase.RUNNING, Phase.UNKNOWN)]


class _Cancelling:
    """Does what the queue calls for, again and again: a job may start, or be requeued, at any moment."""

    def __init__(self, run: RunDir, request: dict[str, Any], told: Ask | None) -> None:
        self._run, self._told = run, told
        self._now, self._grace_s = bool(request.get("now")), request.get("grace_s")
        self._begun = time.monotonic()
        self._rung = self._begun if told else 0.0
        self._scancelled = 0.0
        self._gone_since: float | None = None

    def until_gone(self) -> dict[str, Any]:
        """-> the last VIEW."""
        pause_s = _PAUSE_S[0]
        while True:
            queue = self._look()
            view = read_view(self._run, lambda *_, queue=queue: queue)
            there = _there(self._run, queue)
            if view["state"] in ENDED_WORDS and not there and not queue.unasked:
                return view
            self._act(there, view)
            self._check(there, view, queue.unasked)
            time.sleep(pause_s)
            pause_s = min(_PAUSE_S[1], pause_s * 1.5)

    def _look(self) -> Queue:
        ask, self._told = self._told or once([self._run]), None
        return ask(self._run.path.parent.parent, ())

    def _act(self, there: Sequence[Entry], view: dict[str, Any]) -> None:
        guarded, waiting, running = _sorted(there)
        _scancel("--state=PENDING", guarded)
        _scancel("--quiet", waiting)
        now = time.monotonic()
        if running and now > self._begun + self._patience_s(view):
            _scancel("--quiet", running)
            self._scancelled = self._scancelled or now
        elif running and now > self._rung + _RING_S:
            _scancel("--signal=USR2", running)
            self._rung = now

    def _patience_s(self, view: dict[str, Any]) -> float:
        """How long the supervisor may take to end the job."""
        if self._now:
            return NOW_S
        grace_s = view["grace_s"] if view["grace_s"] is not None else self._grace_s
        return (GRACE_S if grace_s is None else grace_s) + MARGIN_S

    def _check(self, there: Sequence[Entry], view: dict[str, Any], unasked: str) -> None:
        """Raises ClusterError when it takes too long."""
        now, name, ended = time.monotonic(), view["id"], view["state"] in ENDED_WORDS
        late_s = now - self._begun - self._patience_s(view)
        if unasked and (late_s > 0 or ended and now > self._begun + UNASKED_S):
            what = "whether SLURM has let go of it could not be asked" if ended else "SLURM could not be asked"
            found = "it ends" if self._run.attempts() else "it ends should it start; once SLURM answers, kill it again"
            raise Unreachable(f"{name} is {view['state']}, and {what}: {unasked}",
                              hint=None if ended else f"the request is in its run directory: {found}; "
                              f"see it with: launch status {name}")
        if there and late_s > LEAVE_S and now > self._scancelled + LEAVE_S:
            states = ", ".join(f"{one.state}{f' on {one.nodes}' if one.nodes else ''}" for one in there)
            raise NodeFailure(f"SLURM still has {name} ({states}) {now - self._begun:.0f} s after it was asked to end",
                              hint="a node that does not answer keeps it: see sinfo -R; then launch kill once more")
        self._gone_since = None if there or unasked else self._gone_since or now
        if self._gone_since and now > self._gone_since + UNSAID_S:
            raise NodeFailure(f"SLURM has let go of {name}, but it is still {view['state']}: {view['detail']}",
                              hint=f"see it with: launch show {name}")


def _scancel(option: str, ids: Sequence[str]) -> None:
    """What it cannot do because a job has ended or SLURM does not answer, the next look at the queue shows.

    Raises Refused: it is somebody else's.
    """
    if not ids:
        return
    try:
        run_tool(["scancel", option, *ids], _SCANCEL_S)
    except SlurmFailed as error:
        if _DENIED in error.words.lower():
            raise Refused(f"SLURM does not let you end {', '.join(ids)}: it is somebody else's job") from None


def _left(run: RunDir) -> dict[str, Any]:
    """What its supervisor could not end, and what only the node itself could say."""
    attempts = run.attempts()
    events, _ = read_journal(attempts[-1].journal) if attempts else ([], 0)
    start = next((event for event in events if isinstance(event, AttemptStarted)), None)
    end = next((event for event in reversed(events) if isinstance(event, AttemptEnded)), None)
    if start is None:
        return {"survivors": [], "note": ""}
    if end is None:
        return {"survivors": [], "note": f"its supervisor on {start.hostname} wrote no ending: SLURM ended it there"}
    return {"survivors": [{"pid": pid, "cmd": f"on {start.hostname}"} for pid in end.survivors], "note": ""}
