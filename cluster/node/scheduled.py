"""What a job is on a SLURM cluster: what its run directory tells and what SLURM says of its allocation, made one.

An ending in the run directory counts. Without one SLURM decides; what it could not be asked, and words of it that we
do not know, change nothing.
"""
from __future__ import annotations

import json
import os
import pwd
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.events import AttemptEnded, AttemptStarted, Event, Reason
from cluster.journal import read_journal
from cluster.node.queue import Answer, Entry, Queue
from cluster.node.slurm_words import ENDINGS, PASSING, Phase, ordinal, reason_words, state_words
from cluster.states import ENDING, Ended, Pending, Restarting, Running, Status, Stopping, status_attempt

SUBMITTING_S = 240.0  # a job without an id in slurm.json is being submitted for this long
FORGOTTEN_S = 60.0  # after its last sign of life a job that SLURM does not show is kept for this long
CANCELLED_S = 5.0  # one that somebody ended before it began: should SLURM start it all the same, it finds the request
QUIET_S = 60.0  # a heartbeat that is older is worth a word
SETTLE_S = 10.0  # an ending that SLURM tells may be ahead of what the supervisor wrote for this long
_FORGOTTEN = "SLURM does not know it any more"


@dataclass(frozen=True)
class Told:
    """What the run directory tells beside the status that its events make."""

    ids: tuple[str, ...]  # SLURM's, the newest last
    start: AttemptStarted | None  # of the newest attempt
    end: AttemptEnded | None  # its ending
    beat: dict[str, Any]  # of the newest attempt that has one
    last_sign: float  # unix seconds
    stopper: str  # who asked for a stop that no supervisor has seen to; empty: nobody
    checkpoint_step: int | None
    after: tuple[dict[str, Any], ...] = ()  # the spec's: jobs that it waits for

    @property
    def requeued(self) -> Reason | None:
        """Why the newest attempt left the rest to the scheduler."""
        return self.end.reason if self.end and self.end.next == "requeue" else None


@dataclass(frozen=True)
class Judged:
    """A status, with why a waiting job waits again, and what a person should know beside the state."""

    status: Status
    reason: Reason | None = None
    note: str = ""


