"""How a job can wait for another one with every client switched off: what the machines can do among themselves.

    the same node, or the same SLURM cluster     its supervisor looks at the other run directory; SLURM holds it
    a node that sees the other's workdir         the same, over the shared file system
    a peer (`peers: true`, tested now)           its supervisor asks the other node's agent over ssh
    anything else                                only a client can carry it: `launch submit --follow`
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import carry, wire
from cluster.inventory import Node
from cluster.node import peer
from launcher import reconcile

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5",
        "-o", "ServerAliveCountMax=3", "--")


@dataclass(frozen=True)
class Way:
    """`peer`: the command that asks the other node's agent; `carried`: why nothing but a client can do it."""

    peer: tuple[str, ...] = ()
    carried: str = ""


HERE = Way()  # the run directory of the other job is seen


def between(giver: Node, taker: Node, there: str | None = None) -> Way:
    """How a job on `taker` can wait for one on `giver`, found out by asking both.

    `there`: a file of the giver that says whose file system is seen; None: its agent. Raises ClusterError.
    """
    if giver.name == taker.name:
        return HERE
    if taker.via == "slurm":
        return Way(carried=f"{taker.name} is a SLURM cluster, which can only wait for its own jobs")
    told = reconcile.backend_of(giver).prepare()
    there = there or _agent_file(giver, told["workdir"])
    original = reconcile.backend_of(giver).prepare(stat=[there])["stats"][there]
    seen = reconcile.backend_of(taker).prepare(stat=[there])["stats"][there]
    if original is not None and original == seen:
        return HERE
    blind = f"{taker.name} does not see the run directories of {giver.name}"
    if not giver.peers or _is_here(giver):
        return Way(carried=f"{blind}, and {giver.name} is no `peers: true` node of cluster.yaml")
    command = command_to(giver, told)
    problem = reconcile.backend_of(taker).reach(command)
    return Way(carried=f"{blind}, and cannot reach it by ssh: {problem}") if problem else Way(peer=command)


def _is_here(node: Node) -> bool:
    """Whether the agent runs in this process: then it may never have been put into the workdir."""
    return node.via == "local" or (node.via, node.host) == ("slurm", "here")


def _agent_file(node: Node, workdir: str) -> str:
    """A file that no other file system has: it was written on that node at some moment."""
    directory = str(carry.install_here(Path(workdir))) if _is_here(node) else carry.agent_dir(workdir)
    return f"{directory}/__main__.py"


def command_to(node: Node, told: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The command by which other nodes ask the agent of `node`; `told`: what that says of itself."""
    told = told or reconcile.backend_of(node).prepare()
    script = wire.run_agent(told["python"], carry.agent_dir(told["workdir"]), peer.COMMAND, peer.MARK)
    return (*_SSH, node.ssh_name, wire.LINE, script)
