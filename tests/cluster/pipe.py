"""A node on this computer: a login shell in an empty environment, as sshd would start it."""
from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from cluster import wire
from cluster.inventory import Node
from cluster.remote import BLOCK, Pipe, RemoteShell

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class PipeShell(RemoteShell):
    def __init__(self, node: Node, home: str, shell: str = "/bin/sh", path: str = SYSTEM_PATH) -> None:
        super().__init__(node)
        self._argv = ["env", "-i", f"HOME={home}", f"PATH={path}", shell, "-c", wire.LINE]
        self.commands = 0
        self.running: subprocess.Popen[bytes] | None = None

    @contextmanager
    def open_pipe(self, deadline: float | None) -> Iterator[Pipe]:
        self.commands += 1
        process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        self.running = process
        try:
            yield _ProcessPipe(process)
        finally:
            for stream in (process.stdin, process.stdout, process.stderr):
                assert stream
                stream.close()
            process.wait(10)

    def close(self) -> None:
        pass


class _ProcessPipe:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def send(self, content: bytes) -> None:
        assert self._process.stdin
        view = memoryview(content)
        while view:
            view = view[self._process.stdin.write(view):]

    def receive(self, limit: int, timeout_s: float) -> bytes:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise TimeoutError
        return os.read(self._process.stdout.fileno(), limit)

    def errors(self) -> bytes:
        assert self._process.stderr
        ready = select.select([self._process.stderr], [], [], 1.0)[0]
        return os.read(self._process.stderr.fileno(), BLOCK) if ready else b""

    def exit_code(self) -> int | None:
        return self._process.wait(10)
