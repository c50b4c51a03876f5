"""What code a job runs, as git tells it: of the directory of --cwd, noted when the job comes to the node."""
from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from cluster.contract import RunDir, write_atomically

PATCH_IN_CODE = ".launch/uncommitted.patch"  # where the client puts the patch of a snapshot
_GIT_S = 20.0  # a work tree on a cold network file system
_LONGEST_PATCH = 2 << 20
_NAMES = 1000
_SHA = re.compile(r"[0-9a-f]{40,64}")


def record(run: RunDir, directory: str) -> None:
    """Write `worktree.json` {git_sha, dirty, untracked, patch} if `directory` is in a work tree."""
    if found := state(Path(directory).expanduser()):
        write_atomically(run.path / "worktree.json", json.dumps(found, indent=1).encode())


def recorded(run: RunDir) -> dict[str, Any]:
    """What is known about a job's code beside its spec: the patch of its snapshot, or what `record` wrote."""
    try:
        return json.loads((run.path / "worktree.json").read_bytes())
    except (OSError, ValueError):
        pass
    try:
        return {"patch": (run.code / PATCH_IN_CODE).read_text(encoding="utf-8", errors="replace")}
    except OSError:
        return {}


def state(directory: Path) -> dict[str, Any] | None:
    status = _git(directory, "status", "--porcelain=v2", "--branch", "-z", "--no-renames",
                  "--untracked-files=all")
    if status is None:
        return None
    records = status.split("\0")
    sha = next((one.split()[2] for one in records if one.startswith("# branch.oid ")), "(initial)")
    dirty = any(one[:2] in ("1 ", "2 ", "u ") for one in records)
    patch = _git(directory, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") if dirty else ""
    return {"git_sha": None if sha == "(initial)" else sha, "dirty": dirty,
            "untracked": [one[2:] for one in records if one.startswith("? ")][:_NAMES],
            "patch": (patch or "")[:_LONGEST_PATCH]}


def numstat(directory: Path, old: str, new: str) -> list[tuple[str, int | None, int | None]] | None:
    """(path, lines added, lines removed; None: not a text) from one commit to the other; None: it lacks one of them."""
    if not (_SHA.fullmatch(old) and _SHA.fullmatch(new)):
        return None
    said = _git(directory, "diff", "--no-ext-diff", "--no-textconv", "--no-renames", "--numstat", "-z", old, new, "--")
    if said is None:
        return None
    rows = [record.split("\t", 2) for record in said.split("\0") if record.count("\t") >= 2]
    return [(path, *(None if count == "-" else int(count) for count in counts)) for *counts, path in rows]


def _git(directory: Path, *args: str) -> str | None:
    """What git says; None when it is not there, takes too long, or the directory is in no work tree."""
    env = {**os.environ, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", "-C", str(directory), *args], env=env, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
