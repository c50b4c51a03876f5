"""Who is told to stop: the ranks and nobody else.

Whoever else hears SIGTERM (torchrun, a process group) takes a rank's helpers down before the rank has saved.
"""
from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable

from cluster.contract import AttemptDir
from cluster.node.process import Proc, alive, boot_id, environment_of
from cluster.spec import JobSpec

_ROOT_AFTER_RANKS_S = 5.0  # a command whose ranks have ended and that goes on by itself is told too

Identity = tuple[int, int]  # pid, start time


def signed_in(attempt: AttemptDir) -> dict[int, Identity]:
    """Rank -> identity, of every rank that was ever started on this node in this attempt."""
    found, here = {}, boot_id()
    for path in attempt.ranks.glob("*.json"):
        try:
            said = json.loads(path.read_bytes())
            if said["boot_id"] == here:
                found[int(path.stem)] = (int(said["pid"]), int(said["started"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def foreign_ranks(processes: Iterable[Proc]) -> list[Proc]:
    """Ranks of a torchrun that we did not start: they have LOCAL_RANK and RANK, their parent has not."""
    return [one for one in processes if _is_rank(one.pid) and not _is_rank(one.parent)]


def _heads(processes: Collection[Proc]) -> list[Proc]:
    """Those that work for no other one of them: helpers (loader workers) are needed until their parent has saved, and
    what reads from a pipe (`| tee log`) ends by itself with its writer."""
    pids = {one.pid for one in processes}
    heads = [one for one in processes if one.parent not in pids]
    return [one for one in heads if not _reads_pipe(one.pid)] or heads


def _reads_pipe(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/0").startswith("pipe:")
    except OSError:
        return False


def _is_rank(pid: int) -> bool:
    env = environment_of(pid)
    return b"LOCAL_RANK" in env and b"RANK" in env


def untold(processes: Collection[Proc], attempt: AttemptDir) -> list[Identity]:
    """Whom to tell when nobody is above them any more: foreign ranks first, then who works for nobody else.

    Our own ranks have heard it from the kernel when their parent died; while one of them lives, nobody is told.
    """
    if any(alive(*who) for who in signed_in(attempt).values()):
        return []
    return [one.identity for one in foreign_ranks(processes) or _heads(processes)]


class Told:
    """Remembers who was told, so that nobody hears it twice: a second SIGTERM means "at once" to some programs."""

    def __init__(self, spec: JobSpec, attempt: AttemptDir, root: Identity) -> None:
        self._spec, self._attempt, self._root = spec, attempt, root
        self._told: set[Identity] = set()
        self._ranks_ended_at: float | None = None

    def while_it_runs(self, processes: Collection[Proc]) -> list[Identity]:
        """Whom to tell while the root process lives; ranks that appear later are told then."""
        if self._spec.kind == "torchrun":
            return self._new(who for who in signed_in(self._attempt).values() if alive(*who))
        if self._spec.kind == "python":
            return self._new([self._root])
        ranks = foreign_ranks(processes)
        if ranks:
            self._ranks_ended_at = 0.0
            return self._new(one.identity for one in ranks)
        if self._ranks_ended_at is None:
            return self._new([self._root])
        self._ranks_ended_at = self._ranks_ended_at or time.monotonic()
        overdue = time.monotonic() - self._ranks_ended_at > _ROOT_AFTER_RANKS_S
        return self._new([self._root]) if overdue else []

    def after_the_root(self, processes: Collection[Proc]) -> list[Identity]:
        """Whom to tell when the root has ended and others are left."""
        return self._new(untold(processes, self._attempt))

    def not_begun(self) -> bool:
        """No rank exists yet, so there is nothing to save and nobody to tell."""
        return self._spec.kind == "torchrun" and not signed_in(self._attempt)

    def _new(self, identities: Iterable[Identity]) -> list[Identity]:
        fresh = [one for one in identities if one not in self._told]
        self._told.update(fresh)
        return fresh
