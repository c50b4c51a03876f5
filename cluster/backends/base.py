"""What a backend can do with jobs. One serves every kind of place: `host`, which asks the agent of this computer, of
an ssh node, or of the login node of a SLURM cluster.
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
                python: PythonEnv | None = None, cwd: str | None = None, slurm: JobSpec | None = None,
                busy: str = "", cost: Mapping[str, Any] | None = None, force: bool = False,
                check: Mapping[str, Any] | None = None, secrets: Sequence[str] = ()) -> Answer:
        """Whether the node could take a job, and what it sees. Nothing is started.

        `slurm`: a job that SLURM is to judge; raises what it refuses. `busy`: also who
        has the GPUs, for a job that is `alone` on its own or one that is `shared`.
        `cost`: {work, lists}: also what was measured of such work, and how many samples the lists name.
        `force`: also when there is little room. `check`: also what is wrong with its inputs: cluster/node/check.py.
        `secrets`: also which of these the node does not know.
        """

    def check(self, spec: JobSpec, config: str | None, code: Payload = b"", resume: str = "") -> Answer:
        """What the job's own Python says of it, without starting it: cluster/node/check_deep.py."""

    def machines(self) -> list[dict[str, Any]]:
        """The nodes of a SLURM cluster, once per partition; see cluster/node/machines.py."""

    def render(self, spec: JobSpec) -> list[list[str]]:
        """The command lines that a submit would run on the node. Pure."""

    def submit(self, spec: JobSpec, config: str | None, secrets: Mapping[str, str],
               code: Payload = b"", no_wait: bool = False, force: bool = False) -> Answer:
        """Start a job -> {id, run_dir, pid, attempt, slurm_id}. `code` is the packed snapshot when the node does
        not have it.

        The same spec again (the same token) is the same job. `no_wait`: raises Refused when it could not begin now.
        `force`: also when there is little room.
        """

    def submit_array(self, specs: Sequence[JobSpec], configs: Sequence[str | None],
                     secrets: Mapping[str, str], parallel: int = 0, code: Payload = b"") -> list[Answer]:
        """`submit` for jobs with the same code, as one array of SLURM's; `parallel` run at a time, 0: all."""

    def find(self, tokens: Sequence[str]) -> list[Answer]:
        """-> for each {run_dir, id} of the job that a submit with this token became; both None when it became none."""

    def status(self, run_dirs: Sequence[str] | None, active_only: bool = False,
               timeout_s: float | None = None) -> Answer:
        """The views of these jobs, or (None) of every job of the workdir."""

    def show(self, run_dir: str) -> Answer:
        """Everything known about one job."""

    def metrics(self, run_dir: str, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The merged metrics of all attempts, oldest first."""

    def doctor(self, run_dir: str, points: int = 0) -> Answer:
        """What is wrong with a job, its curves (of so many points at most; 0: as many as suit a terminal), and where
        its time went."""

    def compare(self, run_dirs: Sequence[str], points: int, reach: Sequence[tuple[str, float]] = ()) -> list[Answer]:
        """What a comparison of these jobs needs: cluster/node/comparing.py."""

    def code_files(self, run_dir: str) -> dict[str, str] | None:
        """The content of each file of a job's snapshot, by its hash; None: it is not kept there."""

    def code_texts(self, run_dir: str, paths: Sequence[str]) -> dict[str, str]:
        """Those of these files of a job's snapshot that are texts."""

    def commits(self, directory: str, old: str, new: str) -> list[tuple[str, int | None, int | None]] | None:
        """(path, lines added, removed) between two commits of a work tree there; None: it does not know them."""

    def kill(self, run_dir: str, by: str, grace_s: float | None = None, now: bool = False) -> Answer:
        """Stop a job; returns when nothing of it is left, or with the survivors."""

    def kill_all(self, run_dirs: Sequence[str], by: str, grace_s: float | None = None,
                 now: bool = False) -> list[Answer]:
        """`kill` for many jobs in one question: all are asked before the first is waited for."""

    def join(self, run_dir: str, node: int) -> Answer:
        """Have the supervisor of this node, the `node`th (from 0) of a job on several -> {pid, started}."""

    def revive(self, run_dir: str) -> Answer:
        """Go on with a job whose node was restarted while it ran -> {revived, state, attempt}."""

    def discard(self, run_dirs: Sequence[str]) -> None:
        """Remove jobs that ran only to be measured. Raises Refused for any other."""

    def adopt(self, request: Mapping[str, Any]) -> Answer:
        """Make a job of a program that runs there without launch: cluster/node/adopt.py."""

    def census(self) -> Answer:
        """Its GPUs and who uses them, disk, load and jobs: cluster/node/census.py."""

    def survey(self, token: str) -> Answer:
        """What `launch init` wants to know of it: cluster/node/survey.py."""

    def sees(self, tokens: Mapping[str, str], forget: str | None = None) -> list[str]:
        """Which of the files `tokens` (path -> content) are there too; `forget` is removed."""

    def processes(self) -> list[dict[str, Any]]:
        """What uses its GPUs, and what this user runs there and could adopt: cluster/node/census.py."""

    def reach(self, peer: Sequence[str]) -> str | None:
        """Why the agent of another node cannot be asked from this one by `peer`; None: it can."""

    def fetch(self, run_dir: str, what: str) -> Iterator[Frame]:
        """What a job has to give (`checkpoints.best`, `artifacts.NAME`), verified: cluster/node/handover.py."""

    def place(self, frames: Payload) -> str:
        """Put what `fetch` gave (each frame: its header as a line, its body) on this node -> its path there."""

    def files(self, run_dir: str, pattern: str | None = None) -> Answer:
        """The files of a run directory that fit a pattern (None: its artifacts): cluster/node/fetch.py."""

    def pull(self, run_dir: str, files: Sequence[Sequence[str | int]]) -> Iterator[Frame]:
        """The bytes of [path, from which byte, up to which byte] each, with their sha256: cluster/node/fetch.py."""

    def prune(self, run_dirs: Sequence[str], keep_last: int, dry_run: bool, keep: Sequence[str]) -> list[Answer]:
        """Remove old checkpoints of jobs that have ended: cluster/node/prune.py."""

    def leave_token(self, run_dir: str, token: str) -> str:
        """Write a file beside a run directory -> its path; `sees` tells whether another node has it too."""

    def luggage(self, run_dir: str) -> Answer:
        """What of an ended job goes with it to another node: cluster/node/move.py."""

    def arrive(self, request: Mapping[str, Any], content: Payload) -> str:
        """Take over what another node gave -> the run directory here: cluster/node/move.py."""

    def leave(self, run_dir: str, to: Mapping[str, Any], attempts: int) -> None:
        """Mark a job as one that goes on elsewhere. Raises Refused: it was started again meanwhile."""

    def restart(self, run_dir: str, by: str, grace_s: float | None = None, spec: JobSpec | None = None,
                config: str | None = None, secrets: Mapping[str, str] | None = None,
                code: Payload = b"", released: bool = False) -> Answer:
        """Start the next attempt -> {attempt, pid, resume_step}. `released`: nothing of it lives on its old node."""

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
