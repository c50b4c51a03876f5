"""The environment of a job: conda, venv or a Python is activated, what launch says is added, secrets come last."""
from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from cluster.contract import (
    ENV_ATTEMPT, ENV_CHECKPOINT_DIR, ENV_JOB_ID, ENV_PREFIX, ENV_RESUME, ENV_RUN_DIR, ENV_TOKEN, AttemptDir, RunDir,
    write_atomically)
from cluster.errors import NodeFailure, Unusable
from cluster.node.torchrun import Seat
from cluster.spec import JobSpec, PythonEnv

CONDA_BASES = ("~/miniconda3", "~/anaconda3", "~/miniforge3", "~/mambaforge", "/opt/conda")
_ACTIVATE_S = 120.0  # conda on a cold network file system
# $1 base, $2 name, $3 mark: what activation scripts print must not be taken for the environment
_ACTIVATE = '. "$1/etc/profile.d/conda.sh" && conda activate "$2" && printf "%s\\0" "$3" && env -0 && printf "%s" "$3"'
# What a job that was submitted from inside a torchrun rank must not inherit.
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
              "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NNODES", "PET_NNODES",
              "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_RDZV_ID")
# Prefixes. SUBMITIT_: of the program that brought the supervisor here. The rest belongs to the one task of srun that
# the supervisor is: with it Lightning, accelerate and MPI believe that each rank is the only task of a world of one.
# What describes the allocation (SLURM_JOB_ID, SLURM_JOB_NODELIST, SLURM_CPUS_ON_NODE, …) stays.
_OF_OTHERS = ("TORCHELASTIC_", ENV_PREFIX, "SUBMITIT_", "SLURM_STEP", "SLURM_TASK", "SLURM_SRUN_", "PMI_", "PMIX_")
_OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_GTIDS",
              "SLURM_NTASKS_PER_NODE", "SLURM_DISTRIBUTION", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_CPU_BIND",
              "SLURM_CPU_BIND_LIST", "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_VERBOSE")


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without what belongs to the job this process may itself be part of."""
    return {name: value for name, value in env.items()
            if name not in _OF_A_RANK + _OF_A_TASK and not name.startswith(_OF_OTHERS)}


def activate(python: PythonEnv, base: Mapping[str, str]) -> dict[str, str]:
    """The environment after activation. Raises Unusable or NodeFailure with the reason and the remedy."""
    env = dict(base)
    match python.kind:
        case "conda":
            return _activate_conda(python, env)
        case "venv":
            root = Path(python.value).expanduser()
            _need(root / "bin" / "python", "venv")
            env.pop("PYTHONHOME", None)
            return env | {"VIRTUAL_ENV": str(root), "PATH": _prepend(str(root / "bin"), env.get("PATH"))}
        case "python":
            program = Path(python.value).expanduser()
            _need(program, "python")
            return env | {"PATH": _prepend(str(program.parent), env.get("PATH"))}
        case "system":
            return env


def python_of(python: PythonEnv, env: Mapping[str, str]) -> str | None:
    """The interpreter of an activated environment; None when there is none."""
    match python.kind:
        case "python":
            return str(Path(python.value).expanduser())
        case "venv":
            return str(Path(python.value).expanduser() / "bin" / "python")
        case "conda":
            return shutil.which("python", path=env.get("PATH"))
        case "system":
            return shutil.which("python3", path=env.get("PATH"))


def conda_base(given: str | None) -> Path:
    """Raises Unusable when there is no conda where it was said to be or in the usual places."""
    places = [Path(place).expanduser() for place in ((given,) if given else CONDA_BASES)]
    for place in places:
        if (place / "etc" / "profile.d" / "conda.sh").is_file():
            return place
    raise Unusable(f"no conda in {', '.join(map(str, places))}",
                   hint="name its place: env: {conda: NAME, conda_base: DIR}")


def _activate_conda(python: PythonEnv, env: dict[str, str]) -> dict[str, str]:
    import secrets  # only conda needs these two
    import subprocess

    base, mark = conda_base(python.conda_base), secrets.token_hex(16)
    command = ["bash", "--noprofile", "--norc", "-c", _ACTIVATE, "bash", str(base), python.value, mark]
    try:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ACTIVATE_S)
    except subprocess.TimeoutExpired:
        raise NodeFailure(f"conda activate {python.value}: no answer in {_ACTIVATE_S:g} s") from None
    parts = done.stdout.split(mark.encode())
    if done.returncode != 0 or len(parts) != 3:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise Unusable(f"conda activate {python.value} failed ({base}): {' '.join(said) or done.returncode}")
    entries = (os.fsdecode(entry).partition("=") for entry in parts[1].split(b"\0") if entry)
    return {name: value for name, found, value in entries if found and name != "_"}


def _need(program: Path, kind: str) -> None:
    if not os.access(program, os.X_OK):
        raise Unusable(f"env: {{{kind}: …}} has no Python: {program} is not there or not executable")


def _prepend(directory: str, path: str | None) -> str:
    return f"{directory}:{path}" if path else directory


def job_environment(spec: JobSpec, run: RunDir, attempt: AttemptDir, base: Mapping[str, str], resume: str | None,
                    gpus: tuple[str, ...], node_has_gpus: bool, seat: Seat | None = None) -> dict[str, str]:
    """Everything a job's processes are started with, except its secrets. `base` is the activated environment."""
    env = {**base, "PYTHONUNBUFFERED": "1"}
    if gpus or node_has_gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if spec.kind == "command":
        env["PET_MASTER_PORT"] = str(free_port())  # a torchrun in the command: 29500 collides with the next job's
    if spec.kind != "torchrun" and seat:
        env |= seat.environment()
    if spec.kind == "torchrun":
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # ranks outlive torchrun while they save
    env |= spec.env
    if run.code.is_dir():
        env["PYTHONPATH"] = _prepend(str(run.code), env.get("PYTHONPATH"))
    return env | {
        ENV_RUN_DIR: str(run.path), ENV_JOB_ID: spec.id, ENV_ATTEMPT: str(attempt.number),
        ENV_TOKEN: spec.token_on(attempt.node), ENV_CHECKPOINT_DIR: str(run.checkpoints), ENV_RESUME: resume or "",
    }


def free_port() -> int:
    import socket  # costs more than the rest of this module

    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def secrets_file(workdir: Path) -> Path:
    return workdir / ".launch" / "secrets.env"


def write_secrets(workdir: Path, values: Mapping[str, str]) -> None:
    """Add `values` to the node's secrets: one `NAME=value` a line, the value as a JSON string, 0600."""
    path = secrets_file(workdir)
    known = _all_secrets(path) | dict(values)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [f"{name}={json.dumps(value)}\n" for name, value in sorted(known.items())]
    write_atomically(path, "".join(lines).encode(), mode=0o600)


def read_secrets(workdir: Path, names: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """-> (values, warnings about names without a value)."""
    known = _all_secrets(secrets_file(workdir)) if names else {}
    missing = [f"the secret {name} is not known on this node" for name in names if name not in known]
    return {name: known[name] for name in names if name in known}, missing


def _all_secrets(path: Path) -> dict[str, str]:
    """Raises NodeFailure: others can read the file, or a line is not NAME=value."""
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except FileNotFoundError:
        return {}
    if stat.S_IMODE(mode) & 0o077:
        raise NodeFailure(f"{path} can be read by others", hint=f"chmod 600 {path}")
    values = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, found, value = line.partition("=")
        if line.strip() and not found:
            raise NodeFailure(f"{path}:{number}: not NAME=value")
        if found:
            values[name.strip()] = json.loads(value) if value.startswith('"') else value
    return values
