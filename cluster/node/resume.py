"""What an attempt resumes from.

Ours: the newest checkpoint that verifies, among those that count. Others: the newest file or directory their glob finds
that is whole. A candidate that fails is named in a note and the one before it is taken.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.contract import (
    BadCheckpoint, RunDir, list_checkpoints, parse_checkpoint_name, verify_checkpoint, write_atomically)
from cluster.errors import Unusable
from cluster.events import AttemptEnded, AttemptStarted
from cluster.journal import read_journal
from cluster.node.process import read_heartbeat
from cluster.spec import BadSpec, JobSpec, ResumeRule

HASHES = ".verified.json"  # in checkpoints/: hashes checked before, by inode, size and mtime
SETTLED_S = 30.0  # a candidate of a program we know nothing of: unchanged for this long, it is not being written
_VERIFY_S = 600.0
_ZIP_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".npz", ".zip")


@dataclass(frozen=True)
class Resume:
    """`path` None: from the start. `args` are words for the program's command line."""

    path: str | None = None
    step: int | None = None
    args: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def counting_checkpoints(run: RunDir, before: int) -> list[Path]:
    """Finished checkpoints that attempt `before` may use, newest first.

    One counts when the newest earlier attempt found it at its start or wrote it. What a still older attempt wrote after
    that (a process that was believed dead) never does.
    """
    found = [path for path in list_checkpoints(run.checkpoints) if _attempt_of(path) < before]
    for attempt in reversed(run.attempts()):
        if attempt.number < before and (start := _start_of(run, attempt.number)):
            return [path for path in found if path.name in start.checkpoints or _attempt_of(path) >= attempt.number]
    return found


def choose(run: RunDir, number: int, spec: JobSpec, cwd: str, env: Mapping[str, str]) -> Resume:
    """What attempt `number` resumes from. Raises Unusable: the checkpoint a person named does not verify."""
    if spec.resume_rule.kind == "none":
        return Resume()
    since = _asked_since(run, number, spec.resume)
    if spec.resume_rule.kind == "glob":
        own = newest_by_glob(run, number, since, spec.resume_rule, cwd, env)
    else:
        candidates = [path for path in counting_checkpoints(run, number) if _attempt_of(path) >= since]
        own = newest_verified(run, candidates)
    if own.path is not None or spec.resume in ("auto", "never"):
        return own
    return _named(spec, own.notes)


def newest_verified(run: RunDir, candidates: list[Path]) -> Resume:
    known = _known_hashes(run)
    before = dict(known)
    notes: list[str] = []
    best = Resume()
    for path in candidates:
        try:
            manifest = verify_checkpoint(path, known)
            if (manifest.step, manifest.attempt) != parse_checkpoint_name(path.name):
                raise BadCheckpoint(f"{path}: its manifest is that of another checkpoint")
            best = Resume(str(path), manifest.step)
            break
        except BadCheckpoint as error:
            notes.append(f"checkpoint {path.name} is passed over: {error}")
    if known != before:
        with contextlib.suppress(OSError):  # a full disk: they are hashed again next time
            write_atomically(run.checkpoints / HASHES, json.dumps(known).encode())
    return Resume(best.path, best.step, (), tuple(notes))


def newest_by_glob(run: RunDir, number: int, since: int, rule: ResumeRule, cwd: str,
                   env: Mapping[str, str]) -> Resume:
    """The newest match, by its number, that this job wrote, that is not being written and whose files can be read."""
    import glob  # this and what else a job with our own checkpoints never needs is loaded where it is used

    begin = min((start.t for n in range(since, number) if (start := _start_of(run, n))), default=None)
    if begin is None:  # the first attempt: what lies there is another run's
        return Resume()
    ended = _end_of_attempt_before(run, number)
    notes: list[str] = []
    matches = glob.glob(os.path.join(glob.escape(cwd), rule.glob or ""), recursive=True)
    there = (path for path in map(Path, matches) if path.exists())  # `last` may point to one that was removed
    for path in sorted(there, key=_number_of, reverse=True):
        changed = max((file.stat().st_mtime for file in _files(path)), default=path.stat().st_mtime)
        if changed < begin:
            continue
        if problem := _problem(path, changed, ended, rule, cwd, env):
            notes.append(f"checkpoint {path} is passed over: {problem}")
            continue
        digits = re.findall(r"\d+", path.name)
        return Resume(str(path), int(digits[-1]) if digits else None, _words(rule.arg or "", path), tuple(notes))
    return Resume(notes=tuple(notes))


