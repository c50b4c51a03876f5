"""Taking a program that somebody started by hand (nohup, tmux) under status, logs, kill and restart."""
from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import reconcile
from launcher.control import whoami
from launcher.errors import Wrong
from launcher.jobs import from_view
from launcher.nodes import node_named
from launcher.stages import progress_rules
from launcher.submit import check_name, new_id

if TYPE_CHECKING:
    from launcher.index import Index


@dataclass(frozen=True)
class Adopted:
    """What was taken over. Paths, pids and GPU numbers are those of the node."""

    id: str
    node: str
    run_dir: str
    root: int  # its first process, which may be above the one that was named
    processes: int
    argv: tuple[str, ...]
    cwd: str
    log: str | None
    gpus: tuple[int, ...]
    secrets: tuple[str, ...]  # names of what is kept apart from the rest of its environment
    notes: tuple[str, ...]


def adopt(index: Index, where: str, name: str | None, log: str | None, rules: Sequence[str], start: Path) -> Adopted:
    """`where` is NODE:PID. Raises Wrong, ConfigError and ClusterError."""
    word, colon, pid = where.rpartition(":")
    if not colon or not word or not pid.isdecimal():
        raise Wrong(f"{where!r} is not NODE:PID",
                    hint="as in: launch adopt gpu05:4242 --name X; launch ps NODE lists the pids")
    progress = progress_rules(rules)
    node = node_named(word, start)
    if node.via == "slurm":
        raise Wrong(f"{node.name} is a SLURM cluster: what runs there is SLURM's to end",
                    hint="adopt takes machines that ssh reaches, and local")
    check_name(index, name, start)
    backend = reconcile.backend_of(node)
    answer = backend.adopt({
        "pid": int(pid), "id": new_id("adopted"), "token": os.urandom(16).hex(), "node": node.name, "name": name,
        "log": log, "progress": progress, "share": node.share, "by": whoami(), "t": time.time()})
    for view in backend.status([answer["run_dir"]])["jobs"]:
        index.put(from_view(view, node.name, time.time()))
    return _adopted(answer, node.name)


def _adopted(answer: dict[str, Any], node: str) -> Adopted:
    return Adopted(answer["id"], node, answer["run_dir"], answer["root"], answer["processes"], tuple(answer["argv"]),
                   answer["cwd"], answer["log"], tuple(answer["gpus"]), tuple(answer["secrets"]),
                   tuple(answer["notes"]))
