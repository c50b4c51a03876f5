"""What is known about jobs: read from their run directories, judged here where their supervisors live."""
from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.contract import (
    AttemptDir, BadCheckpoint, RunDir, list_checkpoints, merged_metrics, parse_checkpoint_name,
    read_json_lines, read_manifest)
from cluster.errors import NodeFailure, Unusable
from cluster.events import AttemptEnded, AttemptStarted, Event, Launched, Reason, encode
from cluster.journal import read_events, read_journal
from cluster.node import process
from cluster.spec import SPEC_VERSION
from cluster.states import (
    ENDED_WORDS, WORDS, Completed, Ended, Failed, Heard, Pending, Restarting, Running, Status, Stopping, fold,
    status_attempt, with_liveness)

BY_HAND_QUIET_S = 900.0  # a run started by hand that wrote nothing for so long is taken for ended
UNBORN_S = 60.0  # a job without any attempt is taken for one that is just being submitted for this long
_TAIL = 64 << 10
_LAST_BEAT_S, _POLL_S = 1.0, 0.005
_LAST_LINES = 8 << 10  # bytes of metrics.jsonl that hold the last training line, whatever stands behind it
_PROGRESS_KEYS = ("step", "total", "loss", "it_s", "eta_s")
_HEARTBEAT_KEYS = (*_PROGRESS_KEYS, "peak_rss_mb")


class BrokenRun(Exception):
    """A directory below runs/ that cannot be read as a job; the message says why."""


# --- questions ----------------------------------------------------------------------------------------------

