"""Asking a node through the `ssh` program: for logins that only it can do (hardware keys, Kerberos, a
ControlMaster).

Each question is one `ssh` process, so a ControlMaster is what makes them fast. Never asks anything
(BatchMode).
"""
from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator

from cluster import wire
from cluster.errors import Unreachable
from cluster.inventory import Node
from cluster.remote import SILENCE_S, Pipe, RemoteShell
from cluster.sshconfig import Target, resolve

_SSH_FAILED = 255  # ssh's own exit code; every other one is the command's
_KEY_WORDS = ("Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED", "host key is known")


class OpenSshShell(RemoteShell):
    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._target: Target | None = None

    @contextlib.contextmanager
    def open_pipe(self, deadline: float | None) -> Iterator[Pipe]:
        if self._target is None:
            self._target = resolve(self._node.ssh_name, self._node.ssh_config, self._node.connect_timeout_s)
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                _command(self._target, deadline), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, bufsize=0)
            try:
                yield _ProcessPipe(process, errors.fileno(), self._node, self._target)
            finally:
                for stream in (process.stdin, process.stdout):
                    if stream:
                        stream.close()
                process.terminate()
                process.wait()

    def close(self) -> None:
        pass


def _command(target: Target, deadline: float | None) -> list[str]:
    timeout_s = target.timeout_s
    if deadline is not None:
        timeout_s = min(timeout_s, deadline - time.monotonic())
    options = ("BatchMode=yes", "RequestTTY=no", f"ConnectTimeout={max(1, round(timeout_s))}",
               "ServerAliveInterval=5", "ServerAliveCountMax=3")
    config = ["-F", target.config] if target.config else []
    words = [word for option in options for word in ("-o", option)]
    return ["ssh", *config, *words, "--", target.name, wire.LINE]


class _ProcessPipe:
    def __init__(self, process: subprocess.Popen[bytes], errors: int, node: Node, target: Target) -> None:
        assert process.stdin and process.stdout
        self._process, self._errors, self._node, self._target = process, errors, node, target
        self._in, self._out = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._in, False)

    def send(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            if not select.select([], [self._in], [], SILENCE_S)[1]:
                raise TimeoutError
            left = left[os.write(self._in, left):]

    def receive(self, limit: int, timeout_s: float) -> bytes:
        if not select.select([self._out], [], [], timeout_s)[0]:
            raise TimeoutError
        return os.read(self._out, limit)

    def errors(self) -> bytes:
        return os.pread(self._errors, 64 << 10, max(0, os.fstat(self._errors).st_size - (64 << 10)))

    def exit_code(self) -> int:
        """Raises Unreachable with the words of ssh when it was ssh that failed."""
        code = self._process.wait()
        if code == _SSH_FAILED:
            raise self._failed()
        return code

    def _failed(self) -> Unreachable:
        said = self.errors().decode(errors="replace").strip()
        last = said.splitlines()[-1] if said else "it said nothing"
        if any(words in said for words in _KEY_WORDS):
            return Unreachable(f"ssh does not trust its host key:\n{said}", self._node.name,
                               f"if the key is right, accept it with: {self._target.command}")
        return Unreachable(f"ssh: {last}", self._node.name, f"try: {self._target.command}")
