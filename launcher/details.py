"""`launch show` as text and as an object."""
from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from typing import Any

from launcher.api import Details
from launcher.views import age, aligned, number, visible, why

_PATCH_LINES = 60  # of the uncommitted changes; all of them are in --json


def as_object(found: Details) -> dict[str, Any]:
    return {**found.status.to_json(), "spec": found.spec, "config": found.config, "code": found.code,
            "inputs": inputs(found), "attempts": found.attempts, "checkpoints": found.checkpoints,
            "events": found.events, "skipped_lines": found.skipped_lines}


def as_text(found: Details) -> str:
    parts = (_code, _config, _attempts, _checkpoints, _events)
    return "\n\n".join([_head(found), *(text for part in parts for text in part(found))])


def inputs(found: Details) -> list[str]:
    """Absolute paths that the config names."""
    return sorted({line.partition(": ")[2].strip().strip("'\"") for line in (found.config or "").splitlines()
                   if line.partition(": ")[2].strip().strip("'\"").startswith("/")})


def _head(found: Details) -> str:
    job, now = found.status, time.time()
    rows = [("id", job.id), ("name", job.name), ("state", job.state), ("why", why(job, now)),
            ("stage", job.stage), ("node", job.node), ("run dir", job.run_dir)]
    if found.spec:
        rows += [("command", _command(found.spec)), ("directory", found.spec["cwd"]),
                 ("GPUs", found.spec["gpus"]),
                 ("processes", "" if found.spec["gpus"] else found.spec["procs"]),
                 ("secrets", ", ".join(found.spec["secrets"])), ("by", found.spec["submitted_by"])]
    rows += [("submitted", _when(job.submitted_at, now)), ("started", _when(job.started_at, now)),
             ("ended", _when(job.ended_at, now)), ("step", _step(found)), ("loss", number(job.loss)),
             ("memory", f"{job.peak_rss_mb:.0f} MB at most" if job.peak_rss_mb else "")]
    return "\n".join(f"{title:10} {visible(str(value))}" for title, value in rows if value)


def _command(spec: dict[str, Any]) -> str:
    words = {"torchrun": ["torchrun"], "python": ["python"], "command": []}[spec["kind"]]
    return shlex.join([*words, *spec["argv"]]) + (" config.yaml" if spec["pass_config"] else "")


def _step(found: Details) -> str:
    job = found.status
    return "" if job.step is None else f"{job.step} of {job.total}" if job.total else str(job.step)


def _when(t: float | None, now: float) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(t))} ({age(now - t)} ago)" if t else ""


def _code(found: Details) -> Iterator[str]:
    code = found.code
    lines = [f"commit     {code['git_sha']}" + (" with uncommitted changes" if code.get("dirty") else "")] \
        if code.get("git_sha") else []
    lines += [f"snapshot   {code['digest'][:16]}"] if code.get("digest") else []
    lines += [f"untracked  {', '.join(code['untracked'][:10])}"
              + (f" and {len(code['untracked']) - 10} more" if len(code["untracked"]) > 10 else "")] \
        if code.get("untracked") else []
    if lines:
        yield "\n".join(visible(line) for line in lines)
    if patch := (code.get("patch") or "").splitlines():
        more = [f"… {len(patch) - _PATCH_LINES} more lines: --json"] if len(patch) > _PATCH_LINES else []
        yield _block("uncommitted changes", [*patch[:_PATCH_LINES], *more])


def _config(found: Details) -> Iterator[str]:
    if found.config:
        yield _block("config.yaml", found.config.rstrip().splitlines())


def _attempts(found: Details) -> Iterator[str]:
    rows = found.attempts
    if rows:
        yield aligned({
            "attempt": [str(one["n"]) for one in rows],
            "from step": ["" if one["resume_step"] is None else str(one["resume_step"]) for one in rows],
            "to step": ["" if one["step"] is None else str(one["step"]) for one in rows],
            "took": [age(one["ended_at"] - one["started_at"]) if one["ended_at"] and one["started_at"] else ""
                     for one in rows],
            "GPUs": [str(len(one["gpus"])) for one in rows],
            "python": [visible(f"{(one['env'] or {}).get('python') or ''}") for one in rows],
            "torch": [visible(f"{(one['env'] or {}).get('torch') or ''}") for one in rows],
            "ended": [visible(": ".join(filter(None, (one["reason"], one["detail"])))) for one in rows],
        })


def _checkpoints(found: Details) -> Iterator[str]:
    if found.checkpoints:
        yield _block("checkpoints", [
            one["name"] + (f"  not usable: {one['why']}" if one["verified"] is False else "")
            for one in found.checkpoints])


def _events(found: Details) -> Iterator[str]:
    lines = [f"{time.strftime('%H:%M:%S', time.localtime(event.get('t') or 0))}  {_told(event)}"
             for event in found.events]
    if found.skipped_lines:
        lines.append(f"{found.skipped_lines} lines of the journal cannot be read")
    if lines:
        yield _block("events", lines)


def _told(event: dict[str, Any]) -> str:
    kind = event.get("event")
    match kind:
        case "attempt_started":
            start = "" if event["resume_step"] is None else f" from step {event['resume_step']}"
            text = f"attempt {event['attempt']} by {event['by']} on {event['hostname']}{start}"
        case "launched":
            text = f"started as process {event['pid']}: {shlex.join(event['argv'])}"
        case "stop_asked":
            text = f"stop asked by {event['by']} ({event['why']}), {event['grace_s']:g} s to save"
        case "attempt_ended":
            text = f"ended: {event['reason']}" + (f": {event['detail']}" if event["detail"] else "")
            text += "" if event["next"] == "end" else f"; then {event['next']}"
        case "note":
            text = event["text"]
        case _:
            text = str(kind)
    return text


def _block(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {visible(line)}" for line in lines)])
