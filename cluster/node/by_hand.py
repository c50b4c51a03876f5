"""A run that somebody started without launch: its metrics say what can be said."""
from __future__ import annotations

import time
from typing import Any

from cluster.contract import RunDir, list_checkpoints, parse_checkpoint_name, read_json_lines
from cluster.events import Reason
from cluster.node import lines
from cluster.states import Completed, Failed, Running, Status

QUIET_S = 900.0  # one that wrote nothing for so long is taken for ended


def read(run: RunDir) -> tuple[Status, dict[str, Any]] | None:
    """Its status and the keys of a VIEW that are its own; None: it has written no metrics."""
    attempts = [attempt for attempt in run.attempts() if attempt.metrics.exists()]
    if not attempts:
        return None
    newest = attempts[-1]
    written_last = lines.tail(newest.metrics)
    last = written_last[-1] if written_last else {}
    written = newest.metrics.stat().st_mtime
    started = next(read_json_lines(attempts[0].metrics), {}).get("t")
    named = [parse_checkpoint_name(path.name) for path in list_checkpoints(run.checkpoints)]
    return _status(newest.number, last, written), {
        "id": run.path.name, "name": None, "stage": run.path.name.partition("-by-hand-")[0], "node": None,
        "place": None, "group": None, "token": None, "submitted_at": started,
        "step": last.get("step"), "total": last.get("total"),
        "loss": next((one["loss"] for one in reversed(written_last) if "loss" in one), None),
        "it_s": None, "eta_s": None, "peak_rss_mb": None, "gpus": [], "heard_at": written,
        "started_at": started, "resume_step": None,
        "checkpoint_step": named[0][0] if named and named[0] else None,
    }


def _status(attempt: int, last: dict[str, Any], written: float) -> Status:
    whole = last.get("total") is not None and last.get("step") == last.get("total")
    if whole or last.get("event") in ("stopped", "done"):
        return Completed(written, attempt, Reason.DONE, "started by hand")
    if time.time() - written > QUIET_S:
        return Failed(written, attempt, Reason.BAD_EXIT, "started by hand; nothing written since then")
    return Running(written, attempt)
