"""The test bed with SLURM: its commands on the login node, its faults, and the calls that a client makes."""
from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from .bed import NODES, REPOSITORY, TestbedError, poll
from .testbed import Testbed

LOGIN = "head"
GPU_NODES = NODES[1:]
TOOLS = ("squeue", "sacct", "sbatch", "scancel", "scontrol", "sinfo")
REAL_TOOLS = "/run/real-slurm-tools"
CALLS = f"{REAL_TOOLS}/calls"
# Noted before it runs, so that a call that hangs or is killed counts too.
_COUNTER = f"""#!/bin/sh
printf '%s\\n' "${{0##*/}} $*" >>{CALLS}
exec {REAL_TOOLS}/"${{0##*/}}" "$@"
"""


def not_installed() -> str | None:
    """Why this machine cannot run a SLURM bed, or None."""
    daemons = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd")
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [name for name in daemons if shutil.which(name, path=path) is None]
    return f"no {', '.join(missing)} here; .ci/packages testbed installs what is needed" if missing else None


@dataclass(frozen=True)
class Queued:
    """One line of squeue."""

    id: str  # 7, or 7_3 of an array
    user: str
    state: str
    reason: str
    name: str


class Calls:
    """What was called on a node while it was watched."""

    def __init__(self, bed: SlurmBed, node: str) -> None:
        self._bed, self._node = bed, node

    def lines(self) -> list[str]:
        """The command lines, oldest first: `squeue -h -u alice`."""
        return self._bed.read(self._node, CALLS).splitlines()

    def count(self) -> Counter[str]:
        """How often each tool was called."""
        return Counter(line.split()[0] for line in self.lines())

    def forget(self) -> None:
        self._bed.write(self._node, CALLS, "", mode="666")