def ids_of(run: RunDir) -> tuple[str, ...]:
    """SLURM's ids of a job, the newest last; none: it was not queued yet, or slurm.json cannot be read."""
    try:
        return tuple(map(str, json.loads(run.slurm.read_bytes())["ids"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def open_ids(run: RunDir, folded: Status, events: Sequence[Event]) -> tuple[str, ...]:
    """The newest id, unless the run directory says all there is to say."""
    ids = ids_of(run)
    start = next((event for event in reversed(events) if isinstance(event, AttemptStarted)), None)
    return () if isinstance(folded, Ended) and not _queued_again(ids, start) else ids[-1:]


def unnamed(run: RunDir, ended: bool = False) -> bool:
    """Whether nobody wrote down an id that SLURM may have given it: its submit goes on, or was cut off. `ended`: by
    what the run directory tells, it was given to SLURM before.
    """
    known = _noted(run)
    return bool(known.get("asked")) or not ended and not known.get("ids")


def ids_shown(run: RunDir, spec: dict[str, Any], queue: Queue) -> tuple[str, ...]:
    """The ids of a job with those under which squeue shows it that are not in its slurm.json."""
    from cluster.node.sbatch_options import mark
    known, array = ids_of(run), _noted(run).get("array")
    name, token, ending = ((array["name"], array["token"], f"_{array['index']}") if array else
                           (spec["id"], spec["token"], ""))
    shown = (one.id for one in queue.commented(mark(token)) if one.name == name and one.id.endswith(ending))
    return (*known, *(id for id in shown if id not in known))


def _noted(run: RunDir) -> dict[str, Any]:
    try:
        return dict(json.loads(run.slurm.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _queued_again(ids: Sequence[str], start: AttemptStarted | None) -> bool:
    """Whether it was given to SLURM once more after the newest attempt."""
    return bool(start and start.slurm_id in ids and start.slurm_id != ids[-1])


def told(run: RunDir, events: Sequence[Event], beat: dict[str, Any], checkpoint_step: int | None,
         after: Sequence[dict[str, Any]] = ()) -> Told:
    starts = [number for number, event in enumerate(events) if isinstance(event, AttemptStarted)]
    newest = events[starts[-1]:] if starts else events
    start = next((event for event in newest if isinstance(event, AttemptStarted)), None)
    end = next((event for event in reversed(newest) if isinstance(event, AttemptEnded)), None)
    signs = [_changed(run.slurm), _changed(run.spec), beat.get("t") or 0.0, *(event.t for event in newest[-1:])]
    return Told(ids_of(run), start, end, beat, max(signs), _stopper(run), checkpoint_step, tuple(after))


def _changed(path: os.PathLike[str]) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _stopper(run: RunDir) -> str:
    try:
        return str(json.loads((run.control / "stop").read_bytes())["by"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        return "somebody"


# --- the rules ----------------------------------------------------------------------------------------------

def judge(folded: Status, told: Told, answer: Answer) -> Judged:
    """`folded`: what the events say. `answer`: what SLURM said about the newest of the job's ids."""
    if isinstance(folded, Ended) and not _queued_again(told.ids, told.start):
        return Judged(folded)
    entry = answer.entry
    if entry is None:
        return _unshown(folded, told, answer)
    match entry.phase:
        case Phase.WAITING:
            return _waiting(folded, told, entry, answer)
        case Phase.RUNNING | Phase.LEAVING:
            return _running(folded, told, entry)
        case Phase.ENDED:
            return Judged(folded) if isinstance(folded, Ended) else _ended(folded, told, entry, answer)
        case Phase.UNKNOWN:
            return Judged(folded, note=state_words(entry.state))
    raise AssertionError(entry.phase)


def _waiting(folded: Status, told: Told, entry: Entry, answer: Answer) -> Judged:
    if _begun_since(told, answer):
        return Judged(folded)
    reason = told.requeued
    if reason is None and told.start and not told.end:  # it began once, and nobody said that it ended
        reason = Reason.NODE_LOST
    shown = None if reason is Reason.SUPERSEDED else reason
    return Judged(Pending(_since(folded), status_attempt(folded), _waits_words(told, entry)), shown)


def _running(folded: Status, told: Told, entry: Entry) -> Judged:
    words = state_words(entry.state)
    if waits := waits_for(folded, told.beat):
        return Judged(Pending(_since(folded), status_attempt(folded), waits))
    if told.requeued and _of_this_run(told, entry) or entry.phase is Phase.LEAVING and not _of_this_run(told, entry):
        return Judged(Pending(_since(folded), status_attempt(folded), words or "being requeued"), told.requeued)
    if not _of_this_run(told, entry):
        return Judged(Pending(_since(folded), status_attempt(folded), words or f"starting on {entry.nodes}"))
    quiet_s = time.time() - max(told.beat.get("t") or 0.0, told.start.t if told.start else 0.0)
    if isinstance(folded, Running | Stopping) and quiet_s > QUIET_S and not words:
        words = f"no heartbeat for {quiet_s:.0f} s"
    return Judged(folded, note=words)


def waits_for(folded: Status, beat: dict[str, Any]) -> str:
    """What a living supervisor waits for before it begins an attempt; empty: nothing."""
    fresh = time.time() - (beat.get("t") or 0.0) < QUIET_S
    return str(beat.get("waits") or "") if fresh and isinstance(folded, Pending | Restarting) else ""


def _ended(folded: Status, told: Told, entry: Entry, answer: Answer) -> Judged:
    """SLURM says that it has ended, the run directory does not."""
    at = entry.ended_at or answer.asked_at
    unsaid = told.start is not None and _of_this_run(told, entry) and not told.requeued
    if _begun_since(told, answer) or (unsaid or entry.state in PASSING) and time.time() - at < SETTLE_S:
        return Judged(folded, note=f"SLURM says {entry.state}")
    reason, detail = _why(told, entry)
    return Judged(ENDING[reason](at, status_attempt(folded), reason, detail, told.checkpoint_step))


def _why(told: Told, entry: Entry) -> tuple[Reason, str]:
    if told.stopper and entry.state in ("CANCELLED", "FAILED", "COMPLETED"):
        return Reason.KILLED, f"by {told.stopper}: {_before(told)}"
    if entry.state == "CANCELLED" and entry.reason.startswith("Dependency"):
        return Reason.DEPENDENCY, _which_failed(told) or "cancelled by SLURM"
    if entry.state == "CANCELLED":
        return Reason.KILLED, f"by {_user(entry.canceller)}: {_before(told)}"
    if entry.state in ENDINGS:
        return ENDINGS[entry.state], _on(entry)
    if told.requeued:
        return told.requeued, "SLURM did not start it again"
    said = f"SLURM says {entry.state}" + (f" ({entry.reason})" if entry.reason else "") + _on(entry, " on ")
    if told.start is None:
        return Reason.CANNOT_START, said
    return Reason.SUPERVISOR_LOST, f"it wrote no ending; {said}"


def _unshown(folded: Status, told: Told, answer: Answer) -> Judged:
    """SLURM does not show it, or could not be asked."""
    if isinstance(folded, Ended):  # and it was given to SLURM once more since then
        if answer.gone and answer.asked_at - told.last_sign >= FORGOTTEN_S:
            return Judged(folded)
        return Judged(Pending(told.last_sign, status_attempt(folded), "given to SLURM again"))
    if not told.ids:
        if answer.unasked or time.time() - told.last_sign < SUBMITTING_S:
            return Judged(folded, note="being handed to SLURM")
        return Judged(ENDING[Reason.CANNOT_START](
            told.last_sign, None, Reason.CANNOT_START, "it never reached SLURM's queue; submit it again"))
    patience_s = CANCELLED_S if told.stopper and told.start is None else FORGOTTEN_S
    if not answer.gone or answer.asked_at - told.last_sign < patience_s:
        return Judged(folded)
    if told.stopper:
        reason, detail = Reason.KILLED, f"by {told.stopper}: {_before(told)}"
    elif told.requeued is Reason.SCHEDULER or told.start is None and "_" in told.ids[-1]:
        # Of points of an array that are cancelled while others still wait SLURM keeps no record.
        reason, detail = Reason.KILLED, f"by scancel: {_before(told)}"
    else:
        reason, detail = told.requeued or Reason.SUPERVISOR_LOST, _FORGOTTEN
    return Judged(ENDING[reason](told.last_sign, status_attempt(folded), reason, detail, told.checkpoint_step))


# --- words --------------------------------------------------------------------------------------------------

def waiting_words(entry: Entry) -> str:
    """`Priority, 3rd of 17`; when it may start a client says, in its own time zone."""
    words = [state_words(entry.state) or reason_words(entry.reason)]
    if entry.position:
        words.append(f"{ordinal(entry.position)} of {entry.of}")
    return ", ".join(filter(None, words)) or "queued"


def _waits_words(told: Told, entry: Entry) -> str:
    """SLURM knows that it waits for jobs, we know how a person calls them."""
    if entry.reason != "Dependency":
        return waiting_words(entry)
    names = [job["id"] for job in told.after if _ending_of(job) is None]
    return f"waits for {', '.join(names)}" if names else waiting_words(entry)


def _which_failed(told: Told) -> str:
    """Of the jobs that it waited for; empty: their run directories do not tell."""
    for job in told.after:
        end = _ending_of(job)
        if end and end.reason is not Reason.DONE and not job["any"]:
            return ": ".join(filter(None, (job["id"], end.reason.value, end.detail)))
    return ", ".join(job["id"] for job in told.after if not job["any"])


def _ending_of(job: dict[str, Any]) -> AttemptEnded | None:
    attempts = RunDir(Path(job["run_dir"])).attempts()
    events, _ = read_journal(attempts[-1].journal) if attempts else ([], 0)
    return next((event for event in reversed(events) if isinstance(event, AttemptEnded) and event.next == "end"), None)


def facts(answer: Answer) -> dict[str, Any] | None:
    """The key `queue` of a VIEW."""
    if (entry := answer.entry) is None:
        return None
    waits = entry.phase is Phase.WAITING
    return {"id": entry.id, "state": entry.state, "reason": entry.reason,
            "words": waiting_words(entry) if waits else state_words(entry.state),
            "position": entry.position, "of": entry.of, "starts_at": entry.starts_at if waits else None,
            "restarts": entry.restarts, "asked_at": answer.asked_at}


def place(spec: dict[str, Any], told: Told, entry: Entry | None, status: Status) -> str:
    """Where it runs or ran; while it waits, where it would."""
    if entry and entry.nodes and not isinstance(status, Ended):
        return entry.nodes
    if told.start and not isinstance(status, Pending):
        return ",".join(told.start.nodes) or told.start.hostname
    slurm = spec["slurm"]
    where = slurm.get("nodelist") or slurm.get("partition") or (entry.partition if entry else "")
    return f"{spec['node']}:{where}" if where else spec["node"]


def _of_this_run(told: Told, entry: Entry) -> bool:
    """Whether the newest attempt is of the allocation that SLURM shows, not of one before a requeue."""
    start = told.start
    if start is None or start.slurm_id not in (None, entry.id, entry.raw_id):
        return False
    return None in (start.slurm_restarts, entry.restarts) or start.slurm_restarts >= entry.restarts


def _begun_since(told: Told, answer: Answer) -> bool:
    """Whether the newest attempt is younger than the answer."""
    return told.start is not None and not told.end and told.start.t > answer.asked_at


def _since(status: Status) -> float:
    return status.at if isinstance(status, Ended) else status.since


def _before(told: Told) -> str:
    return "scancel" if told.start else "before it started"


def _on(entry: Entry, before: str = "on ") -> str:
    return f"{before}{entry.nodes}" if entry.nodes else ""


def _user(uid: str) -> str:
    """The name of who cancelled it; accounting knows, squeue does not."""
    if not uid.isdecimal():
        return uid or "scancel"
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except KeyError:
        return f"user {uid}"
