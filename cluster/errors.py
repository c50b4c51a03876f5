"""What can go wrong between a person and a node, each with its exit code.

    ClusterError
      ├─ Unusable      2  what was asked for cannot be meant: bad cluster.yaml entry, bad path, no Python on the node
      ├─ Unreachable   3  the node or its scheduler could not be asked
      ├─ Refused       4  would lose work or disturb somebody; `--force` where that makes sense
      └─ NodeFailure   1  the node was asked and could not do it (disk full, permission denied)
"""
from __future__ import annotations


class ClusterError(Exception):
    """`what` happened, on which `node`, and what to do next."""

    exit_code = 1

    def __init__(self, what: str, node: str | None = None, hint: str | None = None) -> None:
        self.what, self.node, self.hint = what, node, hint
        super().__init__(what)

    def __str__(self) -> str:
        where = f"{self.node}: " if self.node else ""
        return f"{where}{self.what}" + (f"\n  {self.hint}" if self.hint else "")


class Unusable(ClusterError):
    exit_code = 2


class Unreachable(ClusterError):
    exit_code = 3


class Refused(ClusterError):
    exit_code = 4


class NodeFailure(ClusterError):
    exit_code = 1
