"""What a backend can do with jobs. One per kind of place: `host` (this computer and ssh nodes); schedulers
come beside it.
"""
from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from cluster.asking import Answer, Frame, Payload
from cluster.inventory import Node
from cluster.spec import JobSpec, PythonEnv


class Backend(Protocol):
    """Every method is one question to the node. All raise ClusterError, whose exit code is that of the
    command.
    """

    node: Node

    def prepare(self, code_digest: str | None = None, stat: Sequence[str] = (),
                python: PythonEnv | None = None, cwd: str | None = None) -> Answer:
        """Whether the node could take a job, and what it sees. Nothing is started."""

    def render(self, spec: JobSpec) -> list[list[str]]:
        """The command lines that a submit would run on the node. Pure."""

    def submit(self, spec: JobSpec, config: str | None, secrets: Mapping[str, str],
               code: Payload = b"") -> Answer:
        """Start a job -> {id, run_dir, pid, attempt}. `code` is the packed snapshot when the node does not
        have it.

        The same spec again (the same token) is the same job.
        """

    def find(self, token: str) -> Answer:
        """-> {run_dir, id} of the job that a submit with this token became; both None when it became none."""

    def status(self, run_dirs: Sequence[str] | None, active_only: bool = False,
               timeout_s: float | None = None) -> Answer:
        """The views of these jobs, or (None) of every job of the workdir."""

    def show(self, run_dir: str) -> Answer:
        """Everything known about one job."""

    def metrics(self, run_dir: str, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The merged metrics of all attempts, oldest first."""

    def kill(self, run_dir: str, by: str, grace_s: float | None = None, now: bool = False) -> Answer:
        """Stop a job; returns when nothing of it is left, or with the survivors."""

    def restart(self, run_dir: str, by: str, grace_s: float | None = None, spec: JobSpec | None = None,
                config: str | None = None, secrets: Mapping[str, str] | None = None,
                code: Payload = b"") -> Answer:
        """Start the next attempt -> {attempt, pid, resume_step}."""

    def logs(self, run_dir: str, *, ranks: str | Sequence[int] = "0", attempts: str | int = "last",
             lines: int | None = None, follow: bool = False, offsets: Mapping[str, int] | None = None,
             grep: str | None = None) -> Iterator[Frame]:
        """The frames of a job's logs; close it to stop. Raises Unreachable when the link breaks: go on with
        the offsets that were seen (`next` of each frame).
        """

    def close(self) -> None:
        """Give back the connection."""


_open: dict[str, Backend] = {}
_lock = threading.Lock()


def backend_for(node: Node) -> Backend:
    """The backend of a node: one for the whole process, so that all its questions share one connection."""
    from cluster.backends.host import HostBackend
    with _lock:
        backend = _open.get(node.name)
        if backend is None or backend.node != node:
            if backend is not None:
                backend.close()
            backend = _open[node.name] = HostBackend(node)
        return backend


@atexit.register
def close_all() -> None:
    """Give back every connection."""
    with _lock:
        while _open:
            _open.popitem()[1].close()
