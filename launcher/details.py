"""`launch show` as text and as an object."""
from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from typing import Any

from launcher.api import Details
from launcher.jobs import JobStatus
from launcher.past_configs import in_words
from launcher.views import age, aligned, ending, number, visible, why

_FILES = 20  # of the uncommitted changes that are named


def as_object(found: Details) -> dict[str, Any]:
    return {**found.status.to_json(), "spec": found.spec, "config": found.config, "config_of": found.config_of,
            "code": found.code, "inputs": inputs(found), "taken_over": found.inputs, "attempts": found.attempts,
            "checkpoints": found.checkpoints, "events": found.events, "skipped_lines": found.skipped_lines}


def as_text(found: Details) -> str:
    parts = (_code, _inputs, _config, _attempts, _checkpoints, _events)
    return "\n\n".join([_head(found), *(text for part in parts for text in part(found))])


def inputs(found: Details) -> list[str]:
    """Absolute paths that the config names."""
    return sorted({line.partition(": ")[2].strip().strip("'\"") for line in (found.config or "").splitlines()
                   if line.partition(": ")[2].strip().strip("'\"").startswith("/")})


def _head(found: Details) -> str:
    job, now = found.status, time.time()
    rows = [("id", job.id), ("name", job.name), ("state", job.state), ("why", why(job, now)),
            ("stage", job.stage), ("node", _node(job)), ("SLURM job", job.slurm_id),
            ("run dir", job.run_dir)]
    if found.spec:
        rows += [("command", _command(found.spec)), ("directory", found.spec["cwd"]),
                 ("after", ", ".join(one["id"] for one in found.spec.get("after") or ())),
                 ("machines", found.spec["nodes"] if found.spec.get("nodes", 1) > 1 else ""),
                 ("time", age(found.spec["time_s"]) if found.spec.get("time_s") else ""),
                 ("GPUs", found.spec["gpus"]),
                 ("processes", _processes(found.spec)),
                 ("secrets", ", ".join(found.spec["secrets"])), ("by", found.spec["submitted_by"])]
    rows += [("submitted", _when(job.submitted_at, now)), ("started", _when(job.started_at, now)),
             ("ended", _when(job.ended_at, now)), ("step", _step(found)), ("loss", number(job.loss)),
             ("memory", f"{job.peak_rss_mb:.0f} MB at its peak" if job.peak_rss_mb else "")]
    return "\n".join(f"{title:10} {visible(str(value))}" for title, value in rows if value)


def _node(job: JobStatus) -> str:
    """`gpu05`, `gpu01,gpu02`, `lab:low`; `lab (gpu[01-02])` once SLURM has chosen."""
    place = job.place or job.node
    return f"{job.node} ({place})" if job.backend == "slurm" and not place.startswith(job.node) else place


def _command(spec: dict[str, Any]) -> str:
    words = {"torchrun": ["torchrun"], "python": ["python"], "command": []}[spec["kind"]]
    return shlex.join([*words, *spec["argv"]]) + (" config.yaml" if spec["pass_config"] else "")


def _processes(spec: dict[str, Any]) -> str:
    """How many ranks on the CPU; how many processes a command starts is its own affair."""
    return str(spec["procs"]) if spec["kind"] == "torchrun" and not spec["gpus"] else ""


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
    if changes := changed_files(code.get("patch") or ""):
        more = [f"and {len(changes) - _FILES} more"] if len(changes) > _FILES else []
        title = f"uncommitted changes (the patch is code.patch in: launch show {found.status.id} --json)"
        yield _block(title, [*(_change(name, *counts) for name, counts in list(changes.items())[:_FILES]), *more])


def changed_files(patch: str) -> dict[str, tuple[int, int]]:
    """File -> lines added and removed, from what `git diff` printed; (0, 0): a binary file, or its mode."""
    counts: dict[str, list[int]] = {}
    name, in_hunk = "", False
    for line in patch.splitlines():
        if line.startswith("diff --"):  # --git a/NAME b/NAME, or --cc NAME during a merge
            name = line.rpartition(" b/")[2] if " b/" in line else line.split(" ", 2)[-1]
            name, in_hunk = name.rstrip('"'), False
            counts[name] = [0, 0]
        elif line.startswith("@@"):
            in_hunk = True
        elif in_hunk and line[:1] in ("+", "-"):
            counts[name]["+-".index(line[0])] += 1
    return {name: (added, removed) for name, (added, removed) in counts.items()}


def _change(name: str, added: int, removed: int) -> str:
    return f"{name}  +{added} -{removed}" if added or removed else f"{name}  (binary or mode)"


def _config(found: Details) -> Iterator[str]:
    if found.config:
        made = "" if found.config_of is None else f" of attempt {found.config_of}, which made its newest steps"
        yield _block(f"config.yaml{made}", found.config.rstrip().splitlines())


def _inputs(found: Details) -> Iterator[str]:
    """What other jobs gave, with the fingerprint of its content."""
    if found.inputs:
        yield _block("inputs", [_input(one) for one in found.inputs])


def _input(one: dict[str, Any]) -> str:
    step = "" if one["step"] is None else f"step {one['step']}, "
    return f"{one['reference']}  {one['path']}  ({step}sha256 {one['fingerprint'][:16]}, of {one['job']})"


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
            "ended": [visible(_ending(one)) for one in rows],
        })
    if changed := [words for one in rows if (words := in_words(one))]:
        yield _block("changed from the attempt before", changed)


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
            text = f"ended: {_ending(event)}"
            text += "" if event["next"] == "end" else f"; then {event['next']}"
        case "guard":
            text = f"{event['severity']} by the guard {event['rule']}: {event['what']}"
            text += f"; evidence in {event['evidence']}" if event.get("evidence") else ""
            text += f"; so {event['policy']}" if event["policy"] in ("checkpoint-and-stop", "restart-with") else ""
        case "note":
            text = event["text"]
        case _:
            text = str(kind)
    return text


def _ending(record: dict[str, Any]) -> str:
    """Of an attempt or an event, in full."""
    return ": ".join(filter(None, ending(record["reason"] or "", record["detail"])))


def _block(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {visible(line)}" for line in lines)])
