"""The parts of a job that `show` names one by one: its attempts and its checkpoints."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.contract import AttemptDir, BadCheckpoint, parse_checkpoint_name, read_manifest
from cluster.events import AttemptEnded, AttemptStarted, Launched
from cluster.journal import read_journal
from cluster.node import lines, process


def attempt_facts(attempt: AttemptDir) -> dict[str, Any]:
    events, _ = read_journal(attempt.journal)
    start = next((event for event in events if isinstance(event, AttemptStarted)), None)
    launched = next((event for event in events if isinstance(event, Launched)), None)
    end = next((event for event in events if isinstance(event, AttemptEnded)), None)
    beat = process.read_heartbeat(attempt) or {}
    return {
        "n": attempt.number, "started_at": start.t if start else None, "ended_at": end.t if end else None,
        "reason": end.reason.value if end else None, "detail": end.detail if end else "",
        "resume": start.resume if start else None, "resume_step": start.resume_step if start else None,
        "step": end.step if end else (beat | lines.progress(attempt)).get("step"),
        "checkpoint_step": end.checkpoint_step if end else None,
        "gpus": list(launched.gpus) if launched else [], "env": _env(attempt),
    }


def made_by(attempts: Sequence[Mapping[str, Any]]) -> int | None:
    """The number of the attempt that made the newest steps: later ones got no further than where they began."""
    return next((one["n"] for one in reversed(attempts) if (one["step"] or 0) > (one["resume_step"] or 0)), None)


def _env(attempt: AttemptDir) -> dict[str, Any] | None:
    try:
        return json.loads(attempt.env.read_bytes())
    except (OSError, ValueError):
        return None


def checkpoint_facts(path: Path) -> dict[str, Any]:
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
