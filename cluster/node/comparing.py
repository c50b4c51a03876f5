"""What `launch compare` asks a node: all about some of its jobs in one answer, and then, of those whose code differs,
their files.
"""
from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import RunDir, list_checkpoints
from cluster.node import doctor, goodput, worktree
from cluster.node.curves import curves
from cluster.node.details import show, text_of
from cluster.node.findings import Attempt, Case, Line, as_number
from cluster.states import ENDED_WORDS

_RECENT = 200  # steps at the end of the metrics that are sent; of the rest only the evaluations
_LONGEST_TEXT = 512 << 10  # bytes of one file whose lines are counted
_ALL_TEXTS = 8 << 20
_NOT_CODE = (".git", ".launch", "__pycache__")  # `.launch`: the patch of a snapshot lies there


@dataclass(frozen=True)
class Span:
    """How long one attempt held how many GPUs; unix s."""

    begin: float
    end: float
    gpus: int
    rest_s: float = 0.0  # before it, in which its job had ended


def compare(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """`jobs`: run directories; `points`: of a curve at most; `reach`: [metric, value] each -> {jobs: what is known}."""
    return {"jobs": [_facts(RunDir(Path(one)), request["points"], request["reach"]) for one in request["jobs"]]}


def _facts(run: RunDir, points: int, reach: Sequence[tuple[str, float]]) -> dict[str, Any]:
    known = show({"run_dir": str(run.path)}, None)
    view, spec = known["view"], known["spec"] or {}
    case = doctor.read_case(run, view)
    spans = _spans(case.attempts, [len(one["gpus"]) for one in known["attempts"]], spec, view)
    parts = goodput.goodput(case.attempts, view["submitted_at"], spans[-1].end if spans else time.time())
    return {
        **{key: known[key] for key in ("view", "spec", "inputs", "code")}, "config": _config(run, known),
        "attempts": len(known["attempts"]), "began_from": _began_from(known["attempts"]),
        "environment": next((one["env"] for one in reversed(known["attempts"]) if one["env"]), None),
        "provenance": _provenance(run), "lines": _telling(case),
        "skipped": len(case.skips), "curves": curves(case.lines, points), "goodput": parts,
        "wall_s": _wall_s(spans, spans[-1].end) if spans else None,
        "gpu_s": _gpu_s(spans, spans[-1].end) if spans else None,
        "reached": {key: found for key, value in reach if (found := reached(case.lines, key, value, spans))},
    }


def _config(run: RunDir, known: Mapping[str, Any]) -> str | None:
    """That of the attempt that made the newest steps: what the results come from."""
    made_by = known["made_by"]
    return known["config"] if made_by is None else text_of(run.attempt(made_by).config) or known["config"]


def _telling(case: Case) -> list[Line]:
    kept = {id(line) for line in (*case.evaluations, *case.steps[-_RECENT:], *case.lines[-1:])}
    return [line for line in case.lines if id(line) in kept]


def _spans(attempts: Sequence[Attempt], gpus: Sequence[int], spec: Mapping[str, Any],
           view: Mapping[str, Any]) -> list[Span]:
    """Those that began. One without an ending lasts until now, or until its job's end."""
    now = (view["ended_at"] if view["state"] in ENDED_WORDS else None) or time.time()
    begun = [(one, count) for one, count in zip(attempts, gpus) if one.started is not None]
    found = []
    for number, (one, count) in enumerate(begun):
        end = max(one.ended or (goodput.last_sign(one) if number + 1 < len(begun) else now), one.started or 0.0)
        each = count or (spec.get("gpus") or 0) * (one.launched is not None)
        before = begun[number - 1][0] if number else None
        rest_s = goodput.rest(before, one, found[-1].end, one.started or 0.0) if before else 0.0
        found.append(Span(one.started or 0.0, end, each * (spec.get("nodes") or 1), rest_s))
    return found


def _wall_s(spans: Sequence[Span], at: float) -> float:
    """Seconds from its first start to a moment, without those in which it had ended."""
    return max(0.0, at - spans[0].begin - sum(one.rest_s for one in spans if one.begin <= at))


def _gpu_s(spans: Sequence[Span], at: float) -> float:
    """Seconds of GPUs that were taken up to a moment."""
    return sum(one.gpus * max(0.0, min(at, one.end) - one.begin) for one in spans)


def reached(lines: Sequence[Line], key: str, value: float, spans: Sequence[Span]) -> dict[str, Any] | None:
    """-> {first: its first value, up, down}: where it was first at least, and at most, `value`, each {step, value,
    wall_s, gpu_s} or None. None: it was never written.

    `lines` is the merged series: a value of a branch that was left does not count, the time it took does.
    """
    found = [(line, number) for line in lines if (number := as_number(line.get(key))) is not None]
    if not found:
        return None
    up = next(((line, number) for line, number in found if number >= value), None)
    down = next(((line, number) for line, number in found if number <= value), None)
    return {"first": found[0][1], "up": up and _cost(*up, spans), "down": down and _cost(*down, spans)}


def _cost(line: Line, value: float, spans: Sequence[Span]) -> dict[str, Any]:
    """A line without a time (of a log) has a step alone."""
    at = as_number(line.get("t"))
    timed = at is not None and bool(spans)
    return {"step": line["step"], "value": value, "wall_s": _wall_s(spans, at) if timed else None,
            "gpu_s": _gpu_s(spans, at) if timed else None}


def _began_from(attempts: Sequence[Mapping[str, Any]]) -> str | None:
    """The checkpoint that was given to its first attempt."""
    return attempts[0]["resume"] if attempts else None


def _provenance(run: RunDir) -> dict[str, Any]:
    """What a training said of its data, rig and starting point: in its newest checkpoint, or in its report."""
    states = [path / "state.json" for path in list_checkpoints(run.checkpoints)[:1]]
    for path in (*states, run.artifacts / "report.json"):
        try:
            said = json.loads(path.read_bytes())
            return {**said.get("identity", {}), **said.get("provenance", {})}
        except (OSError, ValueError, TypeError, AttributeError):  # another program's file of that name
            continue
    return {}


# --- code ---------------------------------------------------------------------------------------------------

def code_files(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """-> {files: path -> sha256, or `-> target` of a link}; None where no code is kept."""
    top = _tree(RunDir(Path(request["run_dir"])))
    return {"files": {path: _content(top / path) for path in sorted(_walk(top))} if top else None}


def code_texts(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """`paths` -> {texts: path -> its text}, without what is no text or too long."""
    top = _tree(RunDir(Path(request["run_dir"])))
    texts: dict[str, str] = {}
    room = _ALL_TEXTS
    for path in request["paths"] if top else ():
        text = _text(top, path)
        if text is not None and len(text) <= room:
            texts[path] = text
            room -= len(text)
    return {"texts": texts}


def commits(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """-> {files: [path, lines added, lines removed] from the commit `old` to `new`}; None: not known there."""
    return {"files": worktree.numstat(Path(request["directory"]).expanduser(), request["old"], request["new"])}


def _tree(run: RunDir) -> Path | None:
    """The snapshot as it came, if it is still there: a job may have written into its own copy."""
    try:
        digest = json.loads(run.spec.read_bytes())["code"]["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    places = (run.path.parent.parent / ".launch" / "code" / digest, run.code) if digest else ()
    return next((place for place in places if place.is_dir()), None)


def _walk(top: Path) -> Iterator[str]:
    for directory, names, files in os.walk(top):
        links = [name for name in names if os.path.islink(os.path.join(directory, name))]
        names[:] = [name for name in names if name not in _NOT_CODE]
        yield from (Path(directory, name).relative_to(top).as_posix() for name in [*files, *links])


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"not readable: {error.strerror}"


def _text(top: Path, path: str) -> str | None:
    place = top / path
    if ".." in Path(path).parts or place.is_symlink():
        return None
    try:
        content = place.read_bytes() if place.stat().st_size <= _LONGEST_TEXT else b"\0"
        return None if b"\0" in content else content.decode()
    except (OSError, UnicodeDecodeError):
        return None
