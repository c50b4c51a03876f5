"""What is known about jobs: read from their run directories, judged here where their supervisors live; of jobs that
a scheduler runs, SLURM is asked too, once for all of a question.
"""
from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.contract import AttemptDir, BadCheckpoint, RunDir, read_manifest
from cluster.errors import NodeFailure, Unusable
from cluster.events import AttemptEnded, AttemptStarted, Event, Launched, Reason
from cluster.journal import read_events
from cluster.node import lines, measured, process
from cluster.spec import SPEC_VERSION
from cluster.states import (
    ENDED_WORDS, WORDS, Completed, Ended, Failed, Heard, NodeFail, Pending, Restarting, Running, Status, Stopping,
    fold, status_attempt, with_liveness)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.node.queue import Queue
    Ask = Callable[[Path, Sequence[str]], Queue]  # (workdir, ids) -> what SLURM says

UNBORN_S = 60.0  # a job without any attempt is taken for one that is just being submitted for this long
_STATUS_S = 2.5  # of the three seconds that `launch status` waits: what is left is for the way back
_LEAST_S = 0.5  # SLURM is asked for this long in any case
_LAST_BEAT_S, _POLL_S = 1.0, 0.005
_HEARTBEAT_KEYS = (*lines.PROGRESS_KEYS, "peak_rss_mb")
_NOT_SCHEDULED = {"queue": None, "unasked": ""}


class BrokenRun(Exception):
    """A directory below runs/ that cannot be read as a job; the message says why."""


# --- questions ----------------------------------------------------------------------------------------------

