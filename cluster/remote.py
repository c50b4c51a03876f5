"""Asking a node through any program that runs one command line there: carrying the agent, marks, frames,
silence.
"""
from __future__ import annotations

import contextlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from cluster import carry, wire
from cluster.asking import Answer, Frame, Payload, checked, size_of
from cluster.contract import write_atomically
from cluster.errors import ClusterError, NodeFailure, Refused, Unreachable, Unusable, explain
from cluster.inventory import Node, client_state_dir

SILENCE_S = 20.0  # the agent says something every 5 s, so a link that is silent for so long is dead
BLOCK = 256 << 10


class Pipe(Protocol):
    """A command that runs on a node."""

    def send(self, content: bytes) -> None:
        """Raises OSError when the command has ended, TimeoutError when it takes nothing in for SILENCE_S."""

    def receive(self, limit: int, timeout_s: float) -> bytes:
        """At most `limit` bytes of what has come on stdout; empty at its end. Raises TimeoutError."""

    def errors(self) -> bytes:
        """What has come on stderr so far."""

    def exit_code(self) -> int | None:
        """Once stdout has ended; None when the link broke before there was one."""


class RemoteShell(ABC):
    """A Shell over `open_pipe`. Needs nothing on the node but sh and a Python >= 3.10."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._where = carry.agent_dir(node.workdir)
        self._python = _read_known(node)

    @abstractmethod
    def open_pipe(self, deadline: float | None) -> AbstractContextManager[Pipe]:
        """Run wire.LINE on the node. Raises ClusterError. `deadline` is on time.monotonic()."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is open."""

    def ask(self, request: dict[str, Any], payload: Payload = b"", timeout_s: float | None = None) -> Answer:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        line = json.dumps(request | {"payload_size": size_of(payload)}).encode() + b"\n"
        with self._agent("answer", line, payload, deadline) as conversation:
            return checked(conversation.answer(), self._node)

    def stream(self, request: dict[str, Any]) -> Iterator[Frame]:
        with self._agent("stream", json.dumps(request).encode() + b"\n", b"", None) as conversation:
            for header, body in conversation.frames():
                checked(header, self._node)
                yield header, body
                if "end" in header:
                    return

    @contextlib.contextmanager
    def _agent(self, command: str, line: bytes, payload: Payload,
               deadline: float | None) -> Iterator[_Conversation]:
        """The agent at work on a request; it was brought there, and a Python was found, if need be."""
        python = self._python or self._find_python(deadline)
        for _ in range(3):
            mark = _new_mark()
            script = wire.run_agent(python, self._where, command, mark)
            with self._run(script, mark, deadline) as conversation:
                conversation.send(line, payload)
                code = conversation.begin()
                if code == 0:
                    yield conversation
                    return
            if code == wire.NO_AGENT:
                self._carry(python, deadline)
            else:
                python = self._find_python(deadline)
        raise NodeFailure("launch's agent was put there and is gone again", self._node.name,
                          f"is {self._node.workdir} on a file system that keeps files?")

    def _find_python(self, deadline: float | None) -> str:
        """Raises Unusable: there is none."""
        mark = _new_mark()
        with self._run(wire.find_python(self._node, mark), mark, deadline) as conversation:
            if conversation.begin() == 0:
                self._python = str(conversation.answer()["python"])
                _write_known(self._node, self._python)
                return self._python
        if self._node.agent_python:
            raise Unusable(f"agent_python {self._node.agent_python} is no Python >= 3.10 there",
                           self._node.name, "correct it in cluster.yaml, or leave it out to have one found")
        raise Unusable("no Python >= 3.10 was found there: not in the node's env, on PATH or in the usual "
                       "conda places", self._node.name, "name one with `agent_python:` in cluster.yaml")

    def _carry(self, python: str, deadline: float | None) -> None:
        mark = _new_mark()
        agent = carry.pack().content
        header = json.dumps({"mark": mark, "directory": self._where, "size": len(agent)}).encode() + b"\n"
        with self._run(wire.run_installer(python), mark, deadline) as conversation:
            conversation.send(header, agent)
            if code := conversation.begin():
                raise conversation.failed(code)
            if failed := conversation.answer().get("os_error"):
                what, hint = explain(OSError(*failed), f"cannot put launch's agent into {self._where}")
                raise Refused(what, self._node.name, hint)

    @contextlib.contextmanager
    def _run(self, script: str, mark: str, deadline: float | None) -> Iterator[_Conversation]:
        with self.open_pipe(deadline) as pipe:
            conversation = _Conversation(pipe, self._node, mark.encode(), deadline)
            conversation.send(wire.framed(script), b"")
            yield conversation


