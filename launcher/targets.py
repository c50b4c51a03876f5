"""What --node means: a node of cluster.yaml, a part of a cluster, several machines at once, or any that is free now.

    gpu05         a node of cluster.yaml, or a machine of one of its SLURM clusters
    lab           a SLURM cluster, in its default partition
    lab:gpu       its partition gpu; where there is none, its machine gpu
    gpu01,gpu02   machines that ssh reaches, as one torchrun world
    any           the first node of cluster.yaml that can take the job now
"""
from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.contract import write_atomically
from cluster.errors import ClusterError, Unreachable
from cluster.inventory import Node, client_state_dir
from cluster.spec import JobSpec
from launcher import nodes, reconcile
from launcher.errors import LaunchError, Wrong

ANY = "any"
LOOKUP_S = 10.0
_SHOWN = 20  # machines of a cluster that are named in a message
KNOWN_S = 86400.0  # clusters get other machines, and these other partitions

Machines = dict[str, list[str]]  # of a cluster: machine -> its partitions


@dataclass(frozen=True)
class Target:
    """Where a job is to run."""

    node: Node
    peers: tuple[Node, ...] = ()  # the other machines of the same job
    partition: str | None = None  # SLURM: None: the node's
    machine: str | None = None  # SLURM: this one and no other

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(node.name for node in (self.node, *self.peers)) if self.peers else ()


def resolve(word: str, start: Path) -> Target:
    """Where `word` aims (not `any`: see `candidates`).

    Raises Wrong for what is not there or does not go together, ConfigError, and ClusterError when a cluster that
    would have to know the name cannot be asked.
    """
    if "," in word:
        return _several([part.strip() for part in word.split(",")], start)
    known = nodes.load_nodes(start)
    if word in known:
        return Target(known[word])
    cluster, colon, part = word.partition(":")
    if colon and cluster in known:
        return _part(known[cluster], part)
    return _machine(word, known, start)


def candidates(start: Path) -> list[Target]:
    """The nodes of cluster.yaml in the order of the file. Raises Wrong when there are none."""
    found = nodes.in_file(start)
    if not found:
        raise Wrong("--node any: no node is named in a cluster.yaml",
                    hint="launch init writes one; without it there is only `local`, this computer")
    return [Target(node) for node in found]


def aimed(spec: JobSpec, target: Target) -> JobSpec:
    """The job as it runs there. Raises Wrong: it cannot be spread over so many machines."""
    if target.hosts:
        spec = replace(spec, hosts=target.hosts, nodes=_as_many(spec, target))
    elif spec.nodes > 1 and target.node.via != "slurm":
        raise Wrong(f"the job takes {spec.nodes} nodes, --node names one", target.node.name,
                    "name them all: --node N1,N2; only a SLURM cluster chooses them itself")
    if spec.nodes > 1 and spec.kind == "python":
        raise Wrong(f"{spec.stage} is one process; it cannot run on {spec.nodes} nodes",
                    hint="`torchrun:` in its stage file starts one per GPU on each node")
    if target.machine and spec.nodes > 1:
        raise Wrong(f"{target.machine} is one machine, the job takes {spec.nodes}",
                    hint=f"--node {target.node.name} lets SLURM choose them")
    if spec.slurm and (target.partition or target.machine):
        spec = replace(spec, slurm=replace(spec.slurm, nodelist=target.machine,
                                           partition=target.partition or spec.slurm.partition))
    return spec


def _as_many(spec: JobSpec, target: Target) -> int:
    count = len(target.hosts)
    if spec.nodes not in (1, count):
        raise Wrong(f"the job takes {spec.nodes} nodes, --node names {count}: {', '.join(target.hosts)}")
    return count


def _several(words: Sequence[str], start: Path) -> Target:
    if ANY in words:
        raise Wrong("--node: `any` chooses one node and stands alone")
    if "" in words:
        raise Wrong(f"--node {','.join(words)}: an empty name stands there")
    if doubled := next((word for word in words if words.count(word) > 1), None):
        raise Wrong(f"--node {','.join(words)}: {doubled} stands there twice")
    found = [nodes.node_named(word.partition(":")[0], start) for word in words]
    if cluster := next((node for node in found if node.via == "slurm"), None):
        raise Wrong(f"--node {','.join(words)}: {cluster.name} is a SLURM cluster, which chooses its nodes itself",
                    hint=f"--node {cluster.name} --nodes {len(words)}; several names are machines that ssh reaches")
    return Target(found[0], tuple(found[1:]))


