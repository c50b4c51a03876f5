"""What `launch init` wants to know of a machine that it meets for the first time, and who shares a workdir."""
from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from cluster.contract import write_atomically
from cluster.errors import ClusterError
from cluster.node import environment, gpu_users, gpus, lingering, process, slurm_tools
from cluster.node.census import disk

_SINFO_S = 10.0
_SEEN_BY = "seen-by"  # in <workdir>/.launch: a file of each machine that looked, for as long as init runs


def survey(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """The machine, and `token`: the path of a file that another machine which shares the workdir can read."""
    workdir = Path(request["workdir"]).expanduser()
    user = gpu_users.user_name(os.getuid())
    found, problem = _gpus()
    return {
        "hostname": process.hostname(), "boot_id": process.boot_id(), "user": user,
        "python": platform.python_version(), "executable": sys.executable, **_modules(),
        "gpus": found, "gpu_problem": problem, "disk": disk(workdir), "token": _leave_token(workdir, request["token"]),
        "conda": _conda_environments(), "slurm": _slurm(),
        "kills_at_logout": lingering.kills_at_logout(), "lingers": lingering.lingers(user)}


def sees(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """{seen: those of `tokens` (path -> content) that are here too}; `forget`: this machine's own, which goes."""
    seen = [path for path, content in request["tokens"].items() if _read(path) == content]
    if request.get("forget"):
        Path(request["forget"]).unlink(missing_ok=True)
    return {"seen": seen}


def _modules() -> dict[str, bool]:
    """Which of these the Python has: the agent itself runs without its site-packages, so it is asked anew."""
    code = "import importlib.util as u; print(*(int(u.find_spec(n) is not None) for n in ('psutil', 'submitit')))"
    psutil, submitit = (lingering.said([sys.executable, "-I", "-c", code]).split() or ["0", "0"])[:2]
    return {"psutil": psutil == "1", "submitit": submitit == "1"}


def _gpus() -> tuple[list[dict[str, Any]], str]:
    if not gpus.has_driver():
        return [], ""
    try:
        return [{"name": gpu.name, "memory_mb": gpu.memory_mb} for gpu in gpus.list_gpus()], ""
    except ClusterError as error:
        return [], error.what


def _leave_token(workdir: Path, content: str) -> str:
    directory = workdir / ".launch" / _SEEN_BY
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / content
    write_atomically(path, content.encode(), 0o600)
    return str(path.resolve())


def _conda_environments() -> list[str]:
    """Their names; none without a conda in the usual places."""
    for place in environment.CONDA_BASES:
        base = Path(place).expanduser()
        if (base / "etc" / "profile.d" / "conda.sh").is_file():
            return sorted(path.name for path in (base / "envs").glob("*") if (path / "bin" / "python").exists())
    return []


def _slurm() -> dict[str, Any] | None:
    """{cluster, machines, partitions, default}; None: no sinfo here, or one that nobody answers."""
    if shutil.which("sinfo") is None:
        return None
    try:
        said = slurm_tools.run(["sinfo", "-h", "-a", "-N", "-o", "%N|%P"], _SINFO_S)
        config = slurm_tools.run(["scontrol", "show", "config"], _SINFO_S)
    except slurm_tools.SlurmFailed:
        return None
    rows = [line.split("|") for line in said.split()]
    name = re.search(r"(?m)^ClusterName\s*=\s*(\S+)", config)
    partitions = list(dict.fromkeys(row[1] for row in rows if len(row) == 2))
    return {"cluster": name[1] if name else "", "machines": sorted({row[0] for row in rows}),
            "partitions": [one.rstrip("*") for one in partitions],
            "default": next((one.rstrip("*") for one in partitions if one.endswith("*")), None)}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None
