"""Hands jobs to SLURM through submitit. The only file that knows submitit and its exceptions.

It is carried to the login node and runs there as a program of its own: the agent does without site-packages, in which
submitit is.

    python AGENT sbatch      a Request as JSON on stdin -> JSON on the last line of stdout:
                             {script, said} of sbatch --test-only, {ids}, or {error: {exit_code, what, hint}}

What submitit pickles is `os.execv` with the command line of our own supervisor: from then on nothing of submitit is
left in the job, and signals reach the supervisor.
"""
from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.errors import ClusterError, NodeFailure, Unreachable, Unusable
from cluster.node.refusals import refusal

if TYPE_CHECKING:
    from submitit import SlurmExecutor

TEST_S = 60.0
# While submitit starts, nobody handles our signals: ignored, they do not end it, and the supervisor that takes its
# place looks into control/ first. submitit's own handler goes to a signal that nobody sends.
_DEAF = ("sh", "-c", 'trap "" USR1 USR2; exec "$@"', "sh")
# A lost node that comes back has an srun of the job's last run, which kills its step by number: the same number on
# another node would be the supervisor of the requeued job. So each run of four has a number of its own.
_SETUP = ["export SUBMITIT_PREEMPT_SIGNAL=URG",
          "for ((used = 0; used < ${SLURM_RESTART_COUNT:-0} % 4; used++)); do "
          "srun --nodes=1 --ntasks=1 --mpi=none --job-name=requeued true; done"]
# All CPUs of the allocation are the job's, in whatever way its processes share them.
_SRUN = ["--cpu-bind=none", "--mpi=none"]


@dataclass(frozen=True)
class Request:
    """`commands`: one command line per job; several are an array, `parallel` of them at a time (0: all)."""

    do: Literal["test", "submit"]
    folder: str  # submitit's, seen by all nodes
    options: dict[str, Any]
    commands: tuple[tuple[str, ...], ...]
    parallel: int = 0


def main() -> int:
    raw = json.loads(sys.stdin.read())
    request = Request(**raw | {"commands": tuple(tuple(one) for one in raw["commands"])})
    try:
        answer = _test(request) if request.do == "test" else _submit(request)
    except ClusterError as error:
        answer = {"error": {"exit_code": error.exit_code, "what": error.what, "hint": error.hint}}
    print(json.dumps(answer))
    return 0


def _test(request: Request) -> dict[str, Any]:
    """Whether SLURM would take it, and when it could start."""
    text = _script_text(request)
    try:
        done = subprocess.run(["sbatch", "--test-only"], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors="replace", timeout=TEST_S, cwd="/",
                              env=os.environ | {"LC_ALL": "C.UTF-8", "SLURM_TIME_FORMAT": "standard"})
    except subprocess.TimeoutExpired:
        raise refusal(f"sbatch did not answer in {TEST_S:g} s", request.options) from None
    if done.returncode:
        raise refusal(done.stdout, request.options)
    return {"script": text, "said": done.stdout}


def _submit(request: Request) -> dict[str, Any]:
    """Raises ClusterError; only Unreachable leaves open whether the job was queued."""
    executor = _executor(request)
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    try:
        with contextlib.redirect_stderr(sys.stdout):  # submitit repeats there what it raises
            with executor.batch():
                jobs = [executor.submit(os.execv, command[0], list(command)) for command in request.commands]
    except FailedJobError as error:
        raise refusal(str(error), request.options) from None
    except FailedSubmissionError as error:  # sbatch was content, and named no job
        raise Unreachable(f"sbatch said something unexpected: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise NodeFailure(f"{request.folder}: {error.strerror or error}") from None
    return {"ids": [job.job_id for job in jobs]}


def _script_text(request: Request) -> str:
    executor = _executor(request)
    if len(request.commands) > 1:
        executor.parameters["map_count"] = len(request.commands)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def _executor(request: Request) -> SlurmExecutor:
    """Options go to sbatch as they are; submitit adds only its output files and the array."""
    submitit = _submitit()
    try:
        executor = submitit.SlurmExecutor(request.folder, python=shlex.join([*_DEAF, sys.executable]))
    except RuntimeError:
        raise refusal(f"there is no srun on the PATH of {os.uname().nodename}", {}) from None
    except OSError as error:
        raise NodeFailure(f"{request.folder}: {error.strerror or error}") from None
    options = dict(request.options)
    executor.update_parameters(
        nodes=int(options.pop("nodes", 1)), ntasks_per_node=int(options.pop("ntasks-per-node", 1)),
        time=options.pop("time", None), job_name=None, wckey=None, stderr_to_stdout=True,
        array_parallelism=request.parallel or max(1, len(request.commands)), setup=list(_SETUP),
        srun_args=list(_SRUN), additional_parameters=options)
    return executor


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise Unusable(f"SLURM jobs are submitted through submitit, which {sys.executable} on "
                       f"{os.uname().nodename} does not have", hint=f"install it there: {install_command()}") from None
    return submitit


def install_command() -> str:
    """What brings submitit to this Python: a venv takes no --user, Debian's own Python wants to be overruled."""
    words = [sys.executable, "-m", "pip", "install"]
    if sys.prefix == sys.base_prefix:
        words.append("--user")
        if Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
            words.append("--break-system-packages")
    return shlex.join([*words, "submitit"])
