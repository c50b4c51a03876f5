"""What is wrong with a job: its node's findings, as values and as text."""
from __future__ import annotations

import textwrap
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import control
from launcher.index import Index
from launcher.jobs import JobStatus, find
from launcher.plots import Curve, terminal
from launcher.views import lasting, visible

_COLUMNS, _ROWS = 72, 7
_EVIDENCE_LINES = 30
_LR, _VAL = ("lr",), ("val/psnr", "val/loss")
_SHOWS = {  # rule -> the first of these that the job wrote is drawn; else the loss
    "lr-stuck": _LR, "lr-end": _LR, "no-gradient": ("grad_norm",), "updates-skipped": ("grad_norm",),
    "white-renders": _VAL, "identity-copy": _VAL, "input-ignored": _VAL, "no-better-than-baseline": _VAL,
    "overfitting": _VAL, "train-val-gap": _VAL, "views-collapsed": ("val/diversity",), "slower": ("it_s",),
    "starved": ("data_wait",),
}
_NOTHING_SEEN = ("nothing can be seen of its learning: it wrote no metrics.jsonl, and no rule below `progress:` of its "
                 "stage file found a step in its output (a command has none: docs/stages.md says how to write one)")


@dataclass(frozen=True)
class Diagnosis:
    """`findings`: the node's, the worst first: {rule, severity, what, why, cause, fix, first, last, page}."""

    job: JobStatus
    health: str
    source: str  # its metrics, its output, nothing
    findings: list[dict[str, Any]]
    curves: dict[str, Curve]  # of each metric
    evaluation: dict[str, Any] | None  # the last line of one
    resumes: list[int]  # steps that attempts went on from
    goodput: dict[str, float]  # s: cluster.node.goodput
    pictures: list[list[Any]]  # [path below its run directory, bytes] of those it made
    evidence: list[list[str]] = field(default_factory=list)  # [path, text] of what it did when it stood still

    @property
    def sick(self) -> bool:
        return any(one["severity"] == "error" for one in self.findings)


def diagnose(index: Index, word: str, start: Path, points: int = 0) -> Diagnosis:
    """`points` of each curve at most; 0: as many as suit a terminal. Raises Wrong, Unreachable."""
    job = find(index, word)
    found = control.node_and_backend(job, start)[1].doctor(job.run_dir, points)
    status = control.heard(index, job, {**found["view"], "health": found["health"]})
    return Diagnosis(status, found["health"], found["source"], found["findings"], found["curves"], found["evaluation"],
                     found["resumes"], found["goodput"], found["pictures"], found["evidence"])


def as_object(found: Diagnosis) -> dict[str, Any]:
    return {"id": found.job.id, "name": found.job.name, "state": found.job.state, "step": found.job.step,
            "total": found.job.total, "health": found.health, "source": found.source, "findings": found.findings,
            "goodput": found.goodput, "evaluation": found.evaluation,
            "evidence": [{"path": path, "text": text} for path, text in found.evidence]}


def as_text(found: Diagnosis, columns: int | None) -> str:
    width = min(columns or _COLUMNS, 100)
    parts = [_head(found), *_pictures(found, width), *(_finding(one, width) for one in found.findings),
             *(_evidence(path, text) for path, text in found.evidence)]
    if found.source == "nothing":
        parts.append(textwrap.fill(_NOTHING_SEEN, width))
    elif not found.findings:
        parts.append(f"nothing is wrong that can be seen in {found.source}")
    return "\n\n".join(parts)


def _head(found: Diagnosis) -> str:
    job = found.job
    step = "" if job.step is None else f"  step {job.step}" + (f" of {job.total}" if job.total else "")
    name = f" ({visible(job.name)})" if job.name else ""
    return f"{job.id}{name}  {job.state}{step}" + ("" if found.health == "unknown" else f"  {found.health}")


def _pictures(found: Diagnosis, width: int) -> Iterator[str]:
    """The curves that the findings are about, each once."""
    drawn: set[str] = set()
    for one in found.findings or [{"rule": "", "first": None, "last": None}]:
        key = curve_of(one["rule"], found.curves)
        if key and key not in drawn:
            drawn.add(key)
            yield terminal(key, found.curves[key], width, _ROWS, (one["first"], one["last"]), found.job.step,
                           one.get("level") if key == "loss" else None)


def curve_of(rule: str, curves: Container[str]) -> str | None:
    """The metric that a finding of this rule is best seen in."""
    return next((key for key in (*_SHOWS.get(rule, ()), "loss") if key in curves), None)


def _finding(one: dict[str, Any], width: int) -> str:
    first, last = one["first"], one["last"]
    where = "" if first is None else f"  step {first}" if first == last else f"  steps {first} to {last}"
    rows = [("", one["what"]), ("why", one["why"]), ("cause", one["cause"])]
    lines = [f"{one['severity']}: {one['rule']}{where}"]
    for title, text in rows:
        lines += textwrap.wrap(visible(text), width, initial_indent=f"  {title:6}" if title else "  ",
                               subsequent_indent=" " * 8 if title else "  ", break_long_words=False)
    return "\n".join([*lines, f"  fix   {visible(one['fix'])}", f"  page  {one['page']}"])


def _evidence(path: str, text: str) -> str:
    """Its beginning: which rank is where."""
    lines = text.splitlines()
    more = [f"  … {len(lines) - _EVIDENCE_LINES} more lines there"] if len(lines) > _EVIDENCE_LINES else []
    return "\n".join([f"evidence: {path}", *(f"  {visible(line)}".rstrip() for line in lines[:_EVIDENCE_LINES]), *more])


def lost(goodput: dict[str, float]) -> list[tuple[str, str, float]]:
    """(part, how long, share of the wall time) of each part that took any."""
    wall = goodput.get("wall") or 0.0
    return [(part, lasting(seconds), seconds / wall) for part, seconds in goodput.items()
            if part != "wall" and wall and seconds / wall >= 0.001]
