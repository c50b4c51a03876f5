"""What is wrong with a job, with its curves and where its time went; and the one word for it that a status shows."""
from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.contract import AttemptDir, RunDir, write_atomically
from cluster.events import AttemptEnded, AttemptStarted, Launched
from cluster.journal import read_journal
from cluster.node import goodput, process, rules, series, view
from cluster.node.curves import curves
from cluster.node.findings import Attempt, Case, Line, as_number, leaves
from cluster.node.lines import tail
from cluster.node.progress import will_step
from cluster.states import ENDED_WORDS

_POINTS = 120  # of a curve, when the question names no number: what a terminal shows
_BUDGET = 192 << 10  # bytes of an attempt that a status looks at: a thousand steps
_ALL_S = 0.6  # that all jobs of one status may take; what is left says "unknown" this time
_EVIDENCE = 16 << 10  # characters of one file
_REMEMBERED = ".health.json"
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4", ".webm")


def doctor(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Everything about one job's learning. `points`: of each curve at most."""
    run = RunDir(Path(request["run_dir"]))
    seen = view.read_view(run)
    case = read_case(run, seen)
    found = rules.judge(case)
    now = time.time()
    return {
        "view": seen, "findings": [asdict(one) | {"page": one.page} for one in found],
        "health": rules.health(case, found), "source": _source(case),
        "curves": curves(case.lines, request.get("points") or _POINTS),
        "evaluation": case.evaluations[-1] if case.evaluations else None,
        "resumes": [one.resume_step for one in case.attempts if one.resume_step is not None],
        "pictures": _pictures(run), "evidence": _evidence(run),
        "goodput": goodput.goodput(case.attempts, seen["submitted_at"], seen["ended_at"] or now),
    }


def _evidence(run: RunDir) -> list[list[str]]:
    """[path, beginning] of what was found when its newest attempt stood still."""
    found = [path for attempt in run.attempts()[-1:] for path in sorted(attempt.evidence.glob("*stalled.txt"))]
    return [[path.relative_to(run.path).as_posix(), _text(path)[:_EVIDENCE]] for path in found]


def _pictures(run: RunDir) -> list[list[str | int]]:
    """[path, bytes] of pictures and films: the artifacts' own, and those of evaluations."""
    found = [path for place in ("artifacts/*", "attempts/*/validation/*") for path in run.path.glob(place)
             if path.suffix.lower() in _PICTURES and path.is_file()]
    return [[path.relative_to(run.path).as_posix(), path.stat().st_size] for path in sorted(found)]


def _source(case: Case) -> str:
    return "nothing" if not case.lines else "its output" if case.from_log else "its metrics"


def read_case(run: RunDir, seen: dict[str, Any], budget: int | None = None) -> Case:
    """The job of this VIEW as the rules see it; with a budget, by the beginnings and ends of its files."""
    lines, of_attempts = series.whole(run, _spec(run).get("progress") or {}, budget)
    return case_of(run, run.attempts()[-len(of_attempts):] if of_attempts else [], lines, of_attempts, seen)


def case_of(run: RunDir, attempts: Sequence[AttemptDir], lines: Sequence[Line], of_attempts: Sequence[Sequence[Line]],
            seen: dict[str, Any]) -> Case:
    """These attempts with the lines of each; `lines` is their merged series."""
    spec = _spec(run)
    nodes = spec.get("nodes") or 1
    config = _text(attempts[-1].config if attempts else run.config) or _text(run.config)
    maker = next((one for one, own in zip(reversed(attempts), reversed(of_attempts)) if _trained(own)), None)
    made_by = maker and _text(maker.config) or config
    return Case(
        job=seen["id"], lines=lines, state=seen["state"], now=time.time(), config=leaves(made_by),
        newest=leaves(config), argv=tuple(map(str, spec.get("argv") or ())), by_hand=not spec,
        world=max(1, (spec.get("gpus") or spec.get("procs") or 1) * nodes), gpus=(spec.get("gpus") or 0) * nodes,
        attempts=[_attempt(one, own) for one, own in zip(attempts, of_attempts)],
        will_step=will_step(spec.get("preflight"), config), from_log=series.from_log(run), written=series.written(run),
        gpu_use=_gpu_use(attempts[-1]) if attempts else (),
        reason=seen.get("reason") or "", detail=seen.get("detail") or "")


def _trained(lines: Sequence[Line]) -> bool:
    return any("event" not in line for line in lines)


def _attempt(directory: Any, lines: Sequence[Line]) -> Attempt:
    events, _ = read_journal(directory.journal)
    start = next((event for event in events if isinstance(event, AttemptStarted)), None)
    launched = next((event for event in events if isinstance(event, Launched)), None)
    end = next((event for event in reversed(events) if isinstance(event, AttemptEnded)), None)
    first = lines[0] if lines else {}
    resumed = start.resume_step if start else first["step"] or None if first.get("event") == "resumed" else None
    return Attempt(
        directory.number, start.t if start else as_number(first.get("t")), launched.t if launched else None,
        end.t if end else None, resumed, end.reason.value if end else "", end.detail if end else "", lines,
        start.by if start else "", end is not None and end.next == "end", _made(directory),
        None if end else (process.read_heartbeat(directory) or {}).get("t"))


def _made(attempt: AttemptDir) -> float | None:
    try:
        return attempt.spec.stat().st_mtime
    except OSError:  # started by hand
        return None


def _gpu_use(attempt: AttemptDir) -> list[tuple[float, int]]:
    """Of late."""
    with suppress(FileNotFoundError):
        return [(line["t"], max(line["busy"].values())) for line in tail(attempt.gpu_use)]
    return []


def _spec(run: RunDir) -> dict[str, Any]:
    try:
        return json.loads(run.spec.read_bytes())
    except (OSError, ValueError):  # started by hand
        return {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- the word in a status -----------------------------------------------------------------------------------

def fill(views: Sequence[dict[str, Any]]) -> None:
    """Set `health` in each of these VIEWS, those that run first, within a bounded time."""
    deadline = time.monotonic() + _ALL_S
    for seen in sorted(views, key=lambda one: one["state"] in ENDED_WORDS):
        seen["health"] = "unknown"
        if seen["attempt"] is not None and time.monotonic() < deadline:
            with suppress(OSError, ValueError):  # its files cannot be read: a status says all the rest
                seen["health"] = _health(RunDir(Path(seen["run_dir"])), seen)


def _health(run: RunDir, seen: dict[str, Any]) -> rules.Health:
    """Of one that has ended it is worked out once."""
    over = seen["state"] in ENDED_WORDS
    key, path = f"{seen['state']} {seen['ended_at']}", run.path / _REMEMBERED
    if over:
        with suppress(OSError, ValueError, KeyError, TypeError):
            if (known := json.loads(path.read_bytes()))["of"] == key:
                return known["health"]
    word = rules.health(read_case(run, seen, _BUDGET))
    if over:
        with suppress(OSError):  # another person's job
            write_atomically(path, json.dumps({"of": key, "health": word}).encode())
    return word
