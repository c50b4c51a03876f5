"""Fetches files of a run directory: from where a cut transfer stopped, each with its hash verified before it counts.

A file is written beside its place as `.NAME.part` and renamed when it is whole and its sha256 is that of the node
(and that of its manifest, where there is one). What is here already is compared, not fetched again.
"""
from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from cluster.errors import Unreachable, explain
from launcher.errors import Failed, Refused, Wrong, nearest

if TYPE_CHECKING:
    from cluster.backends.base import Backend
    from launcher.jobs import Job

_BACK_OFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
_GIVE_UP_S = 600.0  # without a byte
_BLOCK = 1 << 20
_SHOWN = 8  # of what a job has, when nothing fits

Progress = Callable[[int, int, str], None]  # bytes that are here, bytes in all, the file that arrives


@dataclass(frozen=True)
class Pulled:
    """What a pull did. A file's `path` is below `directory`."""

    job: str
    node: str
    directory: str
    files: list[dict[str, Any]]  # path, size, sha256: all that are here now, verified
    bytes: int  # of all of them
    fetched_bytes: int  # that had to travel
    already: int  # files that were here before
    left_out: list[str]
    problems: dict[str, str]  # path -> why it is not here
    differing: list[str] = field(default_factory=list)  # of the problems: files of the person's own in the way


@dataclass(frozen=True)
class Wanted:
    """A file as its node lists it. `sha256`: as its manifest has it, if there is one."""

    path: str
    size: int
    mtime_ns: int
    sha256: str | None


def pull(backend: Backend, job: Job, pattern: str | None, out: Path | None, force: bool, start: Path,
         tell: Callable[[str], None], progress: Progress) -> Pulled:
    """Fetch what fits `pattern` into `out`, or into a directory of the job's name in `start`.

    Raises Wrong and Failed when nothing fits; Refused: no room, or files that differ stand in `out`; Unreachable.
    """
    listing = backend.files(job.run_dir, pattern)
    wanted = [Wanted(*one) for one in listing["files"]]
    if not wanted:
        raise _nothing(job, pattern, listing)
    directory = start / (out or job.id)
    fetch = Fetch(backend, job, directory, wanted, out is not None and not force, tell, progress)
    fetch.check()
    fetch.run()
    return Pulled(job.id, job.node, str(directory), fetch.verified, sum(one["size"] for one in fetch.verified),
                  fetch.travelled, fetch.already, listing["left_out"], fetch.problems, fetch.differing)


def _nothing(job: Job, pattern: str | None, listing: dict[str, Any]) -> Wrong | Failed:
    """Why there is nothing to fetch, and what there would be."""
    has = listing["has"]
    told = [f"{name} ({_count(files)}, {size_of(size)})" for name, (files, size) in has.items()]
    more = ", …" if len(told) > _SHOWN else ""
    hint = f"it has: {', '.join(told[:_SHOWN])}{more}" if told else "its run directory is empty"
    if pattern is None:
        return Failed("it has left no artifacts", job.id, f"{hint}\n  fetch those by a pattern: launch pull {job.id} "
                      "'attempts/*/logs'" if has else hint)
    names = {name.rpartition("/")[2]: name for name in has}
    if close := nearest(pattern, [*names, *names.values()]):
        hint = f"nearest: {close}; {hint}"
    return Wrong(f"no file fits {pattern!r}" + "".join(f"; {words}" for words in listing["left_out"]), job.id, hint)


def _count(files: int) -> str:
    return f"{files} file{'' if files == 1 else 's'}"


