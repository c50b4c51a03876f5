"""Requests from clients to a living supervisor: files in control/, created in one step. Both sides are here."""
from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from cluster.contract import RunDir, write_atomically
from cluster.errors import Unusable
from cluster.events import Reason
from cluster.spec import BadSpec, JobSpec


@dataclass(frozen=True)
class Stop:
    """Stop, for good when a person asks (`kill`); `now` means without a grace."""

    by: str
    why: Literal["kill", "time limit", "scheduler", "superseded", "guard"] = "kill"
    grace_s: float | None = None
    now: bool = False
    t: float = 0.0
    reason: Reason | None = None  # of the scheduler, as far as it is known


@dataclass(frozen=True)
class Restart:
    """Stop and start the next attempt, with another spec or config when they are given (as text)."""

    by: str
    t: float = 0.0
    grace_s: float | None = None
    spec: str | None = None
    config: str | None = None
    code_digest: str | None = None
    reason: Reason | None = None  # when no person asks for it


T = TypeVar("T", Stop, Restart)


def ask(run: RunDir, request: Stop | Restart) -> bool:
    """Leave a request; False when the same was asked before. A `now` replaces a plain stop."""
    path = run.control / ("stop" if isinstance(request, Stop) else "restart")
    content = json.dumps(asdict(request)).encode()
    run.control.mkdir(mode=0o700, exist_ok=True)
    if isinstance(request, Stop) and request.now:
        write_atomically(path, content)
        return True
    aside = run.control / f".{path.name}.{os.getpid()}.{time.monotonic_ns()}"
    aside.write_bytes(content)
    try:
        os.link(aside, path)  # fails when it is there, unlike rename
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    return True


class Control:
    """The supervisor's side: what is new in control/."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._seen: dict[str, tuple[int, int]] = {}
        self._kept: set[str] = set()

    def new_requests(self) -> list[Stop | Restart]:
        """Requests not returned before. One that cannot be read is still one: somebody asked."""
        found: list[Stop | Restart] = []
        for name, kind in (("stop", Stop), ("restart", Restart)):
            try:
                info = os.stat(self._run.control / name)
            except OSError:
                continue
            mark = (info.st_ino, info.st_mtime_ns)
            if self._seen.get(name) != mark:
                self._seen[name] = mark
                found.append(_read(self._run.control / name, kind))
        return found

    def discard(self) -> None:
        """Remove every request: they were meant for a supervisor that is gone."""
        for name in ("stop", "restart"):
            (self._run.control / name).unlink(missing_ok=True)

    def keep(self, *names: str) -> None:
        """Leave these requests, seen or not, to the supervisor that comes after this one."""
        self._kept.update(names)

    def consume(self) -> None:
        """Remove what was seen, so that the next attempt does not meet it; what came after stays."""
        for name, mark in self._seen.items():
            if name in self._kept:
                continue
            path = self._run.control / name
            try:
                info = os.stat(path)
                if (info.st_ino, info.st_mtime_ns) == mark:
                    path.unlink()
            except OSError:
                continue
        self._seen.clear()


def _read(path: Path, kind: type[T]) -> T:
    try:
        raw = json.loads(path.read_bytes())
        return kind(**{name: raw[name] for name in kind.__dataclass_fields__ if name in raw})
    except (OSError, ValueError, TypeError):
        return kind(by="unknown")


class BadRequest(Exception):
    """A restart request whose spec is not readable; the message says why."""


def install(run: RunDir, request: Restart) -> None:
    """Make the request's spec and config those of the job. The code follows in `install_code`.

    Raises BadRequest and changes nothing when the spec is not one of ours.
    """
    if request.spec is not None:
        try:
            JobSpec.from_json(request.spec.encode())
        except BadSpec as error:
            raise BadRequest(f"the restart's spec is not usable: {error}") from None
        write_atomically(run.spec, request.spec.encode())
    if request.config is not None:
        write_atomically(run.config, request.config.encode())


def install_code(run: RunDir, digest: str | None) -> None:
    """Put the snapshot `digest` in place of the job's code/; None leaves it as it is.

    Raises Unusable when this node does not have it.
    """
    if digest is None:
        return
    source = run.path.parent.parent / ".launch" / "code" / digest
    if not source.is_dir():
        raise Unusable(f"the code {digest[:12]} is not on this node",
                       hint="repeat the restart: it sends the code again")
    fresh, old = run.path / ".code-new", run.path / ".code-old"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, fresh, symlinks=True)
    if run.code.exists():
        run.code.rename(old)
    fresh.rename(run.code)
    shutil.rmtree(old, ignore_errors=True)
