"""What there is on every node and who uses it, asked of all at the same time."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.inventory import Node
from launcher import nodes, reconcile
from launcher.errors import Wrong
from launcher.index import Index


@dataclass(frozen=True)
class NodeReport:
    """One node. `census` is its own answer (cluster/node/census.py); None: `problem` says why there is none."""

    name: str
    via: str
    host: str
    census: dict[str, Any] | None
    problem: str = ""
    jobs: tuple[dict[str, Any], ...] = ()  # ours that run there: id, name, state, gpus

    @property
    def reachable(self) -> bool:
        return self.census is not None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "reachable": self.reachable, "jobs": list(self.jobs)}


def nodes_now(index: Index, start: Path, timeout_s: float = reconcile.ASK_S) -> list[NodeReport]:
    """Every node of cluster.yaml and this computer, in the order of the file."""
    known = nodes.load_nodes(start)
    answers = reconcile.ask_all(
        {name: lambda node=node: reconcile.backend_of(node).census() for name, node in known.items()}, timeout_s)
    return [_report(index, node, answers[name]) for name, node in known.items()]


def processes_on(word: str, start: Path) -> list[dict[str, Any]]:
    """What runs on a node: cluster/node/census.py. Raises Wrong and ClusterError."""
    node = nodes.node_named(word, start)
    if node.via == "slurm":
        raise Wrong(f"{node.name} is a SLURM cluster of many machines",
                    hint="its jobs: launch status; its machines: launch nodes")
    return reconcile.backend_of(node).processes()


def _report(index: Index, node: Node, answer: Any) -> NodeReport:
    host = "" if node.via == "local" else node.ssh_name
    known = _known_jobs(index, node.name)
    if isinstance(answer, Exception):
        return NodeReport(node.name, node.via, host, None, answer.what, tuple(known))
    there = {job["id"] for job in answer["jobs"]}
    more = [job for job in known if job["id"] not in there] if node.via == "slurm" else []
    return NodeReport(node.name, node.via, host, answer, jobs=(*answer["jobs"], *more))


def _known_jobs(index: Index, node: str) -> Sequence[dict[str, Any]]:
    """What the index has, of a node that cannot be asked, and of clusters: their jobs run on other machines."""
    return [{"id": job.id, "name": job.name, "state": job.view.get("state"), "gpus": list(job.view.get("gpus") or ())}
            for job in index.active() if job.node == node]
