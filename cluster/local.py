"""Asking this computer: the agent's functions are called in this process."""
from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.asking import Answer, Frame, Payload, checked, size_of
from cluster.errors import ClusterError, Refused, explain
from cluster.inventory import Node
from cluster.node import agent


class LocalShell:
    """Supervisors still run from the carried agent: an edit of the sources never disturbs a living one."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def ask(self, request: dict[str, Any], payload: Payload = b"", timeout_s: float | None = None) -> Answer:
        if request["op"] in ("submit", "submit_array", "restart", "adopt") or request.get("slurm_spec"):
            python = self._node.agent_python or "python3"
            request = request | {"agent": [python, "-I", "-S", str(self._agent())]}
        size = size_of(payload)
        stream = io.BytesIO(payload) if isinstance(payload, bytes) else payload
        stream.seek(0)
        return checked(agent.answer(request | {"payload_size": size}, stream), self._node)

    def stream(self, request: dict[str, Any]) -> Iterator[Frame]:
        from cluster.node import logs
        try:
            yield from logs.frames(request, logs.sleep)
        except ClusterError as error:
            raise type(error)(error.what, self._node.name, error.hint) from None

    def close(self) -> None:
        pass

    def _agent(self) -> Path:
        from cluster import carry  # only a submit and a restart need it
        workdir = Path(self._node.workdir).expanduser()
        try:
            return carry.install_here(workdir)
        except OSError as error:
            what, hint = explain(error, f"the workdir {workdir} cannot take a job")
            raise Refused(what, self._node.name, hint) from None