def size_of(count: float) -> str:
    """`512 B`, `3.4 MB`, `120 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


class Fetch:
    """The transfer of some files, over as many connections as it takes."""

    def __init__(self, backend: Backend, job: Job, directory: Path, wanted: Sequence[Wanted], careful: bool,
                 tell: Callable[[str], None], progress: Progress, wait: Callable[[float], None] = time.sleep) -> None:
        self._backend, self._job, self._tell, self._progress, self._wait = backend, job, tell, progress, wait
        self._todo = {one.path: _File(one, directory, careful) for one in wanted}
        self._directory, self._careful = directory, careful
        self._total, self._done = sum(one.size for one in wanted), 0
        self.verified: list[dict[str, Any]] = []
        self.problems: dict[str, str] = {}
        self.differing: list[str] = []
        self.travelled = self.already = 0

    def check(self) -> None:
        """Raises Refused and Failed before anything is written."""
        for file in self._todo.values():
            if PurePosixPath(file.wanted.path).is_absolute() or ".." in PurePosixPath(file.wanted.path).parts:
                raise Failed(f"it offers a file that leads out of its run directory: {file.wanted.path!r}",
                             self._job.node)
        if self._careful and (others := [path for path, file in self._todo.items() if file.in_the_way()]):
            raise Refused(f"{_count(len(others))} of another size would be replaced: {', '.join(others[:_SHOWN])}"
                          + (", …" if len(others) > _SHOWN else ""), str(self._directory),
                          "name another directory with -o, or replace them with --force")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failed(explain(error, "the directory cannot be made")[0]) from None
        need = sum(file.wanted.size - file.begin() for file in self._todo.values())
        if need > (free := shutil.disk_usage(self._directory).free):
            raise Refused(f"{size_of(need)} are to be fetched and {size_of(free)} are free", str(self._directory),
                          "free some space, or name another directory with -o")

    def run(self) -> None:
        """Until every file is here or has a problem. Raises Unreachable after ten minutes without a byte."""
        losses, heard = 0, time.monotonic()
        while self._todo:
            before = self.travelled
            try:
                self._stream()
            except Unreachable as error:
                if self.travelled > before:
                    losses, heard = 0, time.monotonic()
                if time.monotonic() - heard > _GIVE_UP_S:
                    raise Unreachable(f"the link is lost and does not come back ({error.what})", self._job.node,
                                      "what has arrived is kept: the same command goes on with it") from None
                if losses == 0:
                    self._tell(f"the link is lost ({error.what}); trying again, from where it stopped")
                self._wait(_BACK_OFF_S[min(losses, len(_BACK_OFF_S) - 1)])
                losses += 1
            finally:
                for file in self._todo.values():
                    file.close()

    def _stream(self) -> None:
        """One connection: what is still to do, in its order; what did not verify is begun again by the next."""
        asked = list(self._todo.values())
        request = [[file.wanted.path, file.begin(), file.wanted.size] for file in asked]
        with closing(self._backend.pull(self._job.run_dir, request)) as frames:
            for header, body in frames:
                if "end" in header:
                    return
                if "file" not in header:
                    continue
                file = asked[header["file"]]
                self._take(file, header, body)
                self.travelled += len(body)
                under_way = file.arrived if file.wanted.path in self._todo else 0
                self._progress(self._done + under_way, self._total, file.wanted.path)

    def _take(self, file: _File, header: dict[str, Any], body: bytes) -> None:
        try:
            if "problem" in header:
                self._give_up(file, header["problem"])
                return
            file.take(body)
            if "sha256" in header:
                self._finish(file, header["sha256"])
        except OSError as error:
            what, _ = explain(error, f"{file.wanted.path} cannot be written")
            raise Failed(what, hint="what has arrived is kept: the same command goes on with it") from None

    def _finish(self, file: _File, sha256: str) -> None:
        match file.finish(sha256):
            case "verified":
                self._is_done(file)
                self.already += file.was_here
                self.verified.append({"path": file.wanted.path, "size": file.wanted.size, "sha256": sha256})
            case "differs":
                self.differing.append(file.wanted.path)
                self._give_up(file, "a file of that name is here and differs; --force replaces it")
            case "damaged":
                self._give_up(file, "its content is not what its manifest says (sha256 differs on the node)")
            case "changed":
                self._give_up(file, "its content changed while it was fetched, twice")

    def _give_up(self, file: _File, why: str) -> None:
        file.close()
        self._is_done(file)
        self.problems[file.wanted.path] = why

    def _is_done(self, file: _File) -> None:
        del self._todo[file.wanted.path]
        self._done += file.wanted.size


class _File:
    """One file: what of it is here, and where that is written and hashed."""

    def __init__(self, wanted: Wanted, directory: Path, careful: bool) -> None:
        self.wanted, self._careful = wanted, careful
        self._target = directory / wanted.path
        self._part = self._target.with_name(f".{self._target.name}.part")
        self._tries = 0
        self._open: IO[bytes] | None = None
        self._digest: Any = None
        self._compares = self._same_size()
        self.arrived = 0  # bytes that are here, as far as this connection knows
        self.was_here = False

    def in_the_way(self) -> bool:
        return self._target.exists() and not self._same_size()

    def begin(self) -> int:
        """From which byte on it is to be sent."""
        if self._compares:
            return self.wanted.size
        try:
            return min(self._part.stat().st_size, self.wanted.size)
        except FileNotFoundError:
            return 0

    def take(self, body: bytes) -> None:
        if self._open is None:
            self._begin()
        assert self._open
        if body:
            self._open.write(body)
            self._digest.update(body)
            self.arrived += len(body)

    def finish(self, sha256: str) -> str:
        """-> verified; again: it is fetched from its first byte; or why it is not to be had."""
        same = self._digest.hexdigest() == sha256
        self.close()
        if not same:
            return self._once_more()
        if self.wanted.sha256 not in (None, sha256):
            return "damaged"
        if self._compares:
            self.was_here = True
            return "verified"
        os.utime(self._part, ns=(self.wanted.mtime_ns, self.wanted.mtime_ns))
        os.replace(self._part, self._target)
        return "verified"

    def close(self) -> None:
        if self._open:
            self._open.close()
            self._open = None

    def _once_more(self) -> str:
        if self._compares and self._careful:
            return "differs"
        self._compares = False
        self._part.unlink(missing_ok=True)
        self._tries += 1
        self.arrived = 0
        return "again" if self._tries < 2 else "changed"

    def _begin(self) -> None:
        """Hash what is here; what arrives is appended to it."""
        offset = self.begin()
        self._digest = hashlib.sha256()
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._open = open(self._target, "rb") if self._compares else self._locked()
        left = offset
        while left and (block := self._open.read(min(_BLOCK, left))):
            self._digest.update(block)
            left -= len(block)
        if not self._compares:
            self._open.truncate(offset)
        self.arrived = offset

    def _locked(self) -> IO[bytes]:
        file = open(os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise Refused("another launch pull is fetching it", str(self._target), "wait for that one") from None
        return file

    def _same_size(self) -> bool:
        return self._target.is_file() and self._target.stat().st_size == self.wanted.size
