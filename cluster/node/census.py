"""What there is on this host and who uses it: GPUs and whose processes are on them, disk, load, this user's jobs and
programs.
"""
from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import ClusterError
from cluster.node import gpu_users, gpus, lease, process, trees
from cluster.node.gpu_users import GpuUser
from cluster.node.process import Proc

GPUS_S = 1.5  # a client waits less than 3 s for all of it, and has to get here first
_PROGRAMS = re.compile(r"python[\d.]*|torchrun|accelerate|deepspeed|pt_main_thread|ray|julia|matlab|ipython[\d.]*")
_OF_LAUNCH = ("/.launch/agent/", "cluster.node", "launcher.cli")  # in a command line: agents, supervisors and clients

T = TypeVar("T")


def census(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """The host as `launch nodes` shows it. `gpu_problem` and `slurm_problem`: why a part of it is not known."""
    workdir = Path(request["workdir"]).expanduser()
    table = process.process_table()
    found, problem = _gpus(table)
    machines, slurm_problem = _machines() if request.get("slurm") else ([], "")
    return {
        "hostname": process.hostname(), "user": gpu_users.user_name(os.getuid()), "t": time.time(),
        "gpus": found, "gpu_problem": problem, "disk": disk(workdir), "load": list(os.getloadavg()),
        "cpus": os.cpu_count() or 0, "memory": _memory(), "jobs": _jobs(table),
        "machines": machines, "slurm_problem": slurm_problem}


def processes(_request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """{processes}: every process on a GPU, then this user's programs that use none; `job`: ours."""
    table = process.process_table()
    adopted = trees.adopted_pids(table)
    users = gpu_users.gpu_users()
    index = {gpu.uuid: gpu.index for gpu in gpus.list_gpus()} if users else {}
    on_gpus = [_used(one, table, adopted) | {"gpu": index.get(one.uuid)} for one in users]
    on_gpus.sort(key=lambda one: (one["gpu"] is None, one["gpu"], one["pid"]))
    return {"processes": [*on_gpus, *_programs(table, adopted, {one.pid for one in users})]}


def disk(path: Path) -> dict[str, Any]:
    """Of the file system that a directory is, or will be, on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    room = os.statvfs(path)
    return {"path": str(path), "free_bytes": room.f_bavail * room.f_frsize,
            "total_bytes": room.f_blocks * room.f_frsize,
            "free_inodes": room.f_favail if room.f_files else None}  # btrfs counts none


# --- GPUs ---------------------------------------------------------------------------------------------------

def _gpus(table: dict[int, Proc]) -> tuple[list[dict[str, Any]], str]:
    """Every GPU with its users. What the driver does not say in time is None; -> also why."""
    if not gpus.has_driver():
        return [], ""
    questions: list[Callable[[], Any]] = [
        lambda: gpus.list_gpus(GPUS_S), lambda: gpu_users.gpu_users(GPUS_S),
        lambda: gpus.utilization(GPUS_S)]
    with ThreadPoolExecutor(len(questions)) as pool:
        (listed, wrong), (users, unknown), (busy, _) = pool.map(_or_why, questions)
    adopted, held = trees.adopted_pids(table), lease.holders() if listed else {}
    return [{
        "index": gpu.index, "uuid": gpu.uuid, "name": gpu.name, "memory_mb": gpu.memory_mb, "used_mb": gpu.used_mb,
        "leases": [{"job": one.claim.job, "user": one.user, "since": one.since} for one in held.get(gpu.uuid, ())],
        "utilization": (busy or {}).get(gpu.uuid),
        "users": None if users is None else [_used(one, table, adopted) for one in users if one.uuid == gpu.uuid],
    } for gpu in listed or ()], wrong or unknown


def _or_why(question: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return question(), ""
    except ClusterError as error:
        return None, error.what



def _used(one: GpuUser, table: dict[int, Proc], adopted: dict[int, str]) -> dict[str, Any]:
    return {"pid": one.pid, "user": one.user, "since": one.since, "memory_mb": one.memory_mb,
            "program": one.program, "command": list(one.command),
            "mine": trees.owner(one.pid) == os.getuid(), "job": trees.job_of(one.pid, table, adopted)}


# --- the rest -----------------------------------------------------------------------------------------------

def _jobs(table: dict[int, Proc]) -> list[dict[str, Any]]:
    """This user's jobs whose supervisors live here."""
    from cluster.node import view
    own = [one for one in table.values() if trees.owner(one.pid) == os.getuid()]
    runs = {str(run.path) for one in own if (run := process.supervised_by(one))}
    found = view.status({"jobs": sorted(runs), "asked_at": None}, None)["jobs"]
    return [{key: one[key] for key in ("id", "name", "state", "gpus")} for one in found]


def _machines() -> tuple[list[dict[str, Any]], str]:
    from cluster.node import machines
    try:
        return [asdict(one) for one in machines.machines()], ""
    except ClusterError as error:
        return [], error.what


def _memory() -> dict[str, int]:
    said = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return {"total_mb": int(said["MemTotal"].split()[0]) >> 10,
            "available_mb": int(said.get("MemAvailable", "0 kB").split()[0]) >> 10}


def _programs(table: dict[int, Proc], adopted: dict[int, str], shown: set[int]) -> list[dict[str, Any]]:
    """This user's programs in Python and the like, one line each; without those that are on a GPU, and launch's own."""
    roots: dict[int, Proc] = {}
    for one in table.values():
        if trees.owner(one.pid) == os.getuid() and _is_program(one):
            root = trees.root_of(one.pid, table)
            roots[root.pid] = root
    covered = trees.above(os.getpid(), table)  # what runs this agent
    found = []
    for root in sorted(roots.values(), key=lambda one: one.started):
        command = process.command_of(root.pid)
        living = trees.Tree(root.identity).living()
        if root.pid in covered or _is_launch(command) or shown & {one.pid for one in living}:
            continue
        covered |= {one.pid for one in living}
        found.append({
            "gpu": None, "pid": root.pid, "user": gpu_users.user_name(os.getuid()), "since": _began(root),
            "memory_mb": round(sum(one.rss_mb for one in living)), "program": root.name, "command": command,
            "mine": True, "job": trees.job_of(root.pid, table, adopted)})
    return found


def _is_program(one: Proc) -> bool:
    words = process.command_of(one.pid)
    return any(_PROGRAMS.fullmatch(name) for name in (one.name, os.path.basename(words[0]) if words else ""))


def _is_launch(command: Sequence[str]) -> bool:
    return any(mark in word for word in command[:6] for mark in _OF_LAUNCH) or \
        any(os.path.basename(word) == "launch" for word in command[:2])


def _began(one: Proc) -> float:
    """Unix seconds."""
    with open("/proc/uptime") as file:
        return time.time() - float(file.read().split()[0]) + one.started / os.sysconf("SC_CLK_TCK")
