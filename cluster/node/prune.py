"""Gives disk back: old checkpoints of jobs that have ended.

Kept in any case: the newest checkpoints that verify, the one marked as the best, what another job resumes from or was
handed, what does not verify or does not count although it is newer (a person should look at it), everything of a job
that has not ended or of which nothing verifies, and artifacts. Programs with checkpoints of their own form keep them.
"""
from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import BEST, BadCheckpoint, RunDir, list_checkpoints, parse_checkpoint_name, verify_checkpoint
from cluster.node import resume, view
from cluster.states import ENDED_WORDS

REFERENCE = re.compile(r"runs/([^/\"'\s\\]+)/checkpoints(?:/([\w.-]+))?")  # job, checkpoint: in any text
_ASIDE = ".tmp-"  # so begin the names of what is half written or half removed; see jobs/checkpoint.py
_LOCKS = (".restart.lock", ".supervisor.lock")
_BLOCK = 512  # bytes, of st_blocks
_TEXTS = ("spec.json", "config.yaml", "attempts/*/spec.json", "attempts/*/config.yaml", "attempts/*/inputs.json",
          "attempts/*/journal.jsonl")

Users = dict[tuple[str, str], set[str]]  # (job, checkpoint; empty: all of them) -> who names it


@dataclass(frozen=True)
class Plan:
    """What of a job's checkpoints goes, and what stays for which reason."""

    remove: list[Path]
    keep: list[tuple[str, str]]  # name, why


