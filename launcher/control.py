"""Stopping and waiting for jobs: requests to their nodes, and what came of them."""
from __future__ import annotations

import getpass
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError
from cluster.inventory import Node
from launcher import reconcile
from launcher.errors import LaunchError
from launcher.index import Index, Job
from launcher.jobs import JobStatus, find, from_view, status_of
from launcher.logs import LogReader, Which

if TYPE_CHECKING:
    from cluster.backends.base import Backend

_STREAMS = 8  # at a time and node: a stock sshd takes ten sessions on one connection
_FOREVER_S = 30 * 86400.0


def whoami() -> str:
    return f"{getpass.getuser()}@{os.uname().nodename}"


@dataclass(frozen=True)
class Killed:
    """What a kill did. `error`: it could not be carried through."""

    id: str
    node: str
    state: str = ""
    already: bool = False  # it had ended, or somebody else had asked before
    detail: str = ""
    processes: int = 0  # freed
    gpu_mb: int = 0  # freed
    checkpoint_step: int | None = None
    survivors: tuple[tuple[int, str], ...] = ()  # pid, command
    error: LaunchError | ClusterError | None = None


def node_and_backend(job: Job, start: Path) -> tuple[Node, Backend]:
    from launcher.nodes import node_named

    node = node_named(job.node, start)
    return node, reconcile.backend_of(node)


def heard(index: Index, job: Job, view: dict[str, Any]) -> JobStatus:
    """Remember what a node just said about a job."""
    fresh = from_view(view, job.node, time.time())
    index.put(fresh)
    return status_of(fresh)


def kill(index: Index, words: Sequence[str], grace_s: float | None, now: bool, start: Path) -> list[Killed]:
    """Stop jobs, all at the same time, each until its end is verified."""
    jobs = {job.key: job for job in (find(index, word) for word in words)}

    def ask(job: Job) -> dict[str, Any]:
        return node_and_backend(job, start)[1].kill(job.run_dir, by=whoami(), grace_s=grace_s, now=now)

    answers = reconcile.ask_all({key: lambda job=job: ask(job) for key, job in jobs.items()}, _FOREVER_S)
    answered = [job for key, job in jobs.items() if not isinstance(answers[key], Exception)]
    reconcile.refresh(index, answered, start)
    return [_killed(jobs[key], answer) for key, answer in answers.items()]


def _killed(job: Job, answer: dict[str, Any] | LaunchError | ClusterError) -> Killed:
    if isinstance(answer, Exception):
        return Killed(job.id, job.node, error=answer)
    freed = answer["freed"]
    return Killed(job.id, job.node, answer["state"], answer["already"], answer["detail"], freed["processes"],
                  freed["gpu_mb"], answer["checkpoint_step"],
                  tuple((one["pid"], one["cmd"]) for one in answer["survivors"]))


def wait(index: Index, words: Sequence[str], start: Path) -> list[JobStatus]:
    """Block until every job has ended; their last states in the order given.

    One quiet stream per job: the node speaks as soon as the job has ended, and a lost link is taken up again.
    """
    jobs = {job.key: job for job in (find(index, word) for word in words)}
    room = {node: threading.Semaphore(_STREAMS) for node in {job.node for job in jobs.values()}}

    def watch(job: Job) -> dict[str, Any]:
        with room[job.node]:
            reader = LogReader(node_and_backend(job, start)[1], job.run_dir, Which(ranks=(), follow=True))
            for _ in reader:
                pass
        assert reader.final is not None
        return reader.final

    answers = reconcile.ask_all({key: lambda job=job: watch(job) for key, job in jobs.items()}, _FOREVER_S)
    for answer in answers.values():
        if isinstance(answer, Exception):
            raise answer
    return [heard(index, jobs[key], answer) for key, answer in answers.items()]
