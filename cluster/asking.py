"""What it means to ask a node, whatever the way there."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from cluster.errors import error_of
from cluster.inventory import Node

Answer = dict[str, Any]  # its fields: where cluster/node gives it (agent, submit, view, kill, restart)
Frame = tuple[dict[str, Any], bytes]  # see cluster/node/logs.py
Payload = bytes | BinaryIO


class Shell(Protocol):
    """A way to ask one node. All methods raise ClusterError."""

    def ask(self, request: dict[str, Any], payload: Payload = b"", timeout_s: float | None = None) -> Answer:
        """One question, one answer."""

    def stream(self, request: dict[str, Any]) -> Iterator[Frame]:
        """The frames of a log, the `end` frame included. Close the iterator to stop."""

    def close(self) -> None:
        """Give back what is open."""


def checked(answer: Answer, node: Node) -> Answer:
    """Raises the ClusterError that an answer of the agent holds."""
    if error := answer.get("error"):
        raise error_of(error, node.name)
    return answer


def size_of(payload: Payload) -> int:
    return len(payload) if isinstance(payload, bytes) else payload.seek(0, 2)
