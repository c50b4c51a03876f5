"""How much a user can still write to a file system: what it has free, and what is left of a quota.

Project quotas of XFS, and what btrfs and ZFS give a dataset, statvfs knows. A user's quota it does not know: that the
program `quota` tells, where the node has it. What neither tells (a quota of Lustre, a thin volume) is not known here.
"""
from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Refused

QUOTA_S = 2.0  # a file server that is asked for quotas may hang
_KB = 1024  # of a block of `quota`
_ENDLESS = 1 << 62
_FIELDS = 9  # of a line of `quota --raw-grace`: file system, then blocks and files: used, quota, limit, grace


@dataclass(frozen=True)
class Room:
    bytes: int
    inodes: int | None  # None: this file system does not count them
    quota: bool = False  # it is the quota, and not the file system, that ends first


def check(free: Room, directory: Path, least_bytes: int, least_inodes: int) -> None:
    """Raises Refused: it is too little for a job."""
    whose = " of your quota there" if free.quota else ""
    hint = "or set another `workdir:` in cluster.yaml; --force tries all the same"
    if free.bytes < least_bytes:
        raise Refused(f"{directory}: {free.bytes / 1e6:.0f} MB free{whose}, a job needs {least_bytes / 1e6:.0f} MB",
                      hint=f"free some space (launch prune), {hint}")
    if free.inodes is not None and free.inodes < least_inodes:
        raise Refused(f"{directory}: {free.inodes} inodes free{whose}, a job needs {least_inodes}",
                      hint=f"remove small files there, {hint}")


def of(directory: Path) -> Room:
    """What is left for this user. Raises OSError."""
    found = os.statvfs(directory)
    free = Room(found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None)
    left = _left_of_quota(directory)
    if left is None:
        return free
    size = min(free.bytes, left.bytes)
    inodes = min((one for one in (free.inodes, left.inodes) if one is not None), default=None)
    return Room(size, inodes, quota=(size, inodes) != (free.bytes, free.inodes))


def is_full(directory: Path) -> bool:
    """Whether not a byte is left there; False also where nobody can say."""
    try:
        return not os.statvfs(directory).f_bavail
    except OSError:
        return False


def _left_of_quota(directory: Path) -> Room | None:
    """None: there is no quota, or nobody to tell. Without a limit on one of the two, that is as good as endless."""
    program = shutil.which("quota")
    source = _source(directory) if program else None
    if not (program and source):
        return None
    try:
        done = subprocess.run([program, "--user", "--no-wrap", "--raw-grace"], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="replace", timeout=QUOTA_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) == _FIELDS and words[0] == source:
            blocks, files = _left(words[1:4]), _left(words[5:8])
            return Room(_ENDLESS if blocks is None else blocks * _KB, files)
    return None


def _left(words: list[str]) -> int | None:
    """Of used, quota and limit (0: none); a `*` behind what is used says that it is too much."""
    try:
        used, soft, hard = (int(word.rstrip("*")) for word in words)
    except ValueError:
        return None
    limit = hard or soft
    return max(0, limit - used) if limit else None


def _source(directory: Path) -> str | None:
    """What is mounted there, by the name that `quota` has for it."""
    path, best, source = os.path.realpath(directory), "", None
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        what, where = (_plain(word) for word in line.split(" ")[:2])
        if len(where) >= len(best) and (path == where or path.startswith(where.rstrip("/") + "/")):
            best, source = where, what
    return source


def _plain(word: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(code, character)
    return word
