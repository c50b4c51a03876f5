"""Answers the questions of clients. Short-lived: one question, one answer; the truth is in the run
directories.
"""
from __future__ import annotations

import dataclasses
import importlib
import os
import pwd
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cluster.errors import ClusterError, Refused, Unusable, explain
from cluster.node import process

FREE_BYTES = 1_000_000_000  # a submit is refused below these
FREE_INODES = 10_000

# op -> module and function; loaded when asked, because every question pays for every import
_OPS = {
    "prepare": ("cluster.node.agent", "prepare"), "check": ("cluster.node.check_deep", "check"),
    "machines": ("cluster.node.machines", "answer"),
    "submit": ("cluster.node.submit", "submit"), "find": ("cluster.node.submit", "find"),
    "submit_array": ("cluster.node.submit", "submit_array"),
    "status": ("cluster.node.view", "status"), "show": ("cluster.node.details", "show"),
    "metrics": ("cluster.node.details", "metrics"), "doctor": ("cluster.node.doctor", "doctor"),
    "compare": ("cluster.node.comparing", "compare"), "commits": ("cluster.node.comparing", "commits"),
    "code_files": ("cluster.node.comparing", "code_files"), "code_texts": ("cluster.node.comparing", "code_texts"),
    "join": ("cluster.node.joining", "join"), "revive": ("cluster.node.joining", "revive"),
    "kill_all": ("cluster.node.kill", "kill_all"),
    "discard": ("cluster.node.measured", "discard"),
    "reach": ("cluster.node.peer", "reach"), "place": ("cluster.node.handover", "place"),
    "leave_token": ("cluster.node.move", "leave_token"), "luggage": ("cluster.node.move", "luggage"),
    "arrive": ("cluster.node.move", "arrive"), "leave": ("cluster.node.move", "leave"),
    "adopt": ("cluster.node.adopt", "adopt"), "census": ("cluster.node.census", "census"),
    "processes": ("cluster.node.census", "processes"), "survey": ("cluster.node.survey", "survey"),
    "sees": ("cluster.node.survey", "sees"),
    "files": ("cluster.node.fetch", "files"), "prune": ("cluster.node.prune", "prune"),
    "kill": ("cluster.node.kill", "kill"), "restart": ("cluster.node.restart", "restart"),
}


def answer(request: dict[str, Any], payload: BinaryIO) -> dict[str, Any]:
    """The answer to one request. A failure that is a person's or the machine's is an `error` object, never an
    exception.
    """
    if request.get("op") not in _OPS:
        return failure(Unusable(f"this agent knows no question {request.get('op')!r}"))
    module, function = _OPS[request["op"]]
    try:
        return getattr(importlib.import_module(module), function)(request, payload)
    except ClusterError as error:
        return failure(error)
    except OSError as error:
        what, hint = explain(error, f"{request['op']} failed")
        return {"error": {"exit_code": 1, "what": what, "hint": hint}}


def failure(error: ClusterError) -> dict[str, Any]:
    return {"error": {"exit_code": error.exit_code, "what": error.what, "hint": error.hint}}


