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

from cluster.errors import ClusterError, error_of
from cluster.inventory import Node
from launcher import reconcile
from launcher.errors import LaunchError, Wrong
from launcher.index import Index, Job
from launcher.jobs import JobStatus, find_all, from_view, status_of
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
    had_ended: bool = False  # before this was asked
    detail: str = ""
    processes: int = 0  # freed
    gpu_mb: int = 0  # freed
    checkpoint_step: int | None = None
    survivors: tuple[tuple[int, str], ...] = ()  # pid, command
    note: str = ""  # what could not be verified
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
    """Stop jobs, all at the same time, each until its end is verified. A node is asked once about all of its jobs."""
    jobs = {job.key: job for job in _meant(index, words)}
    dropped = _drop_held(index, words)
    by_node: dict[str, list[Job]] = {}
    for job in jobs.values():
        by_node.setdefault(job.node, []).append(job)

    def ask(mine: list[Job]) -> list[dict[str, Any]]:
        backend = node_and_backend(mine[0], start)[1]
        if len(mine) == 1:
            return [backend.kill(mine[0].run_dir, by=whoami(), grace_s=grace_s, now=now)]
        return backend.kill_all([job.run_dir for job in mine], by=whoami(), grace_s=grace_s, now=now)

    said = reconcile.ask_all({name: lambda mine=mine: ask(mine) for name, mine in by_node.items()}, _FOREVER_S)
    answers = {job.key: said[name] if isinstance(said[name], Exception) else said[name][number]
               for name, mine in by_node.items() for number, job in enumerate(mine)}
    answered = [job for key, job in jobs.items() if not isinstance(answers[key], Exception)]
    reconcile.refresh(index, answered, start)
    return [*(Killed(one, "this computer", "CANCELLED", note="it had not been submitted yet") for one in dropped),
            *(_killed(job, answers[key]) for key, job in jobs.items())]


def _meant(index: Index, words: Sequence[str]) -> list[Job]:
    """The jobs of these names that were submitted. Raises Wrong: one names nothing, and then none is touched."""
    waiting = _held_names(index)
    found: list[Job] = []
    for word in words:
        try:
            found += find_all(index, word) if word not in waiting or index.in_group(word) else []
        except Wrong as error:
            if others := [other for other in dict.fromkeys(words) if other != word and _runs(index, other, waiting)]:
                error.hint = "; ".join(filter(None, (error.hint, f"nothing was stopped: {', '.join(others)} "
                                                     f"{'goes' if len(others) == 1 else 'go'} on as before")))
            raise
    return found


def _runs(index: Index, word: str, waiting: set[str]) -> bool:
    """Whether something of that name has not ended, as far as is known here."""
    try:
        return word in waiting or any(not job.ended for job in find_all(index, word))
    except Wrong:
        return False


def _held_names(index: Index) -> set[str]:
    """What names something that is not submitted yet."""
    if not index.held():
        return set()
    from launcher import held

    return held.names(index)


def _drop_held(index: Index, words: Sequence[str]) -> list[str]:
    """What of these is not submitted yet is not submitted at all -> ids."""
    if not index.held():
        return []
    from launcher import held

    return held.drop(index, words)


def _killed(job: Job, answer: dict[str, Any] | LaunchError | ClusterError) -> Killed:
    if isinstance(answer, Exception):
        return Killed(job.id, job.node, error=answer)
    if problem := answer.get("error"):
        return Killed(job.id, job.node, error=error_of(problem, job.node))
    freed = answer["freed"]
    return Killed(job.id, job.node, answer["state"], answer["already"], answer["had_ended"], answer["detail"],
                  freed["processes"], freed["gpu_mb"], answer["checkpoint_step"],
                  tuple((one["pid"], one["cmd"]) for one in answer["survivors"]), answer.get("note", ""))


def wait(index: Index, words: Sequence[str], start: Path) -> list[JobStatus]:
    """Block until every job has ended; their last states in the order given.

    One quiet stream per job: the node speaks as soon as the job has ended, and a lost link is taken up again.
    """
    jobs = {job.key: job for word in words for job in find_all(index, word)}
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