def _named(spec: JobSpec, notes: tuple[str, ...]) -> Resume:
    path = Path(spec.resume)
    if not path.exists():
        raise Unusable(f"the checkpoint to resume from is not on this node: {path}")
    if spec.resume_rule.kind == "glob":
        return Resume(str(path), None, _words(spec.resume_rule.arg or "", path), notes)
    try:
        return Resume(str(path), verify_checkpoint(path).step, (), notes)
    except BadCheckpoint as error:
        raise Unusable(f"the checkpoint to resume from does not verify: {error}") from None


def _words(template: str, path: Path) -> tuple[str, ...]:
    import shlex

    return tuple(word.replace("{path}", str(path)) for word in shlex.split(template))


def _problem(path: Path, changed: float, ended: float, rule: ResumeRule, cwd: str,
             env: Mapping[str, str]) -> str | None:
    if changed > ended and time.time() - changed < SETTLED_S:
        return f"it changed less than {SETTLED_S:g} s ago"
    for file in _files(path):
        if problem := unreadable(file):
            return problem
    return _verify_command(path, rule.verify, cwd, env) if rule.verify else None


def _verify_command(path: Path, command: str, cwd: str, env: Mapping[str, str]) -> str | None:
    import subprocess

    words = [*_words(command, path), *([] if "{path}" in command else [str(path)])]
    try:
        done = subprocess.run(words, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=_VERIFY_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command}: {error}"
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip().splitlines()
    return f"{command}: exit code {done.returncode} {said[-1] if said else ''}".strip()


def unreadable(path: Path) -> str | None:
    """What is wrong with a file that should be a zip (what torch.save writes) or safetensors; None for any other."""
    import zipfile

    try:
        if path.suffix == ".safetensors":
            return _bad_safetensors(path)
        if path.suffix in _ZIP_SUFFIXES:
            if path.stat().st_size == 0:
                return f"{path.name} is empty"
            if _starts_as_zip(path):  # else the older format of torch.save, which has nothing to check
                with zipfile.ZipFile(path):
                    return None
    except (OSError, zipfile.BadZipFile) as error:
        return f"{path.name}: {error}"
    return None


def _starts_as_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _bad_safetensors(path: Path) -> str | None:
    with open(path, "rb") as file:
        head = file.read(8)
        size = int.from_bytes(head, "little") if len(head) == 8 else 0
        total = os.fstat(file.fileno()).st_size
        try:
            header = json.loads(file.read(size)) if 0 < size <= total else None
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return f"{path.name}: its header is not readable"
    expected = 8 + size + max(ends, default=0)
    return None if total == expected else f"{path.name}: {total} bytes, its header says {expected}"


def _number_of(path: Path) -> tuple[int, float]:
    digits = re.findall(r"\d+", path.name)
    return (int(digits[-1]) if digits else -1), path.stat().st_mtime


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _attempt_of(path: Path) -> int:
    parsed = parse_checkpoint_name(path.name)
    return parsed[1] if parsed else -1


def _start_of(run: RunDir, number: int) -> AttemptStarted | None:
    events, _ = read_journal(run.attempt(number).journal)
    return next((event for event in events if isinstance(event, AttemptStarted)), None)


def _end_of_attempt_before(run: RunDir, number: int) -> float:
    """When the newest earlier attempt ended; for a supervisor that was lost, its last heartbeat."""
    for attempt in reversed([one for one in run.attempts() if one.number < number]):
        events, _ = read_journal(attempt.journal)
        if ends := [event.t for event in events if isinstance(event, AttemptEnded)]:
            return ends[-1]
        if beat := read_heartbeat(attempt):
            return float(beat["t"])
    return 0.0


def _asked_since(run: RunDir, number: int, resume: str) -> int:
    """The first attempt of those without a gap before `number` that were asked to resume in the same way: what older
    ones wrote does not count any more (a person who says `never` at a restart means it)."""
    if resume == "auto":
        return 0
    first = number
    while first > 0 and _resume_of(run, first - 1) == resume:
        first -= 1
    return first


def _resume_of(run: RunDir, number: int) -> str | None:
    try:
        return JobSpec.from_json(run.attempt(number).spec.read_bytes()).resume
    except (OSError, BadSpec):
        return None


def _known_hashes(run: RunDir) -> dict[str, str]:
    try:
        known = json.loads((run.checkpoints / HASHES).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