def status(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Every job asked for (or every one of the workdir), and what is there but cannot be read."""
    jobs, broken = [], []
    for path in _asked_for(request):
        try:
            view = view_of(RunDir(path))
        except BrokenRun as error:
            broken.append({"run_dir": str(path), "why": str(error)})
            continue
        if not (request.get("active_only") and view["state"] in ENDED_WORDS):
            jobs.append(view)
    return {"hostname": process.hostname(), "boot_id": process.boot_id(), "t": time.time(), "jobs": jobs,
            "broken": broken}


def show(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Everything known about one job."""
    from cluster.node import worktree  # runs git; a status must not pay for that
    run = RunDir(Path(request["run_dir"]))
    view = read_view(run)
    events, skipped = read_events(run)
    config = run.attempt(view["attempt"] or 0).config
    return {
        "view": view,
        "spec": None if view["by_hand"] else json.loads(run.spec.read_bytes()),
        "config": _text(config) or _text(run.config),
        "attempts": [_attempt_facts(attempt) for attempt in run.attempts()],
        "events": [encode(event) for event in events],
        "skipped_lines": skipped,
        "code": worktree.recorded(run),
        "checkpoints": [_checkpoint_facts(path) for path in list_checkpoints(run.checkpoints)],
    }


def metrics(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """The merged metrics of all attempts; with `keys` only those, and only lines that have one of them."""
    lines = merged_metrics(RunDir(Path(request["run_dir"])))
    if keys := request.get("keys"):
        wanted = [key for key in keys if key not in ("t", "step")]
        lines = [{key: line[key] for key in ("t", "step", *wanted) if key in line} for line in lines
                 if any(key in line for key in wanted)]
    return {"lines": lines}


def read_view(run: RunDir) -> dict[str, Any]:
    """`view_of` for one job that a person named. Raises Unusable: there is none; NodeFailure: it cannot be
    read.
    """
    if not run.path.is_dir():
        raise Unusable(f"there is no run directory {run.path}",
                       hint="launch status --rescan forgets what is gone")
    try:
        return view_of(run)
    except BrokenRun as error:
        raise NodeFailure(f"{run.path} cannot be read as a job: {error}") from None


def newest_heartbeat(run: RunDir) -> dict[str, Any] | None:
    """Of the newest attempt that has one: between two attempts that is the one before."""
    beats = (process.read_heartbeat(attempt) for attempt in reversed(run.attempts()))
    return next((beat for beat in beats if beat), None)


# --- one job ------------------------------------------------------------------------------------------------

def view_of(run: RunDir) -> dict[str, Any]:
    """The VIEW of a job. Raises BrokenRun."""
    try:
        spec = json.loads(run.spec.read_bytes())
    except FileNotFoundError:
        return _by_hand(run)
    except (OSError, ValueError) as error:
        raise BrokenRun(f"spec.json: {error}") from None
    if not isinstance(spec, dict) or spec.get("version") != SPEC_VERSION:
        raise BrokenRun(f"spec.json is not one of version {SPEC_VERSION}")
    try:
        return _supervised(run, spec)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BrokenRun(f"{type(error).__name__}: {error}") from None


def _supervised(run: RunDir, spec: dict[str, Any]) -> dict[str, Any]:
    events, _ = read_events(run)
    folded, _ = fold(events, spec["submitted_at"])
    attempts = run.attempts()
    checkpoint_step = _checkpoint_step(run, folded, events)
    status = _with_survivors(with_liveness(folded, _heard(run, attempts, folded), checkpoint_step), spec["token"])
    _await_last_heartbeat(attempts, status)
    beat = newest_heartbeat(run) or {}
    starts = [event for event in events if isinstance(event, AttemptStarted)]
    launches = [event for event in events if isinstance(event, Launched)]
    return {
        **{key: spec[key] for key in ("id", "name", "stage", "node", "token", "submitted_at")},
        "backend": "host", "run_dir": str(run.path), "by_hand": False,
        **_state_facts(status),
        **{key: beat.get(key) for key in _HEARTBEAT_KEYS},
        **_latest_progress(attempts, status),
        "gpus": list(launches[-1].gpus) if launches else [],
        "heard_at": beat.get("t"),
        "started_at": starts[0].t if starts else None,
        "resume_step": starts[-1].resume_step if starts else None,
        "checkpoint_step": checkpoint_step,
    }


def _await_last_heartbeat(attempts: list[AttemptDir], status: Status) -> None:
    """A living supervisor writes it just after the ending, with the last step and loss; nobody asks again."""
    if not attempts or not isinstance(status, Ended):
        return
    while time.time() - status.at < _LAST_BEAT_S:
        heard = process.heard(attempts[-1])
        if heard is None or not heard.alive or heard.last >= status.at:
            return
        time.sleep(_POLL_S)


def _latest_progress(attempts: list[AttemptDir], status: Status) -> dict[str, Any]:
    """Of a running attempt: its heartbeat is up to ten seconds older than its metrics."""
    return _said(attempts[-1]) if attempts and isinstance(status, Running | Stopping) else {}


def _said(attempt: AttemptDir) -> dict[str, Any]:
    """The progress of an attempt by the last lines of its metrics; empty when it writes none."""
    try:
        lines = _tail(attempt.metrics, _LAST_LINES)
    except FileNotFoundError:
        return {}
    found = {key: line[key] for line in lines for key in _PROGRESS_KEYS if line.get(key) is not None}
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in found.items()}


def _with_survivors(status: Status, token: str) -> Status:
    """Of a job whose supervisor was lost: what of it goes on. A shell's children are told by nobody."""
    if not isinstance(status, Failed) or status.reason is not Reason.SUPERVISOR_LOST:
        return status
    if not (left := len(process.members(None, token))):
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
    """A run that somebody started without launch: its metrics say what can be said."""
    attempts = [attempt for attempt in run.attempts() if attempt.metrics.exists()]
    if not attempts:
        raise BrokenRun("no spec.json: a submit that is going on or was cut off")
    newest = attempts[-1]
    lines = _tail(newest.metrics)
    last = lines[-1] if lines else {}
    written = newest.metrics.stat().st_mtime
    started = next(read_json_lines(attempts[0].metrics), {}).get("t")
    named = [parse_checkpoint_name(path.name) for path in list_checkpoints(run.checkpoints)]
    return {
        "id": run.path.name, "name": None, "stage": run.path.name.partition("-by-hand-")[0], "node": None,
        "backend": "host", "token": None, "run_dir": str(run.path), "by_hand": True, "submitted_at": started,
        **_state_facts(_by_hand_status(newest.number, last, written)),
        "step": last.get("step"), "total": last.get("total"),
        "loss": next((one["loss"] for one in reversed(lines) if "loss" in one), None),
        "it_s": None, "eta_s": None, "peak_rss_mb": None, "gpus": [], "heard_at": written,
        "started_at": started, "resume_step": None,
        "checkpoint_step": named[0][0] if named and named[0] else None,
    }


def _by_hand_status(attempt: int, last: dict[str, Any], written: float) -> Status:
    whole = last.get("total") is not None and last.get("step") == last.get("total")
    if whole or last.get("event") == "stopped":
        return Completed(written, attempt, Reason.DONE, "started by hand")
    if time.time() - written > BY_HAND_QUIET_S:
        return Failed(written, attempt, Reason.BAD_EXIT, "started by hand; nothing written since then")
    return Running(written, attempt)


def _tail(path: Path, size: int = _TAIL) -> list[dict[str, Any]]:
    """The lines in the last `size` bytes of a metrics file that parse."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        raw = file.read()
    found = []
    for line in raw.split(b"\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut by the block's border, or still being written
    return [line for line in found if isinstance(line, dict)]


# --- parts of `show` ----------------------------------------------------------------------------------------

def _attempt_facts(attempt: AttemptDir) -> dict[str, Any]:
    events, _ = read_journal(attempt.journal)
    start = next((event for event in events if isinstance(event, AttemptStarted)), None)
    launched = next((event for event in events if isinstance(event, Launched)), None)
    end = next((event for event in events if isinstance(event, AttemptEnded)), None)
    beat = process.read_heartbeat(attempt) or {}
    return {
        "n": attempt.number, "started_at": start.t if start else None, "ended_at": end.t if end else None,
        "reason": end.reason.value if end else None, "detail": end.detail if end else "",
        "resume": start.resume if start else None, "resume_step": start.resume_step if start else None,
        "step": end.step if end else (beat | _said(attempt)).get("step"),
        "checkpoint_step": end.checkpoint_step if end else None,
        "gpus": list(launched.gpus) if launched else [], "env": _env(attempt),
    }


def _env(attempt: AttemptDir) -> dict[str, Any] | None:
    try:
        return json.loads(attempt.env.read_bytes())
    except (OSError, ValueError):
        return None


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    """verified: False when a file is missing or has another size; None when the sizes are right (hashes are
    checked by the supervisor, before anything resumes from it).
    """
    step, attempt = parse_checkpoint_name(path.name) or (0, 0)
    facts: dict[str, Any] = {"name": path.name, "step": step, "attempt": attempt, "verified": None, "why": ""}
    try:
        for name, expected in read_manifest(path).files.items():
            if (size := (path / name).stat().st_size) != expected["size"]:
                why = f"{name}: {size} bytes, the manifest says {expected['size']}"
                return facts | {"verified": False, "why": why}
    except BadCheckpoint as error:
        return facts | {"verified": False, "why": str(error)}
    except OSError as error:
        return facts | {"verified": False, "why": f"{error.filename}: {error.strerror}"}
    return facts


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


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
