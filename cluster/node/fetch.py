"""The files of a run directory, for who fetches them: a list of what fits a pattern, then bytes and hashes.

    artifacts/…          what is meant without a pattern
    samples, *.ply       a name without `/`: anywhere below artifacts/, and at the top of the run directory
    checkpoints/step-*   a path with `/`: below the run directory or below artifacts/; `**` is any number of directories
    checkpoints.best     the best or the last checkpoint, verified first

A directory means all that is in it.
"""
from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from cluster.contract import MANIFEST, RunDir
from cluster.errors import Unusable

BLOCK = 256 << 10  # bytes of a frame at most, and of memory
KEEPALIVE_S = 5.0
_VERIFIED = ("checkpoints.best", "checkpoints.last")
_NOT_OFFERED = ("control",)

Frame = tuple[dict[str, Any], bytes]


# --- what there is ------------------------------------------------------------------------------------------

def files(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """-> {files: [[path, size, mtime_ns, sha256 or None]], left_out: [words], has: {directory: [files, bytes]}}.

    A hash is there where a manifest names it. `has` is what a person could have meant when nothing fits.
    """
    run = RunDir(Path(request["run_dir"]))
    if not run.path.is_dir():
        raise Unusable(f"there is no run directory {run.path}", hint="launch status --rescan forgets what is gone")
    there, left_out = _walk(run.path)
    fits = matcher(_meant(run, request.get("pattern") or ""))
    wanted = [path for path in sorted(there) if fits(path)]
    hashes = _Hashes(run.path)
    return {"files": [[path, there[path].st_size, there[path].st_mtime_ns, hashes.of(path)] for path in wanted],
            "left_out": [words for path, words in left_out if fits(path)],
            "has": {} if wanted else _overview(there)}


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a path below the run directory is meant by a pattern."""
    words = [word for word in pattern.split("/") if word not in ("", ".")]
    anywhere = ["**", *words] if len(words) == 1 else words

    def fits(path: str) -> bool:
        parts = path.split("/")
        inside = parts[0] == "artifacts"
        return inside if not words else _fits(parts, words) or inside and _fits(parts[1:], anywhere)

    return fits


def _fits(parts: list[str], words: list[str]) -> bool:
    if not words:
        return True
    if words[0] == "**":
        return _fits(parts, words[1:]) or bool(parts) and _fits(parts[1:], words)
    return bool(parts) and fnmatchcase(parts[0], words[0]) and _fits(parts[1:], words[1:])


def _meant(run: RunDir, pattern: str) -> str:
    """`checkpoints.best` as the path of that checkpoint. Raises Unusable: there is none that verifies."""
    if pattern not in _VERIFIED:
        return pattern
    from cluster.node import handover
    path = Path(handover.offer(run, pattern).path)
    if not path.is_relative_to(run.path):
        raise Unusable(f"{pattern} of {run.path.name} is {path}, which is not in its run directory")
    return path.relative_to(run.path).as_posix()


def _walk(top: Path) -> tuple[dict[str, os.stat_result], list[tuple[str, str]]]:
    """Every file that can be fetched, and words about what cannot. Links to files are followed."""
    there: dict[str, os.stat_result] = {}
    left_out: list[tuple[str, str]] = []
    for directory, names, found in os.walk(top):
        below = Path(directory).relative_to(top)
        names[:] = [name for name in names if _offered(below / name)]
        for name in [*found, *(name for name in names if os.path.islink(os.path.join(directory, name)))]:
            path = below / name
            if not _offered(path):
                continue
            try:
                info = os.stat(top / path)
            except OSError as error:
                left_out.append((path.as_posix(), f"{path}: {error.strerror}"))
                continue
            if stat.S_ISREG(info.st_mode):
                there[path.as_posix()] = info
            else:
                kind = "a link to a directory" if stat.S_ISDIR(info.st_mode) else "no plain file"
                left_out.append((path.as_posix(), f"{path}: {kind}"))
    return there, left_out


def _offered(path: Path) -> bool:
    """Not the supervisor's own, nor a checkpoint that is being written."""
    own = path.parts[:2] if path.parts[0] == "checkpoints" else path.parts[:1]
    return path.parts[0] not in _NOT_OFFERED and not any(part.startswith(".") for part in own)


class _Hashes:
    """What the manifests of artifacts and checkpoints say about their files."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, path: str) -> str | None:
        parts = path.split("/")
        if parts[0] not in ("artifacts", "checkpoints") or len(parts) < 3:
            return None
        return self._manifest("/".join(parts[:2])).get("/".join(parts[2:]))

    def _manifest(self, directory: str) -> dict[str, Any]:
        if directory not in self._known:
            try:
                named = json.loads((self._top / directory / MANIFEST).read_bytes())["files"]
                self._known[directory] = {name: entry["sha256"] for name, entry in named.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self._known[directory] = {}
        return self._known[directory]


def _overview(there: dict[str, os.stat_result]) -> dict[str, list[int]]:
    """artifacts/NAME and the other directories of a run -> [files, bytes]."""
    found: dict[str, list[int]] = {}
    for path, info in sorted(there.items()):
        parts = path.split("/")
        name = "/".join(parts[:2 if parts[0] == "artifacts" else 1])
        count, size = found.get(name, (0, 0))
        found[name] = [count + 1, size + info.st_size]
    return found


# --- their bytes --------------------------------------------------------------------------------------------

def frames(request: dict[str, Any]) -> Iterator[Frame]:
    """The answer to `pull` {run_dir, files: [[path, offset, size]]}: each file from its offset to its size.

        {"file": number, "n": bytes} + n bytes                      the last of a file has its "sha256", from byte 0
        {"file": number, "problem": words}                          it cannot be read any more
        {"keepalive": unix seconds}                                 what the reader has already is being hashed
        {"end": {}}

    What is appended to a file later is left out: a log can be fetched while it is written.
    """
    top = Path(request["run_dir"])
    for number, (name, offset, size) in enumerate(request["files"]):
        try:
            with open(top / name, "rb") as file:
                for header, body in _read(file, offset, size):
                    yield header if "keepalive" in header else {"file": number, **header}, body
        except OSError as error:
            yield {"file": number, "problem": error.strerror or str(error)}, b""
    yield {"end": {}}, b""


def _read(file: IO[bytes], offset: int, size: int) -> Iterator[Frame]:
    import hashlib  # loads OpenSSL, which most questions do without

    digest = hashlib.sha256()
    at, spoke = 0, time.monotonic()
    while at < size:
        block = file.read(min(BLOCK, size - at, offset - at if at < offset else size))
        if not block:
            yield {"problem": f"it has become shorter: {at} bytes, it had {size}"}, b""
            return
        digest.update(block)
        at += len(block)
        if at > offset and at < size:
            yield {"n": len(block)}, block
        elif at <= offset and time.monotonic() - spoke > KEEPALIVE_S:
            spoke = time.monotonic()
            yield {"keepalive": time.time()}, b""
    last = block if size > offset else b""
    yield {"n": len(last), "sha256": digest.hexdigest()}, last
