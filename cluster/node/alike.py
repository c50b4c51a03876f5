"""What must be the same on every node of a job, before anything is started."""
from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.errors import NodeFailure
from cluster.node import described, worktree
from cluster.spec import JobSpec

_ASK_S = 120.0  # a Python on a cold network file system
_NAMES = {"code": "the code", "python": "Python", "torch": "torch", "cuda": "torch's CUDA", "nccl": "NCCL"}


def facts(run: RunDir, spec: JobSpec, cwd: str, python: str | None, env: Mapping[str, str]) -> dict[str, Any]:
    """A digest of the code, and for a torchrun job the versions of Python, torch and NCCL that it will have.

    Raises NodeFailure: the job's Python cannot say them.
    """
    found: dict[str, Any] = {"code": _code_digest(run, spec, cwd)}
    if spec.kind != "torchrun" or python is None:
        return found
    try:
        done = subprocess.run([python, "-c", described.source()], env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=_ASK_S)
        return found | json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise NodeFailure(f"{python} cannot say which versions it has: {error}") from None


def differences(of: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What differs, and who has what; None: nothing. `of`: name of the node -> its facts."""
    told = []
    for key, what in _NAMES.items():
        values = {name: facts.get(key) for name, facts in of.items()}
        if len(set(values.values())) > 1:
            told.append(f"{what}: " + ", ".join(f"{value or 'none'} on {name}" for name, value in values.items()))
    if not told:
        return None
    return "the nodes are not alike: " + "; ".join(told) + "\n  they need one environment and one view of the workdir"


def _code_digest(run: RunDir, spec: JobSpec, cwd: str) -> str | None:
    if spec.cwd is not None and not run.code.is_dir():
        state = worktree.state(Path(cwd))
        return None if state is None else hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for path in sorted(run.code.rglob("*")):
        if "__pycache__" in path.parts or path.is_dir() or not path.is_file():
            continue
        digest.update(f"{path.relative_to(run.code)}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]
