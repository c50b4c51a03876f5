"""What `launch init` wants to know of a machine that it meets for the first time, and who shares a workdir."""
from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.contract import write_atomically
from cluster.errors import ClusterError
from cluster.node import environment, gpu_users, gpus, process, slurm_tools
from cluster.node.census import disk

_ASK_S = 5.0
_SINFO_S = 10.0
_LOGIND = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
_LOGIND_CONF = ("/usr/lib/systemd", "/usr/local/lib/systemd", "/run/systemd", "/etc/systemd")  # the later ones win
_SEEN_BY = "seen-by"  # in <workdir>/.launch: a file of each machine that looked, for as long as init runs


def survey(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """The machine, and `token`: the path of a file that another machine which shares the workdir can read."""
    workdir = Path(request["workdir"]).expanduser()
    found, problem = _gpus()
    return {
        "hostname": process.hostname(), "boot_id": process.boot_id(), "user": gpu_users.user_name(os.getuid()),
        "python": platform.python_version(), "executable": sys.executable, **_modules(),
        "gpus": found, "gpu_problem": problem, "disk": disk(workdir), "token": _leave_token(workdir, request["token"]),
        "conda": _conda_environments(), "lingers": _lingers(), "kills_at_logout": kills_at_logout(), "slurm": _slurm()}


def sees(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """{seen: those of `tokens` (path -> content) that are here too}; `forget`: this machine's own, which goes."""
    seen = [path for path, content in request["tokens"].items() if _read(path) == content]
    if request.get("forget"):
        Path(request["forget"]).unlink(missing_ok=True)
    return {"seen": seen}


def kills_at_logout() -> bool | None:
    """Whether logind ends what a login has started when that logs out (KillUserProcesses); None: nobody says.

    The running logind knows; where its bus is out of reach, its files do.
    """
    said = _said(["busctl", "get-property", *_LOGIND, "KillUserProcesses"])
    if said.startswith("b "):
        return said == "b true"
    for line in (*_conf_lines(), _said(["loginctl", "show-session", "--property=KillUserProcesses"])):
        if found := re.fullmatch(r"\s*KillUserProcesses\s*=\s*(\w+)\s*", line):
            return found[1].lower() in ("yes", "true", "on", "1")
    return None


def _conf_lines() -> Iterator[str]:
    """Of logind.conf and its drop-ins, those that count most first."""
    drop_ins = {path.name: path for place in _LOGIND_CONF for path in Path(place, "logind.conf.d").glob("*.conf")}
    mains = [path for place in reversed(_LOGIND_CONF) if (path := Path(place, "logind.conf")).is_file()][:1]
    for path in [*(drop_ins[name] for name in sorted(drop_ins, reverse=True)), *mains]:
        yield from reversed((_read(str(path)) or "").splitlines())


def _lingers() -> bool:
    """Whether this user's processes may stay after the last logout."""
    return Path("/var/lib/systemd/linger", gpu_users.user_name(os.getuid())).exists()


def _modules() -> dict[str, bool]:
    """Which of these the Python has: the agent itself runs without its site-packages, so it is asked anew."""
    code = "import importlib.util as u; print(*(int(u.find_spec(n) is not None) for n in ('psutil', 'submitit')))"
    psutil, submitit = (_said([sys.executable, "-I", "-c", code]).split() or ["0", "0"])[:2]
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


def _said(command: list[str]) -> str:
    """The first line of what a program prints; empty: it is not there, failed or hangs."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None
