"""What can go wrong between a person and a node, each with its exit code.

    ClusterError
      ├─ Unusable      2  what was asked for cannot be meant: bad cluster.yaml, bad path, no Python there
      ├─ Unreachable   3  the node or its scheduler could not be asked
      ├─ Refused       4  would lose work or disturb somebody; `--force` where that makes sense
      └─ NodeFailure   1  the node was asked and could not do it (disk full, permission denied)
"""
from __future__ import annotations

import errno
from typing import Any


class Explained(Exception):
    """`what` is the matter, `where`, and a `hint`: what to do next. Printed as it is, with its exit code."""

    exit_code = 1

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what)

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        return f"{where}{self.what}" + (f"\n  {self.hint}" if self.hint else "")


class ClusterError(Explained):
    """`where` is the node."""

    @property
    def node(self) -> str | None:
        return self.where


class Unusable(ClusterError):
    exit_code = 2


class Unreachable(ClusterError):
    exit_code = 3


class Refused(ClusterError):
    exit_code = 4


class NodeFailure(ClusterError):
    exit_code = 1


_BY_CODE = {cls.exit_code: cls for cls in (NodeFailure, Unusable, Unreachable, Refused)}


def error_of(told: dict[str, Any], where: str | None = None) -> ClusterError:
    """The error that an agent told of, by its `exit_code`, `what` and `hint`."""
    return _BY_CODE.get(told["exit_code"], ClusterError)(told["what"], where, told["hint"])


_REMEDIES = {
    errno.ENOSPC: "free some space or inodes there, or give the node another `workdir:` in cluster.yaml",
    errno.EDQUOT: "your quota there is used up: free some space, or set another `workdir:` in cluster.yaml",
    errno.EROFS: "that file system is read-only: ask its administrator, or set another `workdir:`",
    errno.EACCES: "you may not write there: set a `workdir:` of your own in cluster.yaml",
    errno.EPERM: "you may not write there: set a `workdir:` of your own in cluster.yaml",
    errno.ENOTDIR: "a part of that path is a file: correct `workdir:` in cluster.yaml",
}


def explain(error: OSError, doing: str) -> tuple[str, str | None]:
    """What a person should read about a file system that refuses something -> (what, what to do next)."""
    where = f" ({error.filename})" if isinstance(error.filename, str) else ""
    return f"{doing}: {error.strerror or error}{where}", _REMEDIES.get(error.errno or 0)