def status(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Every job asked for (or every one of the workdir), and what is there but cannot be read."""
    found: list[_Read | dict[str, Any]] = []
    broken = []
    for path in _asked_for(request):
        try:
            found.append(_read(RunDir(path)))
        except BrokenRun as error:
            broken.append({"run_dir": str(path), "why": str(error)})
    queue = _queue_for([one for one in found if isinstance(one, _Read)], _asking_until(request.get("asked_at")))
    jobs = []
    for one in found:
        try:
            view = _view(one, queue) if isinstance(one, _Read) else one
        except BrokenRun as error:
            broken.append({"run_dir": str(one.run.path), "why": str(error)})
            continue
        if not (request.get("active_only") and view["state"] in ENDED_WORDS):
            jobs.append(view)
    fill_health(jobs)
    untold = _untold(request, jobs)
    return {"hostname": process.hostname(), "boot_id": process.boot_id(), "t": time.time(),
            "notes": go_on(jobs) + untold, "jobs": jobs, "broken": broken,
            "unasked": next((view["unasked"] for view in jobs if view["unasked"]), "")}


def fill_health(views: Sequence[dict[str, Any]]) -> None:
    from cluster.node import doctor  # which reads views itself
    doctor.fill(views)


def _untold(request: dict[str, Any], jobs: Sequence[dict[str, Any]]) -> list[str]:
    """Have told what is left of these jobs and others -> what could not be, in words."""
    if not request.get("workdir"):
        return []  # a census asks, or a prune
    workdir = Path(request["workdir"]).expanduser()
    if not (workdir / ".launch" / "untold").is_dir():
        return []
    from cluster.node import notify, untold
    from cluster.spec import Tell
    untold.left_of(workdir, jobs)
    tells = request.get("tells")
    return untold.catch_up(workdir, None if tells is None else {notify.address(Tell(**tell)) for tell in tells})


def go_on(views: Sequence[dict[str, Any]]) -> list[str]:
    """Let go of what SLURM holds because its node could not start it -> words for a person."""
    if not any(view["queue"] for view in views):
        return []
    from cluster.node import release
    return release.go_on(views)


def read_view(run: RunDir, ask: Ask | None = None) -> dict[str, Any]:
    """`view_of` for one job that a person named. Raises Unusable: there is none; NodeFailure: it cannot be
    read.
    """
    if not run.path.is_dir():
        raise Unusable(f"there is no run directory {run.path}",
                       hint="launch status --rescan forgets what is gone")
    try:
        return view_of(run, ask)
    except BrokenRun as error:
        raise NodeFailure(f"{run.path} cannot be read as a job: {error}") from None


def newest_heartbeat(run: RunDir) -> dict[str, Any] | None:
    """Of the newest attempt that has one: between two attempts that is the one before."""
    beats = (process.read_heartbeat(attempt) for attempt in reversed(run.attempts()))
    return next((beat for beat in beats if beat), None)


# --- one job ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Read:
    """A job as its run directory tells it, not yet judged."""

    run: RunDir
    spec: dict[str, Any]
    events: list[Event]
    folded: Status
    attempts: list[AttemptDir]

    @property
    def scheduled(self) -> bool:
        return bool(self.spec.get("slurm"))


def view_of(run: RunDir, ask: Ask | None = None) -> dict[str, Any]:
    """The VIEW of a job. `ask` asks SLURM about one that may still be there. Raises BrokenRun."""
    found = _read(run)
    return found if isinstance(found, dict) else _view(found, _queue_for([found], ask))


def _read(run: RunDir) -> _Read | dict[str, Any]:
    """Of a run that was started by hand: its VIEW. Raises BrokenRun."""
    try:
        spec = json.loads(run.spec.read_bytes())
    except FileNotFoundError:
        return _by_hand(run)
    except (OSError, ValueError) as error:
        raise BrokenRun(f"spec.json: {error}") from None
    if not isinstance(spec, dict) or spec.get("version") != SPEC_VERSION:
        raise BrokenRun(f"spec.json is not one of version {SPEC_VERSION}")
    try:
        events, _ = read_events(run)
        folded, _ = fold(events, spec["submitted_at"])
        attempts = run.attempts()
        return _Read(run, spec, events, _with_newest(folded, attempts), attempts)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BrokenRun(f"{type(error).__name__}: {error}") from None


def _with_newest(folded: Status, attempts: list[AttemptDir]) -> Status:
    """An attempt that has only begun, or waits, has written nothing yet: the ending of the one before is not the job's.
    """
    if isinstance(folded, Ended) and attempts and not attempts[-1].journal.exists():
        return Pending(attempts[-1].path.stat().st_mtime, attempts[-1].number, "starting")
    return folded


def _queue_for(found: Sequence[_Read], ask: Ask | None = None) -> Queue | None:
    """What SLURM says about those that it may still have; None: there are none."""
    if not (scheduled := [one for one in found if one.scheduled]):
        return None
    from cluster.node import scheduled as slurm  # most nodes have no scheduler
    open_ids = [id for one in scheduled for id in slurm.open_ids(one.run, one.folded, one.events)]
    if not open_ids and not any(slurm.unnamed(one.run, isinstance(one.folded, Ended)) for one in scheduled):
        return None
    from cluster.node.queue import Queue
    return (ask or Queue.ask)(scheduled[0].run.path.parent.parent, open_ids)


def _asking_until(asked_at: float | None) -> Ask:
    """Leaves SLURM what is left of the time that a client waits: it was asked at `asked_at` by its own clock."""
    spent_s = time.time() - asked_at if asked_at else 0.0
    limit_s = max(_LEAST_S, _STATUS_S - spent_s) if 0 <= spent_s < _STATUS_S else None

    def ask(workdir: Path, ids: Sequence[str]) -> Queue:
        from cluster.node.queue import Queue
        return Queue.ask(workdir, ids, limit_s=limit_s)

    return ask


def _view(one: _Read, queue: Queue | None) -> dict[str, Any]:
    try:
        return _scheduled(one, queue) if one.scheduled else _supervised(one)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BrokenRun(f"{type(error).__name__}: {error}") from None


def _supervised(one: _Read) -> dict[str, Any]:
    """Of a job whose supervisor lives on this host."""
    checkpoint_step = _checkpoint_step(one.run, one.folded, one.events)
    beat = newest_heartbeat(one.run) or {}
    heard = _heard(one.run, one.attempts, one.folded)
    status = _with_work_done(with_liveness(one.folded, heard, checkpoint_step), one)
    status = _with_survivors(status, one.run, one.spec["token"])
    status, revivable = _with_its_nodes(one, status, beat)
    if isinstance(status, Pending | Restarting) and beat.get("waits"):
        status = Pending(status.since, status.attempt, beat["waits"])
    _await_last_heartbeat(one.attempts, status, local=True)
    moved = _moved(one.run) if isinstance(status, Ended) else None
    hosts = ",".join(one.spec.get("hosts") or ()) or one.spec["node"]
    facts = _facts(one, status, checkpoint_step)
    if moved:
        facts["detail"] = f"moved to {moved['node']}"
    return facts | _NOT_SCHEDULED | {
        "backend": "host", "place": hosts, "revivable": revivable and not moved, "moved_to": moved}


def _moved(run: RunDir) -> dict[str, Any] | None:
    """Where the job goes on, when that is another node with a workdir of its own."""
    try:
        return json.loads(run.moved_to.read_bytes())
    except (OSError, ValueError):
        return None


def _with_its_nodes(one: _Read, status: Status, beat: dict[str, Any]) -> tuple[Status, bool]:
    """-> the status by what is known of restarted and lost nodes, and whether the job is to go on now."""
    if isinstance(status, Running | Restarting) and one.spec["nodes"] == 1 or isinstance(status, Completed | Failed):
        return status, False
    from cluster.node import revival  # most jobs need none of it
    status = revival.after_shutdown(status, beat)
    if one.spec["nodes"] > 1 and one.attempts and not isinstance(status, Ended):
        status = revival.told_by_others(one.attempts[-1], one.spec, beat, status)
    most = one.spec["restart"]["max_restarts"]
    if not most or not revival.revivable(one.run, one.folded, status):
        return status, False
    if (vain := revival.in_vain(one.events, status)) > most and isinstance(status, NodeFail):
        return replace(status, detail=f"{status.detail}; given up: so it went {vain} times in a row"), False
    return status, True


def _scheduled(one: _Read, queue: Queue | None) -> dict[str, Any]:
    """Of a job that SLURM runs: the heartbeat's host is another one, so SLURM says whether it lives."""
    from cluster.node import scheduled as slurm
    from cluster.node.queue import UNASKED
    checkpoint_step = _checkpoint_step(one.run, one.folded, one.events)
    told = slurm.told(one.run, one.events, newest_heartbeat(one.run) or {}, checkpoint_step,
                      one.spec.get("after") or ())
    if queue and slurm.unnamed(one.run, isinstance(one.folded, Ended)):
        told = replace(told, ids=slurm.ids_shown(one.run, one.spec, queue))
    answer = queue.about(told.ids[-1] if told.ids else None) if queue else UNASKED
    judged = slurm.judge(one.folded, told, answer)
    status = _with_work_done(judged.status, one)
    _await_last_heartbeat(one.attempts, status, local=False)
    facts = _facts(one, status, checkpoint_step)
    over = isinstance(status, Ended)
    if judged.reason and not over:
        facts["reason"] = judged.reason.value
    if judged.note and not over:
        facts["detail"] = judged.note
    if told.stopper and isinstance(status, Pending | Running):  # and nothing of it is heard of yet
        facts["detail"] = "; ".join(filter(None, (f"stop asked by {told.stopper}", facts["detail"])))
    return facts | {
        "backend": "slurm", "place": slurm.place(one.spec, told, answer.entry, status),
        "queue": slurm.facts(answer), "slurm_id": told.ids[-1] if told.ids else None,
        "unasked": "" if over else answer.unasked}


def _facts(one: _Read, status: Status, checkpoint_step: int | None) -> dict[str, Any]:
    """What every VIEW of a job with a spec says."""
    beat = newest_heartbeat(one.run) or {}
    starts = [event for event in one.events if isinstance(event, AttemptStarted)]
    launches = [event for event in one.events if isinstance(event, Launched)]
    waiting = isinstance(status, Pending | Restarting)
    return {
        **{key: one.spec[key] for key in ("id", "name", "stage", "node", "token", "submitted_at")},
        "run_dir": str(one.run.path), "by_hand": False,
        "group": one.spec.get("group"), "after": [job["run_dir"] for job in one.spec.get("after", ())],
        "hosts": one.spec.get("hosts") or [], "missing": waiting and beat.get("missing") or [], "revivable": False,
        **_state_facts(status),
        **{key: beat.get(key) for key in _HEARTBEAT_KEYS},
        **_latest_progress(one.attempts, status),
        "gpus": list(launches[-1].gpus) if launches else [],
        "expected_s": measured.expected_s(one.run.path.parent.parent, one.spec.get("cost"))
        if isinstance(status, Pending) else None,
        "heard_at": beat.get("t"),
        "started_at": starts[0].t if starts else None,
        "resume_step": starts[-1].resume_step if starts else None,
        "checkpoint_step": checkpoint_step,
    }


def _await_last_heartbeat(attempts: list[AttemptDir], status: Status, local: bool) -> None:
    """A living supervisor writes it just after the ending, with the last step and loss; nobody asks again.

    `local`: whether it lives is known here.
    """
    deadline = time.monotonic() + _LAST_BEAT_S
    while attempts and isinstance(status, Ended) and time.time() - status.at < _LAST_BEAT_S:
        if local:
            heard = process.heard(attempts[-1])
            over = heard is None or not heard.alive or heard.last >= status.at
        else:
            over = ((process.read_heartbeat(attempts[-1]) or {}).get("t") or 0.0) >= status.at
        if over or time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


def _latest_progress(attempts: list[AttemptDir], status: Status) -> dict[str, Any]:
    """Of a running attempt: its heartbeat is up to ten seconds older than its metrics."""
    return lines.progress(attempts[-1]) if attempts and isinstance(status, Running | Stopping) else {}


def _with_work_done(status: Status, one: _Read) -> Status:
    """Of a job that lost its supervisor or its node when all was written already: there is nothing to go on with."""
    if not isinstance(status, Failed | NodeFail) or status.reason not in (Reason.SUPERVISOR_LOST, Reason.NODE_LOST):
        return status
    from cluster.node.history import finished  # most jobs lose nothing
    if not finished(one.run, one.spec["resume_rule"]["kind"] == "launch"):
        return status
    return Completed(status.at, status.attempt, Reason.DONE, f"{status.reason.value} after its last word",
                     status.checkpoint_step)


def _with_survivors(status: Status, run: RunDir, token: str) -> Status:
    """Of a job whose supervisor was lost: what of it goes on. A shell's children are told by nobody."""
    if not isinstance(status, Failed) or status.reason is not Reason.SUPERVISOR_LOST:
        return status
    from cluster.node import trees  # most supervisors live
    if not (left := len(trees.leftovers(run, token))):
        return status
    return replace(status, detail=f"{left} of its processes still run; launch kill ends them")


def _heard(run: RunDir, attempts: list[AttemptDir], status: Status) -> Heard | None:
    if isinstance(status, Ended):
        return None
    if attempts:
        return process.heard(attempts[-1])
    made = run.spec.stat().st_mtime
    return Heard(alive=time.time() - made < UNBORN_S, last=made)


def _state_facts(status: Status) -> dict[str, Any]:
    """What the variant of a status says, under the names of a VIEW."""
    facts: dict[str, Any] = {"state": WORDS[type(status)], "attempt": status_attempt(status), "reason": None,
                             "detail": "", "ended_at": None, "grace_s": None, "retry_at": None}
    match status:
        case Pending():
            return facts | {"detail": status.why}
        case Running():
            return facts
        case Stopping():
            return facts | {"detail": f"{status.why} by {status.by}", "grace_s": status.grace_s}
        case Restarting():
            return facts | {"reason": status.reason.value, "detail": status.detail, "retry_at": status.until}
        case Ended():
            return facts | {"reason": status.reason.value, "detail": status.detail, "ended_at": status.at}
    raise AssertionError(status)


def _checkpoint_step(run: RunDir, status: Status, events: list[Event]) -> int | None:
    """The newest step a restart could begin at: what the last ending verified, else what is finished on disk.
    """
    if isinstance(status, Ended | Restarting):
        endings = (event for event in reversed(events) if isinstance(event, AttemptEnded))
        return next((event.checkpoint_step for event in endings), None)
    from cluster.node.resume import counting_checkpoints  # loads much that ended jobs never need
    for path in counting_checkpoints(run, 1 + (status_attempt(status) or 0)):
        try:
            return read_manifest(path).step
        except BadCheckpoint:
            continue
    return None


def _by_hand(run: RunDir) -> dict[str, Any]:
    from cluster.node import by_hand  # most runs have a spec
    if (found := by_hand.read(run)) is None:
        raise BrokenRun("no spec.json: a submit that is going on or was cut off")
    status, facts = found
    return facts | _state_facts(status) | _NOT_SCHEDULED | {
        "backend": "host", "hosts": [], "missing": [], "revivable": False, "run_dir": str(run.path), "by_hand": True}


def _asked_for(request: dict[str, Any]) -> list[Path]:
    if request.get("jobs") is not None:
        return [Path(job) for job in request["jobs"]]
    runs = Path(request["workdir"]).expanduser() / "runs"
    try:
        with os.scandir(runs) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            return sorted(Path(entry.path) for entry in visible if entry.is_dir())
    except FileNotFoundError:
        return []