class _Conversation:
    """What goes into a command on the node, and what comes out of it behind the mark."""

    def __init__(self, pipe: Pipe, node: Node, mark: bytes, deadline: float | None) -> None:
        self._pipe, self._node, self._mark, self._deadline = pipe, node, mark, deadline
        self._read = bytearray()

    def send(self, line: bytes, payload: Payload) -> None:
        """A command that ended before it read everything is no error here: its exit code says why."""
        try:
            self._pipe.send(line)
            if isinstance(payload, bytes):
                self._pipe.send(payload)
                return
            payload.seek(0)
            while block := payload.read(BLOCK):
                self._pipe.send(block)
        except TimeoutError:
            raise Unreachable(f"it takes in nothing for {SILENCE_S:g} s", self._node.name) from None
        except OSError:
            pass

    def begin(self) -> int:
        """Read up to the first mark: 0; NO_AGENT or one of NO_PYTHON: it ended so. Raises for every other
        ending.
        """
        while (at := self._read.find(self._mark)) < 0:
            if not self._more():
                code = self._pipe.exit_code()
                if code == wire.NO_AGENT or code in wire.NO_PYTHON:
                    return code
                raise self.failed(code)
        del self._read[:at + len(self._mark)]
        return 0

    def answer(self) -> Answer:
        while (at := self._read.find(self._mark)) < 0:
            if not self._more():
                raise self._torn()
        return json.loads(self._read[:at])

    def frames(self) -> Iterator[Frame]:
        self._line()  # the mark's own
        while True:
            header = json.loads(self._line())
            yield header, self._exactly(header.get("n", 0))

    def _exactly(self, size: int) -> bytes:
        """The next `size` bytes, copied as seldom as can be: logs have gigabytes."""
        blocks = [bytes(memoryview(self._read)[:size])]
        del self._read[:size]
        left = size - len(blocks[0])
        while left:
            if not (block := self._receive(left)):
                raise self._torn()
            blocks.append(block)
            left -= len(block)
        return b"".join(blocks)

    def _torn(self) -> ClusterError:
        """What to tell about an answer that stops in its middle. An agent that said all, and whose exit code overtook
        what sshd had still to send (it does), was not the one that failed.
        """
        return self.failed(self._pipe.exit_code() or None)

    def failed(self, code: int | None) -> ClusterError:
        """What to tell about a command that ended without its answer."""
        lines = self._pipe.errors().decode(errors="replace").strip().splitlines()[-5:]
        said = ":\n  " + "\n  ".join(lines) if lines else ""
        if code is None:
            return Unreachable(f"the connection broke{said}", self._node.name)
        return NodeFailure(f"no answer of launch's agent there (exit code {code}){said}", self._node.name,
                           f"try: ssh {self._node.ssh_name} echo hello")

    def _line(self) -> bytes:
        while (at := self._read.find(b"\n")) < 0:
            if not self._more():
                raise self._torn()
        line = bytes(self._read[:at])
        del self._read[:at + 1]
        return line

    def _more(self) -> bool:
        """Read on; False at the end."""
        block = self._receive(BLOCK)
        self._read += block
        return bool(block)

    def _receive(self, limit: int) -> bytes:
        """Raises Unreachable when nothing comes for too long."""
        patience = SILENCE_S
        if self._deadline is not None:
            patience = min(patience, max(0.0, self._deadline - time.monotonic()))
        try:
            return self._pipe.receive(limit, patience)
        except TimeoutError:
            raise Unreachable(f"connected, but no answer for {patience:.0f} s", self._node.name,
                              "it may be overloaded, or one of its file systems hangs") from None


def _new_mark() -> str:
    return f"=={secrets.token_hex(12)}=="


# --- what this client remembers of a node between two commands, and could find out again --------------------

def _read_known(node: Node) -> str | None:
    try:
        known = json.loads(_known_path(node).read_bytes())
        return known["python"] if known["for"] == _known_for(node) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_known(node: Node, python: str) -> None:
    path = _known_path(node)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"for": _known_for(node), "python": python}).encode())
    except OSError:  # a full home must not keep anybody from asking: the next command looks again
        pass


def _known_path(node: Node) -> Path:
    return client_state_dir() / "nodes" / f"{node.name}.json"


def _known_for(node: Node) -> str:
    return repr((node.via, node.ssh_name, node.ssh_config, node.agent_python, node.python))
