"""How the code of jobs differs, file by file: between their snapshots, or between the commits that they ran."""
from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.node import worktree
from launcher.details import changed_files

if TYPE_CHECKING:
    from cluster.backends.base import Backend

_TEXTS = 400  # files whose lines are counted
_LINES = 20_000  # of a file


@dataclass(frozen=True)
class Code:
    """What one job ran: the node's record of it."""

    digest: str | None = None  # of its snapshot
    git_sha: str | None = None
    dirty: bool = False
    patch: str = ""  # against that commit
    untracked: tuple[str, ...] = ()
    directory: str | None = None  # of --cwd, on its node

    @property
    def key(self) -> str:
        """The same for the same code; empty: nobody recorded it."""
        if self.digest or not self.git_sha:
            return self.digest or ""
        said = json.dumps([self.patch, self.untracked]).encode()
        return f"{self.git_sha} {hashlib.sha256(said).hexdigest()}"

    @property
    def words(self) -> str:
        commit = f"commit {self.git_sha[:10]}" + (" with changes" if self.dirty or self.patch else "") \
            if self.git_sha else ""
        return ", ".join(filter(None, [commit, f"snapshot {self.digest[:10]}" if self.digest else ""])) or "not known"

    @classmethod
    def of(cls, spec: Mapping[str, Any], recorded: Mapping[str, Any]) -> Code:
        """From a job's spec, and what `show` tells of its code beside it."""
        said = {**(spec.get("code") or {}), **recorded}
        return cls(said.get("digest"), said.get("git_sha"), bool(said.get("dirty")), said.get("patch") or "",
                   tuple(said.get("untracked") or ()), None if said.get("digest") else spec.get("cwd"))


@dataclass(frozen=True)
class Change:
    """One file; added and removed are lines, None: they cannot be counted (binary, a link, too long)."""

    path: str
    kind: Literal["changed", "new", "gone"]
    added: int | None = None
    removed: int | None = None


@dataclass(frozen=True)
class CodeDiff:
    """From the code of the first job to that of others. `changes` None: `why` says why they are not known."""

    jobs: tuple[str, ...]  # ids of those that ran it
    old: Code
    new: Code
    changes: tuple[Change, ...] | None
    why: str = ""


@dataclass(frozen=True)
class Ran:
    """A job with its code and how its node is asked."""

    id: str
    run_dir: str
    code: Code
    backend: Backend


def code_diffs(jobs: Sequence[Ran], start: Path) -> tuple[CodeDiff, ...]:
    """Of every other code than the first job's. Costs no question when all ran the same. Raises Unreachable."""
    groups: dict[str, list[Ran]] = {}
    for one in jobs:
        groups.setdefault(one.code.key, []).append(one)
    first, *others = [same[0] for same in groups.values()] or [None]
    kept = _Kept()
    return tuple(_between(first, other, tuple(one.id for one in groups[other.code.key]), kept, start)
                 for other in others if first)


class _Kept:
    """The lists of files that were asked for, each once."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, str] | None] = {}

    def files(self, one: Ran) -> dict[str, str] | None:
        if one.id not in self._known:
            self._known[one.id] = one.backend.code_files(one.run_dir) if one.code.digest else None
        return self._known[one.id]


def _between(first: Ran, other: Ran, ids: tuple[str, ...], kept: _Kept, start: Path) -> CodeDiff:
    old, new = first.code, other.code
    if not (old.key and new.key):
        return CodeDiff(ids, old, new, None, "not every job's code was recorded")
    before, after = kept.files(first), kept.files(other)
    if before is not None and after is not None:
        return CodeDiff(ids, old, new, tuple(_counted(first, other, before, after)))
    changes, why = _by_commits(first, other, start)
    return CodeDiff(ids, old, new, changes, why)


def _counted(first: Ran, other: Ran, before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    paths = sorted(path for path in {**before, **after} if before.get(path) != after.get(path))
    told = paths[:_TEXTS]
    old = first.backend.code_texts(first.run_dir, [path for path in told if path in before]) if told else {}
    new = other.backend.code_texts(other.run_dir, [path for path in told if path in after]) if told else {}
    return [_change(path, path in before, path in after, old.get(path), new.get(path)) for path in paths]


def _change(path: str, was: bool, remains: bool, old: str | None, new: str | None) -> Change:
    kind: Literal["changed", "new", "gone"] = "changed" if was and remains else "new" if remains else "gone"
    if was and old is None or remains and new is None:
        return Change(path, kind)
    return Change(path, kind, *count_lines(old or "", new or ""))


def count_lines(old: str, new: str) -> tuple[int | None, int | None]:
    """Lines added and removed, as `git diff --stat` counts them."""
    before, after = old.splitlines(), new.splitlines()
    if len(before) + len(after) > _LINES:
        return None, None
    lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
    return sum(line[0] == "+" for line in lines), sum(line[0] == "-" for line in lines)


# --- jobs whose code was not packed -------------------------------------------------------------------------

def _by_commits(first: Ran, other: Ran, start: Path) -> tuple[tuple[Change, ...] | None, str]:
    """By what git says of their commits, here or where they ran, and by the patches against them."""
    old, new = first.code, other.code
    if not (old.git_sha and new.git_sha):
        return None, "their files are not kept"
    rows = [] if old.git_sha == new.git_sha else _asked(first, other, start)
    if rows is None:
        return None, "neither this directory nor theirs knows both commits"
    changes = {path: Change(path, "changed", added, removed) for path, added, removed in rows}
    before, after = _by_file(old.patch), _by_file(new.patch)
    for path in sorted({**before, **after}):
        if before.get(path) != after.get(path):
            counted = (None, None) if path in changes else _of_patches(before.get(path), after.get(path))
            changes[path] = Change(path, "changed", *counted)
    for path in sorted(set(old.untracked) ^ set(new.untracked)):
        changes.setdefault(path, Change(path, "new" if path in new.untracked else "gone"))
    return tuple(changes[path] for path in sorted(changes)), ""


def _asked(first: Ran, other: Ran, start: Path) -> list[tuple[str, int | None, int | None]] | None:
    old, new = first.code.git_sha or "", other.code.git_sha or ""
    if (found := worktree.numstat(start, old, new)) is not None:
        return found
    for one in (first, other):
        if one.code.directory and (found := one.backend.commits(one.code.directory, old, new)) is not None:
            return found
    return None


def _by_file(patch: str) -> dict[str, str]:
    """A patch of git's in pieces: what it says of each file."""
    pieces = ("\n" + patch).split("\ndiff --")[1:]
    return {name: piece for piece in pieces for name in changed_files(f"diff --{piece}")}


def _of_patches(old: str | None, new: str | None) -> tuple[int | None, int | None]:
    """Lines by which one patch leads to another file than the other; where both change it, nobody can say."""
    if old and new:
        return None, None
    [(added, removed)] = changed_files(f"diff --{new or old}").values()
    return (added, removed) if new else (removed, added)
