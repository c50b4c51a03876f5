"""The last lines of metrics files, while they are written."""
from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from cluster.contract import AttemptDir, RunDir

PROGRESS_KEYS = ("step", "total", "loss", "it_s", "eta_s")
_TAIL = 64 << 10
_LAST_LINES = 8 << 10  # bytes of metrics.jsonl that hold the last training line, whatever stands behind it
_REPORT = "report.json"  # in artifacts/: what our trainer writes when all else of its work is written


def progress(attempt: AttemptDir) -> dict[str, Any]:
    """The progress of an attempt by the last lines of its metrics; empty when it writes none."""
    try:
        lines = tail(attempt.metrics, _LAST_LINES)
    except FileNotFoundError:
        return {}
    found = {key: line[key] for line in lines for key in PROGRESS_KEYS if line.get(key) is not None}
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in found.items()}


def is_done(run: RunDir, attempt: AttemptDir, ours: bool) -> bool:
    """Whether the program wrote its artifacts and said so. `ours`: it is one of our trainers, whose report tells it
    too, should the node have died before the last line was written."""
    try:
        if any(line.get("event") == "done" for line in tail(attempt.metrics, _LAST_LINES)):
            return True
        return ours and (run.artifacts / _REPORT).stat().st_mtime_ns > attempt.spec.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def tail(path: Path, size: int = _TAIL) -> list[dict[str, Any]]:
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
