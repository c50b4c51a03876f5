"""The nodes a person can name: those of cluster.yaml as `cluster.inventory.Node`, and always `local`."""
from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.inventory import DEFAULT_WORKDIR, Node, local_node
from cluster.spec import PythonEnv, Tell
from launcher.errors import Wrong, nearest

if TYPE_CHECKING:
    from configs.schema import BaseNode, ClusterFile, Environment, Notify

LOCAL = "local"
HERE = "here"  # `login:` of a cluster whose login node is this computer
_VIA = {"LocalNode": "local", "SshNode": "ssh", "SlurmNode": "slurm"}
_reading = threading.Lock()


def load_nodes(start: Path) -> dict[str, Node]:
    """Every node by name; `local` is always there. Raises ConfigError for a cluster.yaml with a mistake."""
    return {LOCAL: _bare_local(_cluster(start), start)} | {node.name: node for node in in_file(start)}


def in_file(start: Path) -> list[Node]:
    """The nodes that cluster.yaml names, in its order."""
    found = _cluster(start)
    if found is None:
        return []
    return [_node(name, entry, found, start) for name, entry in found.nodes.items()]


def node_named(name: str, start: Path) -> Node:
    """Raises Wrong with the nearest name for one that there is not, ConfigError for a bad cluster.yaml."""
    found = _cluster(start)
    entry = found.nodes.get(name) if found else None
    if found and entry is not None:
        return _node(name, entry, found, start)
    if name == LOCAL:
        return _bare_local(found, start)
    known = [LOCAL, *(found.nodes if found else ())]
    close = nearest(name, known)
    raise Wrong(f"no such node: {name!r}", found.source if found else None,
                (f"nearest: {close}; " if close else "") + f"nodes: {', '.join(known)}"
                + ("" if found else "; there is no cluster.yaml: launch init writes one"))


def _cluster(start: Path) -> ClusterFile | None:
    from configs.places import find_cluster

    path = find_cluster(start)
    if path is None:
        return None
    with _reading:  # the nodes are asked by a thread each, and all of them begin here
        return _read(start, path, _version(path))


@functools.lru_cache(maxsize=4)
def _read(start: Path, path: Path, version: tuple[int, ...]) -> ClusterFile | None:
    """Once per process for each version of the file at `path`: it takes longer than a question to a node."""
    from configs.load import load_cluster  # reads YAML: who has no cluster.yaml does without

    return load_cluster(start)


def _version(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _local(start: Path) -> Node:
    return local_node(_data_beside_configs(start))


def _data_beside_configs(start: Path) -> Path:
    installed = Path(__file__).resolve().parent.parent
    project = next((above for above in (start, *start.parents) if (above / "configs").is_dir()), installed)
    return project / "data"


def _bare_local(found: ClusterFile | None, start: Path) -> Node:
    """This computer, of which cluster.yaml says nothing but what it says of all nodes."""
    return replace(_local(start), notify=_told(found.notify)) if found else _local(start)


def _told(entries: Iterable[Notify]) -> tuple[Tell, ...]:
    return tuple(Tell(one.kind, one.slack or one.discord or one.webhook or "", one.command or (), one.on)
                 for one in entries)


def _node(name: str, entry: BaseNode, found: ClusterFile, start: Path) -> Node:
    base = _local(start)
    via = _VIA[type(entry).__name__]
    local = via == "local"
    host = getattr(entry, "login" if via == "slurm" else "host", None) or ""
    here = local or (via, host) == ("slurm", HERE)  # the agent runs in this Python
    return Node(
        name=name, via=via, host=host,
        workdir=entry.workdir or (base.workdir if local else DEFAULT_WORKDIR),
        data=entry.data or (base.data if local else None),
        python=_python(entry.env) or (base.python if local else PythonEnv()),
        gpus=entry.gpus, agent_python=entry.agent_python or (base.agent_python if here else None),
        share=entry.share, env_vars=dict(entry.env_vars), ssh_config=found.ssh_config,
        ssh_client="fabric" if local else entry.ssh.client, peers=getattr(entry, "peers", False),
        partition=getattr(entry, "partition", None), sbatch=dict(getattr(entry, "sbatch", {})),
        notify=_told(found.notify if entry.notify is None else entry.notify))


def _python(env: Environment | None) -> PythonEnv | None:
    if env is None:
        return None
    if env.conda:
        return PythonEnv("conda", env.conda, env.conda_base)
    return PythonEnv("venv", env.venv) if env.venv else PythonEnv("python", env.python or "")
