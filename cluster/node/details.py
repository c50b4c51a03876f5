"""Everything known about one job, for a person who looks at it; a status must not pay for that."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.contract import AttemptDir, RunDir, list_checkpoints, merged_metrics
from cluster.events import encode
from cluster.journal import read_events
from cluster.node import past, worktree
from cluster.node.view import fill_health, go_on, read_view


def show(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Everything known about one job."""
    run = RunDir(Path(request["run_dir"]))
    view = read_view(run)
    fill_health([view])
    go_on([view])
    events, skipped = read_events(run)
    attempts = [past.attempt_facts(attempt) for attempt in run.attempts()]
    return {
        "view": view,
        "spec": None if view["by_hand"] else json.loads(run.spec.read_bytes()),
        "config": text_of(run.attempt(view["attempt"] or 0).config) or text_of(run.config),
        "configs": _configs(run), "made_by": past.made_by(attempts),
        "inputs": _inputs(run.attempt(view["attempt"] or 0)),
        "attempts": attempts,
        "events": [encode(event) for event in events] + _releases(run),
        "skipped_lines": skipped,
        "code": worktree.recorded(run),
        "checkpoints": [past.checkpoint_facts(path) for path in list_checkpoints(run.checkpoints)],
    }


def metrics(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """The merged metrics of all attempts; with `keys` only those, and only lines that have one of them."""
    lines = merged_metrics(RunDir(Path(request["run_dir"])))
    if keys := request.get("keys"):
        wanted = [key for key in keys if key not in ("t", "step")]
        lines = [{key: line[key] for key in ("t", "step", *wanted) if key in line} for line in lines
                 if any(key in line for key in wanted)]
    return {"lines": lines}


def _releases(run: RunDir) -> list[dict[str, Any]]:
    if not run.releases.exists():
        return []
    from cluster.node import release
    return release.notes(run)


def _inputs(attempt: AttemptDir) -> list[dict[str, Any]]:
    """What it took over from other jobs."""
    try:
        return json.loads(attempt.inputs.read_bytes())
    except (OSError, ValueError):
        return []


def _configs(run: RunDir) -> list[tuple[int, str]]:
    """(number, config.yaml) of the attempts whose config is another than that of the one before; the first's too."""
    found: list[tuple[int, str]] = []
    for attempt in run.attempts():
        text = text_of(attempt.config)
        if text is not None and (not found or found[-1][1] != text):
            found.append((attempt.number, text))
    return found


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
