"""Supervisors of several nodes that start each other again, where the nodes reach each other (`JobSpec.joins`)."""
from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.contract import RunDir
from cluster.node import peer
from cluster.node.aside import Aside
from cluster.node.loop import Loop
from cluster.spec import JobSpec

FIRST_S = 10.0  # who submits starts them all; a link that was down comes back by itself
EVERY_S = 30.0
_ASK_S = 20.0


class Recall:
    """`tend` as long as nodes are missing; one that cannot be reached yet is asked again and again."""

    def __init__(self, run: RunDir, spec: JobSpec, loop: Loop) -> None:
        self._run, self._spec, self._loop = run, spec, loop
        self._next = time.monotonic() + FIRST_S
        self._asking: list[Aside] = []

    def tend(self, missing: Sequence[int]) -> set[int]:
        """Never blocks. -> the processes that ask."""
        self._asking = [aside for aside in self._asking if not aside.done()]
        reachable = [node for node in missing if node < len(self._spec.joins) and self._spec.joins[node]]
        if reachable and not self._asking and time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_S
            self._asking = [Aside(self._loop, self._ask, node) for node in reachable]
        return {aside.pid for aside in self._asking}

    def cancel(self) -> None:
        for aside in self._asking:
            aside.kill()
        self._asking = []

    def _ask(self, node: int) -> object:
        question = {"op": "join", "node": node} if node else {"op": "revive"}
        return peer.ask(self._spec.joins[node], {**question, "run_dir": str(self._run.path)}, _ASK_S)
