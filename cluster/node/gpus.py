"""The GPUs of this host, as nvidia-smi tells them, and which of them a job gets."""
from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import NodeFailure, Unusable

NVIDIA_SMI_S = 20.0  # the first question after boot loads the driver
_QUERY = "--query-gpu=index,uuid,memory.total,memory.used,driver_version,name"
_SAME_MB = 512  # GPUs whose used memory differs by less are equally free


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi."""

    index: int
    uuid: str
    name: str
    memory_mb: int
    used_mb: int
    driver: str


def has_driver() -> bool:
    """Whether this host may have NVIDIA GPUs at all; costs no process."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def list_gpus(timeout_s: float = NVIDIA_SMI_S) -> list[Gpu]:
    """Every GPU by index; none when there is no nvidia-smi. Raises NodeFailure when it hangs or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    import subprocess  # a host without a GPU does without

    try:
        done = subprocess.run([program, _QUERY, "--format=csv,noheader,nounits"], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NodeFailure(f"nvidia-smi did not answer in {timeout_s:g} s", hint="its driver may hang") from None
    except OSError as error:
        raise NodeFailure(f"{program}: {error.strerror}") from None
    if "No devices were found" in done.stdout:
        return []
    if done.returncode != 0:
        raise NodeFailure(f"nvidia-smi failed: {(done.stderr or done.stdout).strip()[:300]}")
    return sorted((_parse(line) for line in done.stdout.splitlines() if line.strip()), key=lambda gpu: gpu.index)


def utilization(timeout_s: float = NVIDIA_SMI_S) -> dict[str, int]:
    """UUID -> per cent of the time busy; of GPUs that say it. Raises NodeFailure when nvidia-smi hangs or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    import subprocess

    try:
        done = subprocess.run([program, "--query-gpu=uuid,utilization.gpu", "--format=csv,noheader,nounits"],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NodeFailure(f"nvidia-smi did not answer in {timeout_s:g} s", hint="its driver may hang") from None
    except OSError as error:
        raise NodeFailure(f"{program}: {error.strerror}") from None
    rows = ([field.strip() for field in line.split(",")] for line in done.stdout.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def choose(gpus: Sequence[Gpu], wanted: int, allowed: Sequence[int] | None) -> tuple[Gpu, ...]:
    """Of these GPUs the ones with the least memory in use, lowest index first. Raises Unusable when there are too few.
    """
    by_use = sorted(usable(gpus, wanted, allowed), key=lambda gpu: (gpu.used_mb // _SAME_MB, gpu.index))
    return tuple(sorted(by_use[:wanted], key=lambda gpu: gpu.index))


def usable(gpus: Sequence[Gpu], wanted: int, allowed: Sequence[int] | None) -> list[Gpu]:
    """Those that the job may have at all, free or not. Raises Unusable when they can never be enough."""
    found = [gpu for gpu in gpus if allowed is None or gpu.index in allowed]
    if len(found) < wanted:
        of = "" if allowed is None else f" (of the indices {sorted(allowed)} that cluster.yaml allows)"
        raise Unusable(f"the job asks for {wanted} GPU{'s' * (wanted > 1)}, this node has {len(found)}{of}",
                       hint="choose another node, or fewer GPUs with --gpus")
    return found


def allocated(gpus: Sequence[Gpu], wanted: int, env: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs of this host that SLURM gave the job: the allocation is the lease. None without an nvidia-smi.

    Where SLURM hides the others, nvidia-smi shows the job's alone, numbered from 0, and SLURM's numbers are of no use;
    elsewhere those count. CUDA_VISIBLE_DEVICES is either, so it names no GPU. Raises Unusable when there are too few.
    """
    given = granted(env)
    if not gpus:
        return ()
    if not given:  # a cluster that does not count GPUs
        return choose(gpus, wanted, None)
    found = list(gpus) if len(gpus) <= len(given) else [gpu for gpu in gpus if gpu.index in given]
    if len(found) < wanted:
        raise Unusable(f"the job asks for {wanted} GPU{'s' * (wanted > 1)}, SLURM gave it {len(found)} on this node",
                       hint="let --gpus agree with gres: or gpus-per-node: in cluster.yaml or the stage file")
    return tuple(found[:wanted])


def granted(env: Mapping[str, str]) -> list[int]:
    """SLURM's numbers of the GPUs it gave to the job on this node: of `0,2-4` [0, 2, 3, 4]."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS") or ""):
        found += range(int(first), int(last or first) + 1)
    return found


def in_use(chosen: Sequence[Gpu], timeout_s: float = NVIDIA_SMI_S) -> list[str]:
    """Who computes on these GPUs, in words for a person: before a job starts, that is somebody else."""
    if not chosen:
        return []
    from cluster.node.gpu_users import gpu_users

    try:
        users = gpu_users(timeout_s)
    except NodeFailure:
        return []
    numbers = {gpu.uuid: gpu.index for gpu in chosen}
    return [f"{one.told()} uses GPU {numbers[one.uuid]}, which SLURM gave to this job"
            for one in users if one.uuid in numbers]


def used_mb(uuids: Sequence[str]) -> int:
    """Memory in use on these GPUs together, whoever uses it. Raises NodeFailure."""
    return sum(gpu.used_mb for gpu in list_gpus() if gpu.uuid in uuids)


def _parse(line: str) -> Gpu:
    try:
        index, uuid, total, used, driver, name = (field.strip() for field in line.split(",", 5))
        return Gpu(int(index), uuid, name, _megabytes(total), _megabytes(used), driver)
    except ValueError:
        raise NodeFailure(f"nvidia-smi said something unexpected: {line.strip()!r}") from None


def _megabytes(field: str) -> int:
    return int(float(field)) if field.replace(".", "").isdigit() else 0  # "[N/A]" where memory is shared with the CPU
