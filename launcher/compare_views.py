"""`launch compare` as text and as an object."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from configs.load import ABSENT
from launcher import compare_facts
from launcher.compare import Compared, Comparison, Goal
from launcher.compare_code import Change, CodeDiff
from launcher.compare_learned import Learned, Number
from launcher.views import aligned, cut, number, point, visible, width

_SPARKS = "▁▂▃▄▅▆▇█"
_CURVE_COLUMNS = 12
_SIDE_BY_SIDE = 4  # jobs that have a column each; more have a row each
_VALUES = 76  # columns of a terminal for the values of one row
_LEAST = 12  # of one value
_NAME = 24
_FILES = 15  # of a code's changes that are named
_ROWS = 14  # of an environment's differences
_METRICS = 6  # of an evaluation, beside those that have a column of their own
_HASH = re.compile(r"[0-9a-f]{40,}")
_SHOWN_HASH = 12
# Parts of `Learned.evaluated` that `_COLUMNS` has.
_HAS_COLUMN = frozenset({"val/psnr", "val/psnr_input", "val/ssim", "val/ssim_input", "val/lpips"})


def as_object(found: Comparison) -> dict[str, Any]:
    """`config`, `environment`, `inputs`: what differs, as name -> {job id: value}, without the jobs that lack it."""
    jobs = [{"id": one.job.id, "name": one.job.name, "stage": one.job.stage, "node": one.job.node,
             "state": one.job.state, "point": _points(one), "attempts": one.attempts,
             "code": one.code.digest or one.code.git_sha or "", "git_sha": one.code.git_sha,
             "dirty": one.code.dirty or bool(one.code.patch), **asdict(one.learned),
             "wall_s": one.spent.wall_s, "gpu_s": one.spent.gpu_s, "useful": one.spent.useful,
             "goodput": one.spent.parts, "environment": one.environment, "inputs": one.inputs,
             "reached": {goal.key: goal.cost[n] for goal in found.goals}} for n, one in enumerate(found.jobs)]
    return {"jobs": jobs, "config": _by_job(found, found.config, ABSENT),
            "command": dict(zip(_ids(found.jobs), _command(found.jobs) or ())),
            "code": [_code_object(found, one) for one in found.code],
            "environment": _by_job(found, compare_facts.differing([one.environment for one in found.jobs]), None),
            "inputs": _by_job(found, compare_facts.differing([one.inputs for one in found.jobs]), None),
            "reach": [{"metric": goal.key, "value": goal.value, "upwards": goal.upwards} for goal in found.goals]}


def _by_job(found: Comparison, rows: dict[str, tuple[Any, ...]], missing: object) -> dict[str, dict[str, Any]]:
    return {key: {one.job.id: value for one, value in zip(found.jobs, values) if value is not missing}
            for key, values in rows.items()}


def _code_object(found: Comparison, one: CodeDiff) -> dict[str, Any]:
    files = None if one.changes is None else [asdict(change) for change in one.changes]
    return {"from": found.jobs[0].job.id, "jobs": list(one.jobs), "files": files, "why": one.why}


def as_text(found: Comparison) -> str:
    """What differs, what is the same, what came out and what it cost. What no job has is left out."""
    several = len(found.jobs) > 1
    parts = [_config(found), *(_code(found, one) for one in found.code), _environment(found), _inputs(found),
             "\n".join(_same(found)) if several else "", _results(found.jobs),
             *(_goal(found.jobs, one) for one in found.goals)]
    return "\n\n".join(filter(None, parts))


# --- what differs -------------------------------------------------------------------------------------------

def _config(found: Comparison) -> str:
    rows = {visible(key): _shortened([_value(value) for value in values]) for key, values in found.config.items()}
    if words := _command(found.jobs):
        rows = {"(command)": _shortened([visible(text) for text in words]), **rows}
    return _table("config", rows, found.jobs)


def _command(jobs: Sequence[Compared]) -> tuple[str, ...] | None:
    return compare_facts.command([one.argv for one in jobs])


def _code(found: Comparison, one: CodeDiff) -> str:
    called = dict(zip(_ids(found.jobs), _titles(found.jobs)))
    first, *others = (called[job] for job in (found.jobs[0].job.id, *one.jobs))
    lines = [f"code of {', '.join(others)} against {first}: {_total(one)}", f"  {first}: {visible(one.old.words)}",
             f"  {others[0]}: {visible(one.new.words)}"]
    shown = (one.changes or ())[:_FILES]
    names = [cut(visible(change.path), 60) for change in shown]
    widest = max(map(width, names), default=0)
    lines += [f"  {name}{' ' * (widest - width(name))}  {_counts(change)}" for name, change in zip(names, shown)]
    if one.changes and len(one.changes) > _FILES:
        lines.append(f"  and {len(one.changes) - _FILES} more files: --json")
    return "\n".join(lines)


def _total(one: CodeDiff) -> str:
    if one.changes is None:
        return f"which files differ is not known: {one.why}"
    if not one.changes:
        return "no file differs"
    added, removed = (sum(getattr(change, way) or 0 for change in one.changes) for way in ("added", "removed"))
    return f"{len(one.changes)} file{'s' if len(one.changes) > 1 else ''}, +{added} -{removed}"


def _counts(change: Change) -> str:
    counts = "" if change.added is None else f"+{change.added} -{change.removed}"
    return " ".join(filter(None, ["" if change.kind == "changed" else change.kind, counts])) or "changed"


def _environment(found: Comparison) -> str:
    rows = compare_facts.differing([one.environment for one in found.jobs])
    more = len(rows) - _ROWS
    text = _table("environment", dict(_cells(list(rows.items())[:_ROWS])), found.jobs)
    return f"{text}\nand {more} more differences: --json" if more > 0 else text


def _inputs(found: Comparison) -> str:
    rows = compare_facts.differing([one.inputs for one in found.jobs])
    return _table("input", dict(_cells(rows.items())), found.jobs)


def _cells(rows: Any) -> Iterator[tuple[str, list[str]]]:
    for name, values in rows:
        yield visible(name), _shortened(["-" if value is None else _fingerprint(visible(value)) for value in values])


def _fingerprint(value: str) -> str:
    return value[:_SHOWN_HASH] if _HASH.fullmatch(value) else value


# --- what is the same ---------------------------------------------------------------------------------------

def _same(found: Comparison) -> Iterator[str]:
    jobs, first = found.jobs, found.jobs[0]
    if not any(one.config for one in jobs):
        yield "no config is known: none of them is a job of a stage"
    elif not found.config:
        yield "the same config"
    if not found.code:
        yield f"the same code: {visible(first.code.words)}" if first.code.key else "no code is recorded"
    titles = _titles(jobs)
    environments = {title: one.environment for title, one in zip(titles, jobs)}
    known = [facts for facts in environments.values() if facts]
    if len(known) > 1 and not compare_facts.differing(known):
        told = [f"{name} {known[0][name]}" for name in ("Python", "torch", "GPUs") if name in known[0]]
        packages = sum(name.startswith("package ") for name in known[0])
        yield f"the same environment: {visible(', '.join([*told, f'{packages} packages']))}"
    yield from _unknown("environment", environments)
    inputs = {title: one.inputs for title, one in zip(titles, jobs)}
    known = [facts for facts in inputs.values() if facts]
    if len(known) > 1 and (names := compare_facts.alike(known)):
        yield f"the same inputs: {visible(', '.join(names))}"
    yield from _unknown("fingerprint of an input", inputs)


def _unknown(what: str, facts: Mapping[str, compare_facts.Facts]) -> Iterator[str]:
    lacking = [job for job, known in facts.items() if not known]
    if lacking:
        yield f"no {what} is recorded" + (f" of {', '.join(lacking)}" if len(lacking) < len(facts) else "")


# --- what came out ------------------------------------------------------------------------------------------

def _results(jobs: Sequence[Compared]) -> str:
    rows = {"id": _ids(jobs) if _titles(jobs) != _ids(jobs) else [],
            "node": [visible(one.job.node) if len({other.job.node for other in jobs}) > 1 else "" for one in jobs],
            "state": [one.job.state for one in jobs],
            "attempts": [str(one.attempts) if any(other.attempts > 1 for other in jobs) else "" for one in jobs],
            **{title: [cell(one.learned) for one in jobs] for title, cell in _COLUMNS.items()},
            **_evaluated(jobs),
            "wall h": [hours(one.spent.wall_s) for one in jobs], "GPU h": [hours(one.spent.gpu_s) for one in jobs],
            "useful": ["" if one.spent.useful is None else f"{100 * one.spent.useful:.0f} %" for one in jobs],
            "curve": [sparkline(one.learned.curve) for one in jobs]}
    kept = {title: [cell or "-" for cell in cells] for title, cells in rows.items() if any(cells)}
    return _table("result", kept, jobs, words=("id", "node", "state", "curve"))


def _evaluated(jobs: Sequence[Compared]) -> dict[str, list[str]]:
    """`last (best)` of metrics that have no column of their own, those first whose name tells which is the best."""
    keys = {key: said["best"] is None for one in jobs for key, said in one.learned.evaluated.items()
            if key not in _HAS_COLUMN}

    def cell(one: Compared, key: str) -> str:
        said = one.learned.evaluated.get(key)
        if said is None:
            return ""
        last, best = number(said["last"]), number(said["best"])
        return last if best in ("", last) else f"{last} (best {best})"

    return {visible(key): [cell(one, key) for one in jobs] for key in sorted(keys, key=keys.__getitem__)[:_METRICS]}


def _goal(jobs: Sequence[Compared], goal: Goal) -> str:
    def row(cell: Callable[[dict[str, Any]], str], never: str) -> list[str]:
        return [never if one is None else cell(one) for one in goal.cost]

    rows = {"step": row(lambda one: str(one["step"]), "never"), "value": row(lambda one: number(one["value"]), "-"),
            "wall h": row(lambda one: hours(one["wall_s"]) or "-", "-"),
            "GPU h": row(lambda one: hours(one["gpu_s"]) or "-", "-")}
    rows = {name: cells for name, cells in rows.items() if {*cells} != {"-"}}
    title = f"to reach {visible(goal.key)} {'≥' if goal.upwards else '≤'} {goal.value:g}"
    return f"{title}\n{_table('cost', rows, jobs, words=())}"


def hours(seconds: float | None) -> str:
    """A few digits, never an exponent."""
    if not seconds:
        return "" if seconds is None else "0"
    value = seconds / 3600
    return f"{value:.{4 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


# --- tables -------------------------------------------------------------------------------------------------

def _table(title: str, rows: dict[str, list[str]], jobs: Sequence[Compared],
           words: Sequence[str] | None = None) -> str:
    """A column for each of a few jobs, a row for each of many. `words`: rows that are no numbers; None: all."""
    if not rows:
        return ""
    titles = _titles(jobs)
    if len(jobs) > _SIDE_BY_SIDE:
        return aligned({"job": titles, **rows}, numbers=() if words is None else rows.keys() - set(words))
    columns = {name: list(cells) for name, cells in zip(titles, zip(*rows.values()))}
    return aligned({title: list(rows), **columns}, numbers=() if words is None else titles)


def _ids(jobs: Sequence[Compared]) -> list[str]:
    return [one.job.id for one in jobs]


def _titles(jobs: Sequence[Compared]) -> list[str]:
    """What a person calls them: their names or points, where each has another; else their ids."""
    names = [cut(visible(point(_points(one)) or one.job.name or ""), _NAME) for one in jobs]
    return names if all(names) and len({*names}) == len(names) else _ids(jobs)


def _points(one: Compared) -> dict[str, str]:
    return (one.job.group or {}).get("point") or {}


def _value(value: Any) -> str:
    if value is ABSENT:
        return "-"
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return visible(text)


def _shortened(values: Sequence[str]) -> list[str]:
    """Values that fit beside each other; of long ones that begin alike (paths) the beginning goes first."""
    room = max(_LEAST, _VALUES // min(len(values), _SIDE_BY_SIDE) - 2)
    if all(width(value) <= room for value in values):
        return list(values)
    common = len(os.path.commonprefix([value for value in values if value != "-"]))
    keep = max(0, common - room // 3)
    return [cut(value if value == "-" or not keep else f"…{value[keep:]}", room) for value in values]


def _fixed(digits: int, of: Callable[[Learned], Number]) -> Callable[[Learned], str]:
    def cell(learned: Learned) -> str:
        value = of(learned)
        return "" if value is None else f"{value:.{digits}f}"
    return cell


def _applied(learned: Learned) -> str:
    return "" if learned.attempted is None else f"{learned.applied:g}/{learned.attempted:g}"


def sparkline(values: Sequence[float], columns: int = _CURVE_COLUMNS) -> str:
    """The course of a number in one line, from its lowest to its highest; each column is a mean."""
    if len(values) < 2:
        return ""
    columns = min(columns, len(values))
    cuts = [i * len(values) // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:])]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_SPARKS[int((mean - low) / span * (len(_SPARKS) - 1) + 0.5)] for mean in means)


_COLUMNS: dict[str, Callable[[Learned], str]] = {
    "step": _fixed(0, lambda one: one.step),
    "psnr": _fixed(2, lambda one: one.psnr),
    "val psnr": _fixed(2, lambda one: one.val_psnr),
    "best": _fixed(2, lambda one: one.val_psnr_best),
    "inputs": _fixed(2, lambda one: one.val_psnr_input),
    "val ssim": _fixed(3, lambda one: one.val_ssim),
    "val lpips": _fixed(3, lambda one: one.val_lpips),
    "copy": _fixed(2, lambda one: one.val_psnr_copy),
    "white": _fixed(2, lambda one: one.val_psnr_white),
    "mean": _fixed(2, lambda one: one.val_psnr_mean),
    "applied": _applied,
    "skipped": _fixed(0, lambda one: one.skipped),
    "lr": lambda one: number(one.lr, 3),
    "s/step": lambda one: number(one.s_step, 3),
    "loss": lambda one: number(one.loss),
}