class SlurmBed(Testbed):
    """A Testbed whose head is the login node of a SLURM cluster of gpu01 .. gpu05."""

    def __init__(self, name: str, accounting: bool = True) -> None:
        super().__init__(name)
        self.slurm_setting = "slurmdbd" if accounting else "none"
        self.accounting = accounting

    # -------------------------------------------------------------------------------------- commands
    def slurm(self, *argv: str, user: str = "alice", check: bool = True) -> str:
        """What a SLURM command prints on the login node. Raises TestbedError."""
        return self.exec(LOGIN, *argv, user=user, check=check).stdout

    def sbatch(self, script: str, *options: str, user: str = "alice") -> str:
        """Submit a line of shell; the job's id."""
        return self.slurm("sbatch", "--parsable", *options, "--wrap", script, user=user).strip()

    def queue(self, user: str | None = None) -> list[Queued]:
        """What waits or runs, of one user or of all."""
        whose = ["-u", user] if user else []
        lines = self.slurm("squeue", "-h", "-o", "%i|%u|%T|%r|%j", *whose, user="root").splitlines()
        return [Queued(*line.split("|", 4)) for line in lines]

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job`: JobState, Reason, NodeList, Restarts, … Empty when the controller forgot it."""
        said = self.slurm("scontrol", "-o", "show", "job", job_id, user="root", check=False)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def await_job(self, job_id: str, *states: str, timeout_s: float = 30.0) -> dict[str, str]:
        """The job once it is in one of the states. Raises TestbedError when the time is over."""
        if not poll(lambda: self.job(job_id).get("JobState") in states, timeout_s):
            raise TestbedError(f"job {job_id} is not {' or '.join(states)} after {timeout_s:g} s: {self.job(job_id)}")
        return self.job(job_id)

    def node_states(self) -> dict[str, str]:
        """The state of each node as sinfo words it: idle, mixed, down*, drained, …"""
        lines = self.slurm("sinfo", "-hN", "-p", "main", "-o", "%N %T", user="root").splitlines()
        return dict(line.split() for line in lines)

    def await_idle_nodes(self, timeout_s: float = 30.0) -> None:
        """Until no node is allocated, down or unknown. Raises TestbedError."""
        if not poll(lambda: set(self.node_states().values()) == {"idle"}, timeout_s):
            raise TestbedError(f"nodes are not idle after {timeout_s:g} s: {self.node_states()}")

    def repair_nodes(self) -> None:
        """Every daemon runs, every node takes jobs again. Raises TestbedError when that does not help."""
        for daemon in ("munged", *(("mariadb", "slurmdbd") if self.accounting else ()), "slurmctld"):
            self.fault(LOGIN, "start", daemon)
        for node in GPU_NODES:
            self.fault(node, "start", "munged")
            self.fault(node, "start", "slurmd")
            if self.node_states()[node] != "idle":
                self.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", user="root", check=False)
        self.await_idle_nodes()

    # -------------------------------------------------------------------------------------- faults
    @contextmanager
    def daemon_down(self, node: str, daemon: str, how: Literal["stop", "kill9"] = "stop") -> Iterator[None]:
        """A daemon of the node is not there: munged, slurmd, slurmctld, slurmdbd, mariadb or sshd."""
        with self._undone(node, (how, daemon), ("start", daemon)):
            yield

    @contextmanager
    def slurmd_killed(self, node: str) -> Iterator[None]:
        """SLURM loses the node after some 15 s and requeues its job, which goes on running there."""
        with self.daemon_down(node, "slurmd", "kill9"):
            yield

    @contextmanager
    def controller_down(self, how: Literal["stop", "kill9"] = "stop") -> Iterator[None]:
        """squeue, sbatch, scancel and scontrol fail; sacct answers; jobs run on."""
        with self.daemon_down(LOGIN, "slurmctld", how):
            yield

    @contextmanager
    def controller_hung(self) -> Iterator[None]:
        """A controller too busy to answer: connections are accepted, and time out after some 5 s."""
        signal = 'kill -"$1" "$(cat /run/slurm/slurmctld.pid)"'
        self.sh(LOGIN, signal, "STOP")
        try:
            yield
        finally:
            self.sh(LOGIN, signal, "CONT")

    @contextmanager
    def accounting_down(self) -> Iterator[None]:
        """sacct fails; everything else works."""
        with self.daemon_down(LOGIN, "slurmdbd"):
            yield

    @contextmanager
    def calls(self, node: str = LOGIN) -> Iterator[Calls]:
        """Notes each call of a SLURM command on the node, whoever makes it and however it is found."""
        with self.replaced_tools(node, {tool: _COUNTER for tool in TOOLS}):
            self.write(node, CALLS, "", mode="666")
            yield Calls(self, node)

    @contextmanager
    def replaced_tools(self, node: str, scripts: dict[str, str]) -> Iterator[None]:
        """Scripts in the place of SLURM commands; the real ones are in `REAL_TOOLS` meanwhile."""
        replaced = []
        self.exec(node, "mkdir", REAL_TOOLS)
        try:
            for tool, script in scripts.items():
                self.exec(node, "cp", f"/usr/bin/{tool}", REAL_TOOLS)
                self.write(node, f"{REAL_TOOLS}/{tool}.script", script, mode="755")
                self.exec(node, "mount", "--bind", f"{REAL_TOOLS}/{tool}.script", f"/usr/bin/{tool}")
                replaced.append(tool)
            yield
        finally:
            for tool in replaced:
                self.exec(node, "umount", "-l", f"/usr/bin/{tool}")
            self.exec(node, "rm", "-r", REAL_TOOLS)

    # -------------------------------------------------------------------------------------- for clients
    def slurm_cluster(
        self, user: str = "alice", login: str = LOGIN, workdir: str | None = None,
        ssh_nodes: Iterable[str] | Mapping[str, str] = (), ssh_config: Path | None = None, **lab: object,
    ) -> str:
        """The text of a cluster.yaml: `lab`, the SLURM cluster, and some of its machines as plain SSH nodes (under
        other names where `ssh_nodes` says so).

        With login `here` it is for use on head, where ssh needs no file of ours. `lab` adds keys to that node.
        """
        def place(**keys: object) -> dict[str, object]:
            return {**keys, "workdir": workdir or f"/home/{user}/launch", "env": {"python": sys.executable},
                    "data": str(REPOSITORY / "data")}

        nodes: dict[str, object] = {"lab": {**place(via="slurm", login=login), **lab}}
        hosts = ssh_nodes if isinstance(ssh_nodes, Mapping) else {node: node for node in ssh_nodes}
        nodes |= {name: place(via="ssh", host=host) for name, host in hosts.items()}
        config = {} if login == "here" else {"ssh_config": str(ssh_config or self.ssh_config(user))}
        return yaml.safe_dump({**config, "nodes": nodes}, sort_keys=False)

    def on_login(self, *argv: str, user: str = "alice", **how: object) -> str:
        """A command of ours on the login node, with the Python of the tests: `-m launcher.cli status`."""
        line = shlex.join([sys.executable, *argv])
        return self.exec(LOGIN, "sh", "-ec", f"cd {shlex.quote(str(REPOSITORY))}; exec {line}", user=user, **how).stdout
