"""A job goes to another node that does not see its run directory: what goes with it, and what stays behind.

Its spec, config, code, attempts and last verified checkpoint go; artifacts and older checkpoints stay, beside a mark
`moved_to` that says where the job is now. A client carries the bytes: the list of the files is part of its request,
their contents follow one after the other, and then the sha256 of each as the node that sent it read it.
"""
from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cluster.contract import BadCheckpoint, RunDir, list_checkpoints, rename_new, verify_checkpoint, write_atomically
from cluster.errors import NodeFailure, Refused
from cluster.node import resume
from cluster.node.agent import FREE_BYTES, checked_workdir
from cluster.node.submit import token_file, write_token
from cluster.node.view import read_view
from cluster.states import ENDED_WORDS

DIGEST = 64  # letters of a sha256
_BLOCK = 1 << 20
_ASIDE = ".moving-"
_PLAIN = ("spec.json", "config.yaml")
_TREES = ("code", "attempts")


def leave_token(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """A file beside the run directory that only a node which shares it can read -> {path}; `sees` removes it."""
    path = Path(request["run_dir"]).parent / f".seen-{request['token']}"
    write_atomically(path, request["token"].encode(), mode=0o600)
    return {"path": str(path)}


def luggage(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """What goes with a job that has ended -> {files: [[path, size, mode, mtime_ns]], links: [[path, target]],
    directories, checkpoint, step, attempts, stays}. `stays`: what does not go, in words.
    """
    run = RunDir(Path(request["run_dir"]))
    best = resume.newest_verified(run, resume.counting_checkpoints(run, len(run.attempts())))
    checkpoint = Path(best.path) if best.path else None
    tops = [run.path / name for name in (*_PLAIN, *_TREES)] + ([checkpoint] if checkpoint else [])
    files, links, directories = _contents(run.path, [top for top in tops if top.exists()])
    return {"files": files, "links": links, "directories": directories, "step": best.step,
            "checkpoint": checkpoint.name if checkpoint else None, "attempts": len(run.attempts()),
            "stays": _staying(run, checkpoint)}


def _contents(top: Path, chosen: Iterable[Path]) -> tuple[list[list[Any]], list[list[str]], list[str]]:
    files: list[list[Any]] = []
    links: list[list[str]] = []
    directories: list[str] = []
    waiting = list(chosen)
    while waiting:
        path = waiting.pop()
        name, info = path.relative_to(top).as_posix(), path.lstat()
        if stat.S_ISLNK(info.st_mode):
            links.append([name, os.readlink(path)])
        elif stat.S_ISDIR(info.st_mode):
            directories.append(name)
            waiting += path.iterdir()
        elif stat.S_ISREG(info.st_mode):
            files.append([name, info.st_size, stat.S_IMODE(info.st_mode), info.st_mtime_ns])
    return sorted(files), sorted(links), sorted(directories)


def _staying(run: RunDir, checkpoint: Path | None) -> list[str]:
    older = [path.name for path in list_checkpoints(run.checkpoints) if path != checkpoint]
    artifacts = sorted(path.name for path in run.artifacts.iterdir()) if run.artifacts.is_dir() else []
    return ([f"{len(older)} older checkpoint{'s' * (len(older) > 1)}"] if older else []) + \
        [f"artifacts/{name}" for name in artifacts]


# --- on the node where it goes on ---------------------------------------------------------------------------

def arrive(request: dict[str, Any], payload: BinaryIO) -> dict[str, Any]:
    """Take the job over: all of it, each file with its hash verified, or nothing -> {run_dir}.

    Raises Refused: another job is named so, or there is no room; NodeFailure: it did not arrive as it was sent.
    """
    workdir, bag = checked_workdir(request["workdir"]), request["luggage"]
    target = RunDir(workdir / "runs" / request["id"])
    _check_place(target, request["token"], sum(size for _, size, _, _ in bag["files"]))
    aside = workdir / "runs" / f"{_ASIDE}{request['id']}-{os.getpid()}"
    with token_file(workdir, request["token"]) as intent:
        try:
            _unpack(aside, bag, payload)
            aside.chmod(0o2750 if request["share"] == "group" else 0o700)
            _verify(RunDir(aside), bag["checkpoint"])
            _settle(RunDir(aside), target)
            write_token(intent, request["id"])
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return {"run_dir": str(target.path)}


def _check_place(target: RunDir, token: str, size: int) -> None:
    room = os.statvfs(target.path.parent)
    if room.f_bavail * room.f_frsize < size + FREE_BYTES:
        raise Refused(f"{target.path.parent}: {room.f_bavail * room.f_frsize / 1e9:.1f} GB free, the job brings "
                      f"{size / 1e9:.1f} GB", hint="free some space, or choose another node")
    if target.path.exists() and (_token_of(target) != token or not target.moved_to.exists()):
        raise Refused(f"there is a job {target.path.name} here already", hint="launch status --rescan shows it")


def _token_of(run: RunDir) -> str | None:
    try:
        return json.loads(run.spec.read_bytes())["token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _unpack(top: Path, bag: dict[str, Any], payload: BinaryIO) -> None:
    import hashlib  # loads OpenSSL, which most questions do without

    top.mkdir(mode=0o700)
    for name in ("control", "checkpoints", "artifacts", "attempts", *bag["directories"]):
        _inside(top, name).mkdir(parents=True, exist_ok=True)
    found = []
    for name, size, mode, mtime_ns in bag["files"]:
        digest, left = hashlib.sha256(), size
        with open(_inside(top, name), "xb") as file:
            while left:
                if not (block := payload.read(min(_BLOCK, left))):
                    raise NodeFailure(f"{name} did not arrive whole", hint="repeat the restart")
                file.write(block)
                digest.update(block)
                left -= len(block)
        os.chmod(top / name, mode)
        os.utime(top / name, ns=(mtime_ns, mtime_ns))
        found.append(digest.hexdigest())
    for name, target in bag["links"]:  # last: nothing is written through one
        _inside(top, name).symlink_to(target)
    for (name, *_), digest in zip(bag["files"], found):
        if _exactly(payload, DIGEST) != digest.encode():
            raise NodeFailure(f"{name} did not arrive as it was sent (sha256 differs)", hint="repeat the restart")


def _exactly(payload: BinaryIO, size: int) -> bytes:
    found = b""
    while len(found) < size and (block := payload.read(size - len(found))):
        found += block
    return found


def _inside(top: Path, name: str) -> Path:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise NodeFailure(f"the job brings a file that leads out of its directory: {name!r}")
    return top / name


def _verify(run: RunDir, checkpoint: str | None) -> None:
    try:
        if checkpoint:
            verify_checkpoint(run.checkpoints / checkpoint)
    except BadCheckpoint as error:
        raise NodeFailure(f"the checkpoint does not verify here: {error}", hint="repeat the restart") from None


def _settle(new: RunDir, target: RunDir) -> None:
    """Where the job comes back to a node that it had left, what it left behind there is its own again."""
    if not target.path.exists():
        rename_new(new.path, target.path)
        return
    for kind in ("checkpoints", "artifacts"):
        for old in (target.path / kind).iterdir() if (target.path / kind).is_dir() else ():
            if not (new.path / kind / old.name).exists():
                old.rename(new.path / kind / old.name)
    before = target.path.with_name(f"{_ASIDE}{target.path.name}-before-{time.monotonic_ns()}")
    target.path.rename(before)
    new.path.rename(target.path)
    shutil.rmtree(before, ignore_errors=True)


# --- on the node that it leaves -----------------------------------------------------------------------------

def leave(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Mark the run directory: the job goes on as `to` {node, run_dir, by} says. Raises Refused: it has changed since
    its `attempts` were carried away.
    """
    from cluster.node.restart import one_at_a_time

    run = RunDir(Path(request["run_dir"]))
    with one_at_a_time(run, run.path.name):
        view = read_view(run)
        if view["state"] not in ENDED_WORDS or len(run.attempts()) != request["attempts"]:
            raise Refused(f"{run.path.name} was started again meanwhile; it stays here",
                          hint=f"see it with: launch status {run.path.name}")
        write_atomically(run.moved_to, json.dumps({**request["to"], "t": time.time()}).encode())
    return {}


def refuse_moved(view: dict[str, Any]) -> None:
    """Raises Refused for a job that goes on elsewhere."""
    if moved := view.get("moved_to"):
        raise Refused(f"{view['id']} was moved to {moved['node']}", hint=f"launch status {view['id']} finds it there")
