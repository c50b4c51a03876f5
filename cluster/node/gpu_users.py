"""Which processes use the GPUs of this host: whose they are, since when, with how much memory.

The driver says pid and memory (through NVML where this Python has nvidia-ml-py, else by nvidia-smi), /proc says the
rest. A driver that hangs cannot be interrupted, so it is always asked in another process and for a limited time.
"""
from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import site
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import NodeFailure
from cluster.node import process

ASK_S = 20.0  # the first question after boot loads the driver
_QUERY = "--query-compute-apps=gpu_uuid,pid,used_memory,process_name"
_UNKNOWN = "?"
_NO_NVML = 3  # exit code: nvidia-ml-py is there, the library of the driver is not
_INTERPRETERS = re.compile(r"(python|bash|sh|node|perl|ruby|java)[\d.]*")
# The Python of the agent runs without site-packages, this one has them. Graphics processes pin memory too.
_NVML = f"""
import json, pynvml as nvml
try:
    nvml.nvmlInit()
except nvml.NVMLError:
    raise SystemExit({_NO_NVML})
found = {{}}
for number in range(nvml.nvmlDeviceGetCount()):
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    uuid = nvml.nvmlDeviceGetUUID(handle)
    uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
    for ask in (nvml.nvmlDeviceGetGraphicsRunningProcesses, nvml.nvmlDeviceGetComputeRunningProcesses):
        try:
            for one in ask(handle):
                found[uuid, one.pid] = one.usedGpuMemory
        except nvml.NVMLError:
            pass
print(json.dumps([[uuid, pid, used and used // 2**20] for (uuid, pid), used in found.items()]))
"""


@dataclass(frozen=True)
class GpuUser:
    """One process on one GPU. What another user's process does not show, or the driver does not know, is `?` or None.
    """

    uuid: str  # of the GPU
    pid: int
    user: str
    since: float | None  # unix seconds: the start of the process
    started: int | None  # the same in clock ticks after boot: with the pid, its identity
    memory_mb: int | None
    command: tuple[str, ...]  # as it was started

    @property
    def program(self) -> str:
        """The program's name: python of /usr/bin/python3.11 train.py."""
        name = os.path.basename(self.command[0]) if self.command else _UNKNOWN
        return found[1] if (found := _INTERPRETERS.fullmatch(name)) else name

    def told(self) -> str:
        """`kim pid 4242 python 71 GB since 14:02`."""
        words = [self.user, f"pid {self.pid}", self.program]
        if self.memory_mb is not None:
            words.append(gigabytes(self.memory_mb))
        if self.since is not None:
            words.append(f"since {clock(self.since)}")
        return " ".join(words)


def gpu_users(timeout_s: float = ASK_S) -> list[GpuUser]:
    """Every process on every GPU; none on a host without a driver. Raises NodeFailure: the driver hangs or fails."""
    booted = _booted_at()
    return [_described(uuid, pid, used_mb, booted) for uuid, pid, used_mb in _rows(timeout_s)]


def gigabytes(megabytes: float) -> str:
    return f"{megabytes / 1024:.0f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def clock(moment: float) -> str:
    """Local time; with the day when that is not today."""
    there = time.localtime(moment)
    today = there[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if today else "%d %b %H:%M", there)


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _described(uuid: str, pid: int, used_mb: int | None, booted: float) -> GpuUser:
    """A pid of 0 or of another container is nobody here."""
    found = process.read_process(pid) if pid > 0 else None
    if found is None:
        return GpuUser(uuid, pid, _UNKNOWN, None, None, used_mb, ())
    command = process.command_of(pid)
    words = tuple(command) if command != [""] else (found.name,)
    return GpuUser(uuid, pid, _owner(pid), booted + found.started / os.sysconf("SC_CLK_TCK"), found.started,
                   used_mb, words)


def _owner(pid: int) -> str:
    try:
        return user_name(os.stat(f"/proc/{pid}").st_uid)
    except OSError:
        return _UNKNOWN


def _booted_at() -> float:
    with open("/proc/uptime") as file:
        return time.time() - float(file.read().split()[0])


# --- what the driver says -----------------------------------------------------------------------------------

def _rows(timeout_s: float) -> list[tuple[str, int, int | None]]:
    """(UUID of the GPU, pid, MB or None), each pair once."""
    if has_nvml():
        said = _said([sys.executable, "-c", _NVML], timeout_s, (_NO_NVML,))
        if said is not None:
            return [(uuid, pid, used) for uuid, pid, used in json.loads(said)]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    said = _said([program, _QUERY, "--format=csv,noheader,nounits"], timeout_s) or ""
    rows = [_row(line) for line in said.splitlines() if line.startswith(("GPU-", "MIG-"))]
    return list({(uuid, pid): (uuid, pid, used) for uuid, pid, used in rows}.values())


def has_nvml() -> bool:
    """Whether the agent's Python has nvidia-ml-py, and the host an NVIDIA driver."""
    if not Path("/proc/driver/nvidia").exists():
        return False
    return any(os.path.exists(os.path.join(place, "pynvml.py")) for place in site.getsitepackages())


def _row(line: str) -> tuple[str, int, int | None]:
    try:
        uuid, pid, used, _ = (field.strip() for field in line.split(",", 3))
        return uuid, int(pid), int(used) if used.isdigit() else None  # "[N/A]"
    except ValueError:
        raise NodeFailure(f"nvidia-smi said something unexpected: {line.strip()!r}") from None


def _said(command: Sequence[str], timeout_s: float, silent: Sequence[int] = ()) -> str | None:
    """What the command prints; None when it ends with one of the `silent` exit codes."""
    import subprocess  # a host without a GPU does without

    name = os.path.basename(command[0])
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NodeFailure(f"{name} did not say in {timeout_s:g} s who uses the GPUs",
                          hint="its driver may hang") from None
    except OSError as error:
        raise NodeFailure(f"{command[0]}: {error.strerror}") from None
    if done.returncode in silent:
        return None
    if done.returncode:
        raise NodeFailure(f"{name} failed: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout
