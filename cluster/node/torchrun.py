"""How a job's processes are started: the command lines, pure."""
from __future__ import annotations

from pathlib import Path

from cluster.contract import AttemptDir
from cluster.node.process import agent_command
from cluster.spec import JobSpec


def program(spec: JobSpec, python: str | None, config: Path, resume_args: tuple[str, ...] = ()) -> list[str]:
    """What a rank becomes: the program of the job with its arguments."""
    argv = list(spec.argv) if spec.kind == "command" else [python or "python3", *_script(list(spec.argv))]
    return [*argv, *([str(config)] if spec.pass_config else []), *resume_args]


def _script(argv: list[str]) -> list[str]:
    is_file = "/" in argv[0] or argv[0].endswith(".py")
    return argv if is_file else ["-m", *argv]


def command_line(spec: JobSpec, attempt: AttemptDir, cwd: str, python: str | None, argv: list[str]) -> list[str]:
    """The one child of the supervisor: torchrun with a shim per rank, or rank 0 itself."""
    if spec.kind != "torchrun":
        return argv
    # Full option names, all before the script: torchrun matches abbreviations even among the script's arguments.
    torchrun = [python or "python3", "-m", "torch.distributed.run", "--standalone", "--nnodes=1",
                f"--nproc-per-node={spec.ranks}", "--max-restarts=0", "--no-python", "--"]
    return [*torchrun, *agent_command("rank", str(attempt.path), cwd, *argv)]
