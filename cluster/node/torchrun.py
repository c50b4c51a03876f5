"""How a job's processes are started: the command lines, pure."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.contract import AttemptDir
from cluster.node.process import agent_command
from cluster.spec import JobSpec


@dataclass(frozen=True)
class Seat:
    """The place of a node among several that run one attempt together. Rank 0 listens at `address`:`port`."""

    node: int
    nodes: int
    address: str
    port: int
    id: str  # of the rendezvous, another one for each attempt
    resume: str | None = None  # what node 0 chose, for the others
    resume_step: int | None = None
    resume_args: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """For a command on several nodes: where it is, also in torchrun's words, which then needs no options."""
        return {"NNODES": str(self.nodes), "NODE_RANK": str(self.node), "MASTER_ADDR": self.address,
                "MASTER_PORT": str(self.port), "PET_NNODES": str(self.nodes), "PET_NODE_RANK": str(self.node),
                "PET_MASTER_ADDR": self.address, "PET_MASTER_PORT": str(self.port), "PET_RDZV_ID": self.id}


def program(spec: JobSpec, python: str | None, config: Path, resume_args: tuple[str, ...] = ()) -> list[str]:
    """What a rank becomes: the program of the job with its arguments."""
    argv = list(spec.argv) if spec.kind == "command" else [python or "python3", *_script(list(spec.argv))]
    return [*argv, *([str(config)] if spec.pass_config else []), *resume_args]


def _script(argv: list[str]) -> list[str]:
    is_file = "/" in argv[0] or argv[0].endswith(".py")
    return argv if is_file else ["-m", *argv]


def command_line(spec: JobSpec, attempt: AttemptDir, cwd: str, python: str | None, argv: list[str],
                 seat: Seat | None = None) -> list[str]:
    """The one child of the supervisor: torchrun with a shim per rank, or rank 0 itself."""
    if spec.kind != "torchrun":
        return argv
    # Full option names, all before the script: torchrun matches abbreviations even among the script's arguments.
    torchrun = [python or "python3", "-m", "torch.distributed.run", *_world(seat),
                f"--nproc-per-node={spec.ranks}", "--max-restarts=0", "--no-python", "--"]
    return [*torchrun, *agent_command("rank", str(attempt.path), cwd, *argv)]


def _world(seat: Seat | None) -> list[str]:
    """Static: the ranks of a node have the same numbers in every attempt, and no host has to know its own address."""
    if seat is None:
        return ["--standalone", "--nnodes=1"]
    return [f"--nnodes={seat.nodes}", f"--node-rank={seat.node}", "--rdzv-backend=static", f"--rdzv-id={seat.id}",
            f"--master-addr={seat.address}", f"--master-port={seat.port}"]
