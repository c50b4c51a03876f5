"""What is carried to a node: one zip with the contract and cluster/node/, named by its content.

It needs Python >= 3.10 and the standard library, so nothing has to be fetched or built for a node. Where jobs go to
SLURM, its login node has submitit too.
"""
from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cluster.node import install

CARRIED = ("__init__", "contract", "spec", "events", "states", "journal", "errors", "backends/__init__",
           "backends/slurm")
_MAIN = b"""\
import sys

from cluster.node.__main__ import main

sys.exit(main())
"""
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Agent:
    content: bytes  # a zip that Python can run
    digest: str  # first 16 hex digits of its sha256


@functools.cache
def pack() -> Agent:
    """The agent of the installed package. The same sources are always the same bytes."""
    package = Path(__file__).parent
    files = {f"cluster/{name}.py": package / f"{name}.py" for name in CARRIED}
    files |= {f"cluster/node/{path.name}": path for path in (package / "node").glob("*.py")}
    content = _zip({"__main__.py": _MAIN} | {name: path.read_bytes() for name, path in files.items()})
    return Agent(content, hashlib.sha256(content).hexdigest()[:16])


def agent_dir(workdir: str) -> str:
    """Where the unpacked agent is on a node, below its workdir as cluster.yaml gives it."""
    return f"{workdir.rstrip('/')}/.launch/agent/{pack().digest}"


def install_here(workdir: Path) -> Path:
    """Put the agent into a workdir of this computer -> its directory. Raises OSError."""
    directory = Path(agent_dir(str(workdir)))
    if not directory.is_dir():
        install.install(str(directory), pack().content)
    return directory


def _zip(files: dict[str, bytes]) -> bytes:
    """Sorted, with fixed times and stored plainly: no zlib version decides about the digest."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _FIXED_TIME)
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name])
    return buffer.getvalue()
