"""The nodes that jobs can run on, as one frozen type. Who reads cluster.yaml builds these; `local` needs no
file.
"""
from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.spec import PythonEnv, Tell

USUAL_CONDA_BASES = ("~/miniconda3", "~/anaconda3", "~/miniforge3", "~/mambaforge", "/opt/conda")
DEFAULT_WORKDIR = "~/launch"


@dataclass(frozen=True)
class Node:
    """One machine, or a SLURM cluster as its login node sees it.

    `workdir`, `data`, `agent_python` and the paths in `python` are paths there; `~` is the home there.
    """

    name: str
    via: Literal["local", "ssh", "slurm"] = "ssh"
    host: str = ""  # what ssh is given; empty: the name. slurm: the login node, or "here"
    workdir: str = DEFAULT_WORKDIR
    data: str | None = None  # relative paths in run files are below it
    python: PythonEnv = PythonEnv()  # of the jobs
    gpus: Literal["auto"] | tuple[int, ...] = "auto"
    agent_python: str | None = None  # of the supervisor; None: found on the node
    share: Literal["private", "group"] = "private"
    env_vars: dict[str, str] = field(default_factory=dict)
    ssh_config: str | None = None  # None: the person's own ~/.ssh/config
    ssh_client: Literal["fabric", "openssh"] = "fabric"  # openssh: the `ssh` program, for what only it can do
    connect_timeout_s: float = 5.0  # where ssh's ConnectTimeout says nothing
    peers: bool = False  # the other nodes reach it by `ssh -o BatchMode=yes`
    partition: str | None = None  # slurm: where jobs go when nothing else is said
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)  # slurm: more options, by their long names

    notify: tuple[Tell, ...] = ()  # who is told what becomes of its jobs

    @property
    def ssh_name(self) -> str:
        return self.host or self.name


def local_node(data: Path | None = None) -> Node:
    """This computer: always there. `data` is the directory that relative paths in run files are below."""
    return Node(
        name="local", via="local", workdir=os.environ.get("LAUNCH_WORKDIR") or DEFAULT_WORKDIR,
        data=str(data) if data else None, python=PythonEnv("python", sys.executable),
        agent_python=sys.executable)


def client_state_dir() -> Path:
    """Where this client remembers what it could also find out again: $LAUNCH_HOME, else one directory per
    host below $XDG_STATE_HOME (a home on NFS is seen by many hosts).
    """
    if home := os.environ.get("LAUNCH_HOME"):
        return Path(home).expanduser()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "launch" / os.uname().nodename
