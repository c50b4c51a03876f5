"""Gives disk back on the nodes of jobs that have ended: which jobs, one question to each node, and what came of it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from launcher import reconcile
from launcher.control import node_and_backend
from launcher.errors import LaunchError, Refused
from launcher.index import Index, Job
from launcher.jobs import ENDED, find_all

_VERIFY_S = 24 * 3600.0  # the kept checkpoints are hashed, and they may be large


@dataclass(frozen=True)
class Pruned:
    """What was removed of a job, or would be. `note`: why nothing, or not all, was."""

    id: str
    node: str
    bytes: int = 0
    removed: list[dict[str, Any]] = field(default_factory=list)  # name, bytes
    kept: list[dict[str, Any]] = field(default_factory=list)  # name, why
    note: str = ""
    failed: bool = False  # it should have been looked at and could not
    error: LaunchError | ClusterError | None = None


def prune(index: Index, words: Sequence[str], keep_last: int, dry_run: bool, start: Path) -> list[Pruned]:
    """These jobs, or without any all that are known here and have ended; a node is asked once about all of its jobs."""
    named = {job.key: job for word in words for job in find_all(index, word)}
    jobs = list(named.values()) if words else [job for job in index.all() if job.ended and not job.view.get("by_hand")]
    by_node: dict[str, list[Job]] = {}
    for job in jobs:
        by_node.setdefault(job.node, []).append(job)
    waiting = [f"{row.spec}\n{row.config or ''}" for row in index.held()]

    def ask(mine: list[Job]) -> list[dict[str, Any]]:
        backend = node_and_backend(mine[0], start)[1]
        return backend.prune([job.run_dir for job in mine], keep_last, dry_run, waiting)

    said = reconcile.ask_all({name: lambda mine=mine: ask(mine) for name, mine in by_node.items()}, _VERIFY_S)
    results = {}
    for name, mine in by_node.items():
        answers = said[name]
        for number, job in enumerate(mine):
            results[job.key] = (Pruned(job.id, name, error=answers) if isinstance(answers, Exception)
                                else _pruned(job, answers[number], bool(words)))
    return [results[job.key] for job in jobs]


def _pruned(job: Job, answer: dict[str, Any], named: bool) -> Pruned:
    if named and answer["state"] and answer["state"] not in ENDED:
        return Pruned(job.id, job.node, error=Refused(
            f"it has not ended ({answer['state']}): nothing of it is removed", job.id,
            f"a trainer keeps few checkpoints by itself; end it with: launch kill {job.id}"))
    return Pruned(job.id, job.node, answer["bytes"], answer["removed"], answer["kept"], answer["note"],
                  failed=bool(answer["note"]) and (named or answer["state"] in ENDED))