def prune(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """{run_dirs, keep_last, dry_run, keep: [texts that name checkpoints in use]} -> {jobs}, one for each:
    {id, state, removed: [{name, bytes}], kept: [{name, why}], bytes, note}; `note` says why nothing was done.
    """
    runs = [RunDir(Path(run_dir)) for run_dir in request["run_dirs"]]
    found = view.status({"jobs": request["run_dirs"]}, None)
    views = {one["run_dir"]: one for one in found["jobs"]}
    broken = {one["run_dir"]: one["why"] for one in found["broken"]}
    users = _users({run.path.parent for run in runs}, request.get("keep") or ())
    return {"jobs": [_pruned(run, views.get(str(run.path)), broken.get(str(run.path), ""), users, request)
                     for run in runs]}


def _pruned(run: RunDir, seen: dict[str, Any] | None, why: str, users: Users,
            request: dict[str, Any]) -> dict[str, Any]:
    answer = {"id": run.path.name, "state": seen["state"] if seen else "", "removed": [], "kept": [], "bytes": 0,
              "note": ""}
    if seen is None:
        return answer | {"note": why or "it is gone"}
    if seen["state"] not in ENDED_WORDS or seen["revivable"]:
        return answer | {"note": f"it has not ended: {seen['state']}"}
    try:
        with _untouched(run, seen["attempt"]):
            plan = plan_for(run, request["keep_last"], users)
            removed, note = _remove(plan.remove, request["dry_run"])
    except BlockingIOError:
        return answer | {"note": "it is being restarted, or its supervisor has not left yet"}
    except OSError as error:
        return answer | {"note": f"{error.filename or run.path}: {error.strerror}"}
    return answer | {"removed": removed, "bytes": sum(one["bytes"] for one in removed), "note": note,
                     "kept": [{"name": name, "why": why} for name, why in plan.keep]}


@contextmanager
def _untouched(run: RunDir, newest: int | None) -> Iterator[None]:
    """While nobody restarts the job. Raises BlockingIOError when somebody does, or did since it was looked at."""
    with ExitStack() as stack:
        for name in _LOCKS:
            lock = stack.enter_context(open(os.open(run.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        attempts = run.attempts()
        if attempts and attempts[-1].number != newest:
            raise BlockingIOError
        yield


def plan_for(run: RunDir, keep_last: int, users: Users) -> Plan:
    """What of a job that has ended can go when its newest `keep_last` verified checkpoints stay."""
    found = list_checkpoints(run.checkpoints)
    attempts = run.attempts()
    counting = set(resume.counting_checkpoints(run, attempts[-1].number + 1 if attempts else 0))
    kept: list[tuple[str, str]] = []
    good = 0
    while found and good < keep_last:
        path = found.pop(0)
        if path not in counting:
            kept.append((path.name, "does not count: an older attempt wrote it after a newer one had begun"))
        elif problem := _problem(path):
            kept.append((path.name, problem))
        else:
            good += 1
            kept.append((path.name, "the newest that verifies" if good == 1 else f"among the newest {keep_last}"))
    if not good:
        return Plan([], kept)
    best, remove = _best(run), []
    for path in found:
        who = users.get((run.path.name, path.name), set()) | users.get((run.path.name, ""), set())
        if path.name == best:
            kept.append((path.name, "marked as the best"))
        elif who := sorted(who - {run.path.name}):
            kept.append((path.name, f"{', '.join(who)} begins from it"))
        else:
            remove.append(path)
    return Plan([*remove, *_half(run)], kept)


def _problem(path: Path) -> str:
    """Why a checkpoint does not verify; empty: it does."""
    try:
        manifest = verify_checkpoint(path)
    except BadCheckpoint as error:
        return f"does not verify: {error}"
    if (manifest.step, manifest.attempt) != parse_checkpoint_name(path.name):
        return "does not verify: its manifest is that of another checkpoint"
    return ""


def _best(run: RunDir) -> str | None:
    try:
        return str(json.loads((run.checkpoints / BEST).read_bytes())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _half(run: RunDir) -> list[Path]:
    """What a job that died while it wrote a checkpoint, or removed one, has left."""
    return sorted(path for path in run.checkpoints.glob(f"{_ASIDE}*") if path.is_dir())


# --- who uses what ------------------------------------------------------------------------------------------

def _users(runs: Iterable[Path], more: Iterable[str]) -> Users:
    """Which jobs of these runs/ directories name which checkpoints, in their specs, configs, inputs and journals."""
    users: Users = {}
    texts = ((path.name, text) for directory in runs if directory.is_dir()
             for path in directory.iterdir() for text in _texts(path))
    for who, text in [*texts, *(("a job that waits", text) for text in more)]:
        for job, name in REFERENCE.findall(text):
            users.setdefault((job, name), set()).add(who)
    return users


def _texts(run: Path) -> Iterator[str]:
    for pattern in _TEXTS:
        for path in run.glob(pattern):
            try:
                yield path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:  # an attempt that just began replaces its files
                continue


# --- removing -----------------------------------------------------------------------------------------------

def _remove(paths: list[Path], dry_run: bool) -> tuple[list[dict[str, Any]], str]:
    """-> what went (or would go) with the bytes it gives back, and why one could not be removed.

    A directory is renamed before it is emptied, so that one half removed is never taken for a checkpoint.
    """
    sizes = _sizes(paths)
    removed: list[dict[str, Any]] = []
    for path in paths:
        if not dry_run:
            aside = path if path.name.startswith(_ASIDE) else path.with_name(f"{_ASIDE}gone-{path.name}")
            try:
                path.rename(aside)
                shutil.rmtree(aside)
            except OSError as error:
                return removed, f"{error.filename or path}: {error.strerror}"
        removed.append({"name": path.name, "bytes": sizes[path]})
    return removed, ""


def _sizes(paths: list[Path]) -> dict[Path, int]:
    """Bytes of disk that each gives back, one after the other: a file with several names goes with its last one."""
    left: dict[tuple[int, int], int] = {}
    sizes = {}
    for path in paths:
        size = _blocks(os.lstat(path))
        for directory, names, files in os.walk(path):
            for name in [*names, *files]:
                info = os.lstat(os.path.join(directory, name))
                if name in names and os.path.isdir(os.path.join(directory, name)):
                    size += _blocks(info)
                    continue
                links = left[info.st_dev, info.st_ino] = left.get((info.st_dev, info.st_ino), info.st_nlink) - 1
                size += _blocks(info) if links == 0 else 0
        sizes[path] = size
    return sizes


def _blocks(info: os.stat_result) -> int:
    return info.st_blocks * _BLOCK
