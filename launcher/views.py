"""Values in, text out: the tables a person reads. `--json` is another view of the same values."""
from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import Any

from launcher.jobs import JobStatus

# Columns left out, first to last, when the terminal is too narrow for all of them.
_DISPENSABLE = ("it/s", "attempt", "stage", "eta", "gpus", "loss", "name", "age")
_NARROWEST_REASON = 24
_BY_SOMEBODY = " by a person"  # the end of some of `cluster.events.Reason`
_BY_A_GUARD = " by a guard"


def width(text: str) -> int:
    """Columns that `text` takes on a terminal: Korean, Chinese and Japanese characters take two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text)


def cut(text: str, columns: int) -> str:
    """`text` in at most `columns` columns, with `…` where something is missing."""
    if width(text) <= columns:
        return text
    kept, used = [], 0
    for character in text:
        used += width(character)
        if used > columns - 1:
            break
        kept.append(character)
    return "".join(kept) + "…"


def visible(text: str) -> str:
    """One line without control characters: a name or message from elsewhere must not move the cursor."""
    return "".join(c if c.isprintable() else "\\n" if c == "\n" else "�" for c in text)


def age(seconds: float) -> str:
    """`42 s`, `4 min`, `5 h`, `3 d`."""
    seconds = max(0.0, seconds)
    for limit, divisor, unit in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // divisor)} {unit}"
    return f"{int(seconds // 86400)} d"


def lasting(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h 20 min`, `5 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2)


def status_table(jobs: Sequence[JobStatus], columns: int | None = None, now: float | None = None) -> str:
    """One line per job under a line of titles; `columns` is the terminal's width, None: as wide as it takes.

    A column that is empty for every job is left out.
    """
    now = time.time() if now is None else now
    table = {title: [visible(show(job, now)) for job in jobs] for title, show in _COLUMNS.items()}
    table = {title: cells for title, cells in table.items() if any(cells) or title in ("id", "state")}
    if columns is not None:
        _fit(table, columns)
    return aligned(table)


def aligned(table: dict[str, list[str]], numbers: Collection[str] | None = None) -> str:
    """Columns of equal width under their titles; those of `numbers` (default: of the status table's) to the right."""
    lines = [list(row) for row in zip(*([title, *cells] for title, cells in table.items()))]
    widths = [max(width(row[i]) for row in lines) for i in range(len(table))]
    right = [title in (_RIGHT if numbers is None else numbers) for title in table]
    return "\n".join("  ".join(_pad(*cell) for cell in zip(row, widths, right)).rstrip() for row in lines)


def _pad(text: str, columns: int, right: bool) -> str:
    space = " " * (columns - width(text))
    return space + text if right else text + space


def _fit(table: dict[str, list[str]], columns: int) -> None:
    """Shorten the reasons, then leave columns out, until the table fits."""
    for title in (None, *_DISPENSABLE):
        if title:
            table.pop(title, None)
        spare = columns - _table_width(table, leave_out="reason") - 2
        if "reason" not in table and spare >= -2:
            return
        if "reason" in table and spare >= _NARROWEST_REASON:
            break
    if "reason" in table:
        table["reason"] = [cut(cell, max(spare, len("reason"))) for cell in table["reason"]]


def _table_width(table: dict[str, list[str]], leave_out: str) -> int:
    kept = [(title, cells) for title, cells in table.items() if title != leave_out]
    return sum(max(width(cell) for cell in (title, *cells)) for title, cells in kept) + 2 * (len(kept) - 1)


def number(value: float | str | None, digits: int = 4) -> str:
    """Four significant digits, without an exponent where it can be read without."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.{digits}g}"


def why(job: JobStatus, now: float) -> str:
    """What a person needs to know beside the state: the reason, what it waits for, how old the answer is."""
    parts = ["by hand"] if job.by_hand else []
    if job.reason and job.state != "COMPLETED":
        parts.append(cause(job))
    elif job.state in ("PENDING", "RUNNING") and job.detail:
        parts.append(first_line(job.detail))
    if start := starts(job, now):
        parts[-1:] = [", ".join([*parts[-1:], start])]
    if job.state == "RESTARTING" and job.retry_at and job.retry_at > now:
        parts.append(f"again in {age(job.retry_at - now)}")
    if job.ended and job.state != "COMPLETED" and job.checkpoint_step is not None:
        parts.append(f"checkpoint at step {job.checkpoint_step}")
    if job.stale:
        parts.append(last_seen(job))
    return "; ".join(parts)


def cause(job: JobStatus) -> str:
    """Why it ended or waits again. What a person did needs no more words; `show` has them."""
    reason, detail = ending(job.reason or "", job.detail)
    if job.state == "PENDING":  # SLURM has it again
        return f"requeued ({reason})" + (f": {first_line(detail)}" if detail else "")
    return reason if not detail or reason != job.reason else f"{reason}: {first_line(detail)}"


def ending(reason: str, detail: str) -> tuple[str, str]:
    """Reason and detail of an ending, with the name where the reason only says that it was a person or a guard."""
    name, _, how = detail.partition(": ")
    if reason.endswith(_BY_A_GUARD) and name.startswith("guard "):
        return f"{reason.removesuffix(_BY_A_GUARD)} by the {name}", how
    if reason.endswith(_BY_SOMEBODY) and name.startswith("by "):
        return f"{reason.removesuffix(_BY_SOMEBODY)} {name}", how
    return reason, detail


def starts(job: JobStatus, now: float) -> str:
    """When the scheduler thinks that it starts, in this computer's time; empty: it does not say."""
    at = (job.queue or {}).get("starts_at")
    if job.state != "PENDING" or not at or at <= now:
        return ""
    days = (at - now) / 86400
    form = "%H:%M" if time.localtime(at)[:3] == time.localtime(now)[:3] else "%a %H:%M" if days < 6 else "%Y-%m-%d"
    return f"starts ~{time.strftime(form, time.localtime(at))}"


def last_seen(job: JobStatus) -> str:
    return f"last seen {age(job.last_seen_s)} ago"


def first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


def point(values: dict[str, str]) -> str:
    """`lr=1e-5 ssim=0`: a point of a sweep, by the last words of its keys where those tell them apart."""
    last = [key.rpartition(".")[2] for key in values]
    return " ".join(f"{key if last.count(word) > 1 else word}={value}"
                    for (key, value), word in zip(values.items(), last))


def _steps(job: JobStatus, now: float) -> str:
    if job.step is None:
        return ""
    return str(job.step) if job.total is None else f"{job.step}/{job.total}"


def _gpus(job: JobStatus, now: float) -> str:
    return str(len(job.gpus)) if job.gpus else ""


def _eta(job: JobStatus, now: float) -> str:
    """How long it still takes; `~`: will take once it has begun, as others of its kind did."""
    if job.state == "PENDING" and job.expected_s is not None:
        return f"~{lasting(job.expected_s)}"
    return age(job.eta_s) if job.eta_s is not None and job.state == "RUNNING" else ""


def _speed(job: JobStatus, now: float) -> str:
    return number(job.it_s, 3) if job.state in ("RUNNING", "STOPPING") else ""


def _age(job: JobStatus, now: float) -> str:
    since = job.ended_at if job.ended else job.submitted_at or job.started_at
    return age(now - since) if since else ""


_COLUMNS: dict[str, Callable[[JobStatus, float], str]] = {
    "id": lambda job, now: job.id,
    "name": lambda job, now: cut(job.name or "", 24),
    "point": lambda job, now: point((job.group or {}).get("point") or {}),
    "stage": lambda job, now: job.stage,
    "node": lambda job, now: cut(job.place or job.node, 24),
    "gpus": _gpus,
    "state": lambda job, now: job.state,
    "health": lambda job, now: "" if job.health == "unknown" else job.health or "",
    "step": _steps,
    "loss": lambda job, now: number(job.loss),
    "it/s": _speed,
    "eta": _eta,
    "attempt": lambda job, now: "" if not job.attempt else str(job.attempt),
    "age": _age,
    "reason": why,
}
_RIGHT = frozenset({"gpus", "step", "loss", "it/s", "eta", "attempt", "age"})
