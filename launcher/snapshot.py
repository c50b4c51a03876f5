"""The code of a job: the files of a work tree, named by their content, packed for a node that lacks them.

In a git work tree: what is tracked, and what is new and not ignored, as it lies on disk; the commit, the
names of the new files and the patch against the commit are kept with it. Without git: every file.
`.launchignore` (rules of .gitignore) leaves files out, `.launchinclude` (one glob a line) adds ignored ones.
"""
from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from cluster.spec import CodeRef
from launcher.errors import LaunchError, TooBig, Wrong
from launcher.patterns import ignored, read_patterns

IGNORE, INCLUDE = ".launchignore", ".launchinclude"
PATCH = ".launch/uncommitted.patch"  # in the packed code: the difference between it and its commit
LIMIT_MB = 200
_MEMORY = 16 << 20  # a packed snapshot up to this size is never written to the client's disk
_MANY = 200_000  # files; a tree with more is not looked through to its end
_MTIME = 1_000_000_000  # every packed file's, so that the same content is the same archive


class Changed(LaunchError):
    """A file was edited between looking at it and packing it."""


@dataclass(frozen=True)
class File:
    path: str  # relative, with /
    size: int
    mode: int  # 0o755 or 0o644
    content: str  # sha256, or `-> target` of a symbolic link


@dataclass(frozen=True)
class Snapshot:
    """The files below `root` at one moment."""

    root: Path
    files: tuple[File, ...]
    patch: bytes
    code: CodeRef

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def pack(self) -> BinaryIO:
        """A tar.gz, to be closed; the same snapshot is always the same bytes. Raises Changed."""
        with ExitStack() as undo:
            archive = undo.enter_context(tempfile.SpooledTemporaryFile(_MEMORY))
            self._pack_into(archive)
            undo.pop_all()
        archive.seek(0)
        return archive  # type: ignore[return-value]

    def _pack_into(self, archive: IO[bytes]) -> None:
        with gzip.GzipFile("", "wb", 6, archive, mtime=0) as packed, \
                tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for file in self.files:
                self._add(tar, file)
            if self.patch:
                tar.addfile(_entry(PATCH, 0o644, len(self.patch)), io.BytesIO(self.patch))

    def _add(self, tar: tarfile.TarFile, file: File) -> None:
        entry = _entry(file.path, file.mode, file.size)
        if file.content.startswith("-> "):
            entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, file.content[3:], 0
            tar.addfile(entry)
            return
        try:
            with open(self.root / file.path, "rb") as source:
                content = source.read(file.size)  # what was there when it was looked at: a log may grow meanwhile
        except OSError as error:
            raise Changed(f"{file.path}: {error.strerror} while it was packed") from None
        if hashlib.sha256(content).hexdigest() != file.content:
            raise Changed(f"{file.path} was changed while it was packed",
                          hint=f"submit again; if it always changes, name it in {IGNORE}")
        tar.addfile(entry, io.BytesIO(content))


def take(root: Path, only: Iterable[str] | None = None) -> Snapshot:
    """The snapshot of the tree at `root`; `only`: nothing but these entries of it.

    Raises TooBig, and Wrong for what cannot be read.
    """
    git = _git_state(root)
    listed = _all_files(root) if git is None else git.files
    names = set(_without_ignored(root, listed)) | set(_included(root))
    if only is not None:
        tops = frozenset(only)
        names = {name for name in names if name.split("/", 1)[0] in tops}
    _check_size(root, names)
    files = tuple(file for name in sorted(names) if (file := _look_at(root, name)))
    patch = b"" if git is None or not git.dirty else git.patch()
    digest = hashlib.sha256(hashlib.sha256(patch).digest())
    for file in files:
        digest.update(os.fsencode(f"{file.path}\0{file.mode:o}\0{file.content}\n"))
    code = CodeRef(digest.hexdigest(), *(() if git is None else (git.sha, git.dirty, git.untracked)))
    return Snapshot(root, files, patch, code)


def work_tree(start: Path) -> Path | None:
    """The root of the git work tree around `start`."""
    return next((above for above in (start, *start.parents) if (above / ".git").exists()), None)


@dataclass(frozen=True)
class _Git:
    root: Path
    files: tuple[str, ...]  # tracked and new, relative to root
    sha: str | None
    dirty: bool
    untracked: tuple[str, ...]

    def patch(self) -> bytes:
        against = self.sha or "--cached"
        return _git(self.root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "--relative", against)


def _git_state(root: Path) -> _Git | None:
    tree = work_tree(root)
    if tree is None:
        return None
    listing = _start_git(root, "ls-files", "-z", "--cached")
    status = _start_git(root, "status", "--porcelain=v2", "--branch", "-z", "--no-renames",
                        "--untracked-files=all", "--ignore-submodules=none", "--", ".")
    if listing is None or status is None:
        return None
    tracked = [name for name in _finish(listing, root).split("\0") if name]
    records = _finish(status, root).split("\0")
    prefix = "" if root == tree else root.relative_to(tree).as_posix() + "/"
    untracked = [record[2:].removeprefix(prefix) for record in records if record.startswith("? ")]
    oid = next((record.split()[2] for record in records if record.startswith("# branch.oid ")), "(initial)")
    files = tuple(_with_nested(root, [*tracked, *untracked]))
    dirty = any(record[:2] in ("1 ", "2 ", "u ") for record in records)
    return _Git(root, files, None if oid == "(initial)" else oid, dirty, tuple(sorted(untracked)))