# --- a part of a SLURM cluster ------------------------------------------------------------------------------

def _part(node: Node, part: str) -> Target:
    """`lab:gpu`. A partition comes before a machine of the same name."""
    if node.via != "slurm":
        raise Wrong(f"--node {node.name}:{part}: only a SLURM cluster has parts, and {node.name} is none")
    machines = _remembered(node)
    if not _names(machines, part):
        machines = _asked([node])[node.name]
    if isinstance(machines, Exception):
        raise machines
    if any(part in partitions for partitions in machines.values()):
        return Target(node, partition=part)
    if part in machines:
        return _on_machine(node, part, machines)
    partitions = sorted({name for names in machines.values() for name in names})
    raise Wrong(f"{node.name} has neither a partition nor a machine {part!r}",
                hint=f"partitions: {', '.join(partitions)}; machines: {', '.join(sorted(machines)[:_SHOWN])}")


def _machine(word: str, known: Mapping[str, Node], start: Path) -> Target:
    """A machine that is not in cluster.yaml but in a cluster of it."""
    clusters = [node for node in known.values() if node.via == "slurm"]
    having = {node.name: machines for node in clusters if word in (machines := _remembered(node))}
    silent: list[ClusterError | LaunchError] = []
    answered: dict[str, Machines] = {}
    if not having:
        asked = _asked(clusters)
        silent = [answer for answer in asked.values() if isinstance(answer, Exception)]
        answered = {name: answer for name, answer in asked.items() if not isinstance(answer, Exception)}
        having = {name: machines for name, machines in answered.items() if word in machines}
    if len(having) > 1:
        raise Wrong(f"--node {word}: {' and '.join(having)} each have a machine of that name",
                    hint=f"say which: --node {next(iter(having))}:{word}")
    for name, machines in having.items():
        return _on_machine(known[name], word, machines)
    if silent:
        raise Unreachable(f"--node {word}: no node of cluster.yaml, and a cluster that may have it does not answer: "
                          f"{silent[0].what}", silent[0].where, silent[0].hint)
    try:
        nodes.node_named(word, start)
    except Wrong as error:
        machines = (f"machines of {name}: {', '.join(sorted(found)[:_SHOWN])}" + (", …" if len(found) > _SHOWN else "")
                    for name, found in answered.items())
        error.hint = "; ".join(filter(None, (error.hint, *machines)))
        raise
    raise AssertionError(f"{word} is in cluster.yaml after all")


def _names(machines: Machines, part: str) -> bool:
    return part in machines or any(part in partitions for partitions in machines.values())


def _on_machine(node: Node, machine: str, machines: Machines) -> Target:
    """In the cluster's usual partition when that has it."""
    there = machines[machine]
    return Target(node, partition=None if node.partition in (None, *there) else there[0], machine=machine)


def _asked(clusters: Sequence[Node]) -> dict[str, Machines | LaunchError | ClusterError]:
    """What each cluster says it consists of; answers are remembered."""
    questions = {node.name: lambda node=node: reconcile.backend_of(node).machines() for node in clusters}
    answers = reconcile.ask_all(questions, LOOKUP_S)
    found: dict[str, Machines | LaunchError | ClusterError] = {}
    for node in clusters:
        answer = answers[node.name]
        found[node.name] = answer if isinstance(answer, Exception) else _remember(node, answer)
    return found


def _remember(node: Node, rows: Sequence[dict[str, Any]]) -> Machines:
    machines: Machines = {}
    for row in sorted(rows, key=lambda row: not row["default"]):
        machines.setdefault(row["name"], []).append(row["partition"])
    path = _memory_of(node)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"login": node.ssh_name, "machines": machines}).encode())
    except OSError:  # a full home must not keep anybody from submitting: the next command asks again
        pass
    return machines


def _remembered(node: Node) -> Machines:
    try:
        if time.time() - _memory_of(node).stat().st_mtime > KNOWN_S:
            return {}
        known = json.loads(_memory_of(node).read_bytes())
        return known["machines"] if known["login"] == node.ssh_name else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _memory_of(node: Node) -> Path:
    return client_state_dir() / "clusters" / f"{node.name}.json"