def prepare(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """What a submit must know before it packs: room, Python, GPUs, and which of the client's files are seen
    here too.
    """
    workdir = checked_workdir(request["workdir"], bool(request.get("force")))
    from cluster.node import room  # a status does without
    free = room.of(workdir)
    digest = request.get("code_digest")
    return {
        "hostname": process.hostname(), "boot_id": process.boot_id(), "user": _user(),
        "home": str(Path.home()), "workdir": str(workdir), "python": sys.executable,
        "have_code": bool(digest) and (workdir / ".launch" / "code" / str(digest)).is_dir(),
        "free_bytes": free.bytes, "free_inodes": free.inodes,
        "stats": {path: _stat(path) for path in request.get("stat", ())},
        "gpus": _gpus(), **(_busy(request["busy"] == "shared") if request.get("busy") else {}),
        "slurm": _forecast(workdir, request), **_measured(workdir, request.get("cost")),
        "unknown_secrets": _unknown(workdir, request.get("secrets", ())),
        "now": time.time(), "found": _quick_check(request.get("check")),
        "env_problem": _cwd_problem(request.get("cwd")) or _env_problem(request.get("need_python") or {}),
    }


def checked_workdir(given: str, force: bool = False) -> Path:
    """The workdir as an absolute path, made when it is not there. Raises Refused: it cannot take a job, or (unless
    `force`) has little room left.
    """
    workdir = Path(given).expanduser()
    if not workdir.is_absolute():
        raise Unusable(f"workdir {given!r} is not an absolute path",
                       hint="correct `workdir:` in cluster.yaml")
    import tempfile

    from cluster.node import room
    try:
        for directory, mode in ((workdir, 0o777), (workdir / ".launch", 0o700), (workdir / "runs", 0o777)):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
            os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=directory))
        free = room.of(workdir)
    except OSError as error:
        raise Refused(*_words(error, f"the workdir {workdir} cannot take a job")) from None
    if not force:
        room.check(free, workdir, FREE_BYTES, FREE_INODES)
    return workdir


def _words(error: OSError, doing: str) -> tuple[str, None, str | None]:
    what, hint = explain(error, doing)
    return what, None, hint


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container without this account
        return os.environ.get("USER") or str(os.getuid())


def _stat(path: str) -> list[int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return [info.st_ino, info.st_size, info.st_mtime_ns]


def _gpus() -> list[dict[str, Any]]:
    from cluster.node import gpus
    if not gpus.has_driver():
        return []
    return [{"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name, "memory_mb": gpu.memory_mb,
             "used_mb": gpu.used_mb} for gpu in gpus.list_gpus()]


def _unknown(workdir: Path, names: Sequence[str]) -> list[str]:
    """Those of these secrets that have no value here."""
    from cluster.node import environment
    known, _ = environment.read_secrets(workdir, tuple(names))
    return [name for name in names if name not in known]


def _quick_check(asked: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not asked:
        return []
    from cluster.node import check
    return check.quick(asked)


def _measured(workdir: Path, asked: dict[str, Any] | None) -> dict[str, Any]:
    """What is known here about a job of the work `asked["work"]`, and how many samples its lists name."""
    if not asked:
        return {}
    from cluster.node import measured
    found = measured.newest(workdir, asked["work"])
    return {"measured": dataclasses.asdict(found) if found else None,
            "counts": {path: measured.count(path) for path in asked["lists"]}}


def _busy(shared: bool) -> dict[str, Any]:
    """-> {busy: UUID -> who has that GPU, line: who waits for some}, in words for a person."""
    from cluster.node import gpus, lease, leasing
    from cluster.node.gpu_users import gpu_users
    if not gpus.has_driver():
        return {"busy": {}, "line": []}
    return {"busy": leasing.in_the_way(gpus.list_gpus(), gpu_users(), shared),
            "line": [one.told() for one in lease.tickets() if one.waits]}


def _forecast(workdir: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """What SLURM says to a job (`slurm_spec`) that it would be given. Raises ClusterError: it refuses."""
    if not request.get("slurm_spec"):
        return None
    from cluster.node import sbatch, submit
    found = sbatch.forecast(submit.read_spec(request["slurm_spec"]), workdir, submit.agent_of(request))
    return dataclasses.asdict(found)


def _cwd_problem(cwd: str | None) -> dict[str, Any] | None:
    if cwd is None or Path(cwd).expanduser().is_dir():
        return None
    return failure(Unusable(f"--cwd {cwd}: there is no such directory on {process.hostname()}"))["error"]


def _env_problem(asked: dict[str, Any]) -> dict[str, Any] | None:
    """Why the environment of the jobs cannot be used here. Only looked at, not activated: that takes conda
    seconds.
    """
    from cluster.node import environment
    from cluster.spec import PythonEnv
    python = PythonEnv(**asked)
    try:
        if python.kind == "conda":
            environment.conda_base(python.conda_base)
        else:
            environment.activate(python, os.environ)
    except ClusterError as error:
        return failure(error)["error"]
    return None