def _with_nested(root: Path, names: list[str]) -> Iterator[str]:
    """Submodules and other work trees inside this one are listed by git as one name each."""
    for name in names:
        path = root / name
        if path.is_symlink() or not path.is_dir():
            yield name
        elif (path / ".git").exists() and (inner := _git_state(path)):
            yield from (f"{name.rstrip('/')}/{below}" for below in inner.files)


def _start_git(root: Path, *args: str) -> subprocess.Popen[bytes] | None:
    env = {**os.environ, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        return subprocess.Popen(["git", "-C", str(root), *args], env=env, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:  # no git on this computer: the tree is taken as plain files
        return None


def _finish(process: subprocess.Popen[bytes], root: Path) -> str:
    return os.fsdecode(_output(process, root))


def _output(process: subprocess.Popen[bytes], root: Path) -> bytes:
    out, err = process.communicate()
    if process.returncode:
        said = err.decode(errors="replace").strip() or f"exit code {process.returncode}"
        raise Wrong(f"git cannot read this work tree: {said}", str(root))
    return out


def _git(root: Path, *args: str) -> bytes:
    process = _start_git(root, *args)
    return b"" if process is None else _output(process, root)


def _all_files(root: Path) -> Iterator[str]:
    seen = 0
    for folder, folders, names in os.walk(root):
        seen += len(names)
        if seen > _MANY:
            raise TooBig(f"more than {_MANY:,} files lie here, and no git that says which matter", str(root),
                         "start from the directory that holds your code, or use --cwd")
        folders[:] = [name for name in folders if name not in (".git", "__pycache__")]
        below = Path(folder).relative_to(root)
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from ((below / name).as_posix() for name in [*names, *links])


def _without_ignored(root: Path, names: Iterable[str]) -> Iterator[str]:
    try:
        patterns = read_patterns((root / IGNORE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        patterns = []
    except (OSError, ValueError) as error:
        raise Wrong(str(error), str(root / IGNORE)) from None
    for name in names:
        if not (patterns and ignored(name, patterns)):
            yield name


def _included(root: Path) -> Iterator[str]:
    try:
        lines = (root / INCLUDE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise Wrong(str(error), str(root / INCLUDE)) from None
    for line in (line.strip() for line in lines):
        if line and not line.startswith("#"):
            yield from _matches(root, line)


def _matches(root: Path, line: str) -> Iterator[str]:
    if ".." in Path(line).parts:
        raise Wrong(f"{line!r} leads out of the tree", str(root / INCLUDE))
    found = list(root.glob(line.strip("/")))
    if not found:
        raise Wrong(f"{line!r} matches no file", str(root / INCLUDE), "mend or remove the line")
    for path in found:
        inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else (path,)
        files = (each for each in inside if each.is_symlink() or not each.is_dir())
        yield from (each.relative_to(root).as_posix() for each in files)


def _check_size(root: Path, names: Iterable[str]) -> None:
    limit = int(float(os.environ.get("LAUNCH_CODE_LIMIT_MB") or LIMIT_MB) * 1e6)
    sizes: list[tuple[int, str]] = []
    for name in names:
        try:
            sizes.append((os.lstat(root / name).st_size, name))
        except OSError:
            continue  # deleted, but still in git's list
    if (total := sum(size for size, _ in sizes)) > limit:
        largest = sorted(sizes, reverse=True)[:5]
        listed = "".join(f"\n    {size / 1e6:8.1f} MB  {name}" for size, name in largest)
        raise TooBig(f"the code to copy is {total / 1e6:.0f} MB in {len(sizes)} files, the limit is "
                     f"{limit / 1e6:.0f} MB", str(root),
                     f"name what the job does not need in {IGNORE} (the rules of .gitignore), "
                     f"or raise LAUNCH_CODE_LIMIT_MB, or use --cwd; the largest files:{listed}")


def _look_at(root: Path, name: str) -> File | None:
    """None for what is not there any more, and for sockets, pipes and devices."""
    path = root / name
    try:
        info = os.lstat(path)
        if stat.S_ISLNK(info.st_mode):
            return File(name, 0, 0o777, "-> " + os.readlink(path))
        if not stat.S_ISREG(info.st_mode):
            return None
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Wrong(f"cannot be read: {error.strerror}", str(path),
                    f"name it in {IGNORE} to leave it out") from None
    return File(name, len(content), 0o755 if info.st_mode & 0o100 else 0o644, hashlib.sha256(content).hexdigest())


def _entry(name: str, mode: int, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.mode, entry.size, entry.mtime = mode, size, _MTIME
    return entry
