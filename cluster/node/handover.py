"""What one job takes over from another: named in its config, verified, and put where this node sees it.

    pretrained: ${phase1.checkpoints.best}     the checkpoint that phase1 marked as its best, else its newest
    pretrained: ${phase1.checkpoints.last}     the newest that verifies
    data: ${phase2.artifacts.samples}          artifacts/samples of phase2, by its manifest
    list: ${phase2.artifacts.samples/all.txt}  a file of it; the whole is verified, and fetched, all the same

A value that is exactly one of these becomes an absolute path in the attempt's config.yaml, at the start of every
attempt. `phase1` is the `label` of one of the spec's `after`.
"""
from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from cluster.contract import (
    BEST, MANIFEST, AttemptDir, BadArtifact, BadCheckpoint, RunDir, fingerprint, list_checkpoints, read_manifest,
    rename_new, sha256_file, verify_artifact, verify_checkpoint, write_atomically)
from cluster.errors import NodeFailure, Unusable
from cluster.node import process, resume
from cluster.spec import After, BadSpec, JobSpec

WHAT = r"checkpoints\.(?:last|best)|artifacts\.[^{}\n]+"
_VALUE = re.compile(r"(?<=[:-] )(['\"]?)\$\{([^{}\n]+?)\.(" + WHAT + r")\}\1(?=\n|$)")
_BLOCK = 1 << 20
_ASIDE = ".new-"  # so begins the name of what is still being fetched

Frame = tuple[dict[str, Any], bytes]


@dataclass(frozen=True)
class Offer:
    """Something of a job that verifies. `files`: the path below `path` (empty: `path` is the file) -> size, sha256."""

    job: str
    path: str
    fingerprint: str  # of its content, wherever it lies
    files: dict[str, dict[str, int | str]]
    step: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Input:
    """What a value of a config became, as `inputs.json` and `launch show` have it."""

    reference: str
    path: str
    fingerprint: str
    job: str
    step: int | None


def resolve(run: RunDir, attempt: AttemptDir, spec: JobSpec) -> list[str]:
    """Write the attempt's config.yaml and inputs.json -> notes for a person. Nothing to do is no notes.

    Raises Unusable: what is named is not there or does not verify; Unreachable and NodeFailure from the other node.
    """
    text = run.config.read_text(encoding="utf-8") if run.config.exists() else ""
    asked = references(text)
    if not asked:
        return []
    inputs = run.path.parent.parent / ".launch" / "inputs"
    offers = {(label, what): _taken(_source(spec, label, what), what, inputs) for label, what in asked}
    found = [Input(f"${{{label}.{what}}}", offer.path, offer.fingerprint, offer.job, offer.step)
             for (label, what), offer in offers.items()]
    new = filled(text, {asked: offer.path for asked, offer in offers.items()})
    write_atomically(attempt.config, new.encode())
    write_atomically(attempt.inputs, json.dumps([asdict(one) for one in found], indent=1).encode())
    return [note for offer in offers.values() for note in offer.notes] + [_told(one) for one in found]


def references(text: str) -> list[tuple[str, str]]:
    """(label, what) of every value of a config.yaml that another job is to give."""
    return list(dict.fromkeys((match[2], match[3]) for match in _VALUE.finditer(text)))


def filled(text: str, paths: Mapping[tuple[str, str], str]) -> str:
    """A config.yaml with the given (label, what) in their places; the others stay as they are."""
    return _VALUE.sub(lambda match: json.dumps(paths[match[2], match[3]], ensure_ascii=False)
                      if (match[2], match[3]) in paths else match[0], text)


def _told(one: Input) -> str:
    step = "" if one.step is None else f"step {one.step}, "
    return f"{one.reference} is {one.path} of {one.job} ({step}{one.fingerprint[:12]})"


def _source(spec: JobSpec, label: str, what: str) -> After:
    for after in spec.after:
        if after.label == label:
            return after
    raise Unusable(f"${{{label}.{what}}}: this job waits for no job called {label!r}",
                   hint="it must stand after a job to take something from it")


def _taken(source: After, what: str, inputs: Path) -> Offer:
    what, _, inside = what.partition("/")
    if source.peer:
        from cluster.node import peer

        request = {"op": "fetch", "run_dir": source.run_dir, "what": what}
        return _inside(receive(peer.stream(source.peer, request), inputs), inside)
    return _inside(offer(RunDir(Path(source.run_dir)), what), inside)


def _inside(whole: Offer, name: str) -> Offer:
    """The file `name` of what verified as a whole; empty: all of it."""
    if name and name not in whole.files:
        raise Unusable(f"{whole.job}: {Path(whole.path).name} holds no file {name}",
                       hint=f"what it left: launch show {whole.job}")
    return replace(whole, path=os.path.join(whole.path, name)) if name else whole


# --- what a job has to give ---------------------------------------------------------------------------------

def offer(run: RunDir, what: str) -> Offer:
    """`checkpoints.last`, `checkpoints.best` or `artifacts.NAME` of a job, verified. Raises Unusable."""
    kind, _, name = what.partition(".")
    if kind == "artifacts":
        return _artifact(run, name)
    if name == "best":
        return _best(run)
    return _last(run)


def _artifact(run: RunDir, name: str) -> Offer:
    path = run.artifacts / name
    if ".." in path.parts or not path.is_relative_to(run.artifacts):
        raise Unusable(f"artifacts.{name} leads out of the artifacts of {run.path.name}")
    try:
        files = verify_artifact(path).files
    except BadArtifact as error:
        raise Unusable(f"artifacts.{name} of {run.path.name} is not there or broken: {error}",
                       hint=f"what it left: launch show {run.path.name}") from None
    return Offer(run.path.name, str(path), fingerprint(files), files)


def _best(run: RunDir) -> Offer:
    """The marked one; without one that counts and verifies the newest, with a note."""
    try:
        marked = json.loads((run.checkpoints / BEST).read_bytes())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return _with_note(_last(run), f"{run.path.name} marked no checkpoint as its best: its last is taken")
    path = run.checkpoints / str(marked)
    if path not in resume.counting_checkpoints(run, _next_attempt(run)):
        return _with_note(_last(run), f"the best checkpoint of {run.path.name}, {marked}, is gone: its last is taken")
    try:
        manifest = verify_checkpoint(path)
    except BadCheckpoint as error:
        return _with_note(_last(run), f"the best checkpoint of {run.path.name} is passed over: {error}")
    return Offer(run.path.name, str(path), fingerprint(manifest.files), manifest.files, manifest.step)


def _with_note(found: Offer, text: str) -> Offer:
    return replace(found, notes=(text, *found.notes))


def _last(run: RunDir) -> Offer:
    found = _newest(run)
    if found.path is None:
        why = "; ".join(found.notes) or "it wrote none"
        raise Unusable(f"{run.path.name} has no checkpoint that verifies: {why}",
                       hint=f"what it left: launch show {run.path.name}")
    path = Path(found.path)
    files = read_manifest(path).files if (path / MANIFEST).exists() else hashed(path)
    return Offer(run.path.name, str(path), fingerprint(files), files, found.step, found.notes)


def _newest(run: RunDir) -> resume.Resume:
    """By the job's own rule: a program that knows nothing of launch has checkpoints too."""
    if list_checkpoints(run.checkpoints):
        return resume.newest_verified(run, resume.counting_checkpoints(run, _next_attempt(run)))
    try:
        spec = JobSpec.from_json(run.spec.read_bytes())
    except (OSError, BadSpec) as error:
        raise Unusable(f"{run.spec} cannot be read: {error}") from None
    if spec.resume_rule.kind != "glob":
        return resume.Resume()
    cwd = run.code / Path(spec.cwd or "").expanduser() if run.code.is_dir() or spec.cwd else run.path
    return resume.newest_by_glob(run, _next_attempt(run), 0, spec.resume_rule, str(cwd), os.environ)


def _next_attempt(run: RunDir) -> int:
    attempts = run.attempts()
    return attempts[-1].number + 1 if attempts else 0


def hashed(path: Path) -> dict[str, dict[str, int | str]]:
    """The files of something that has no manifest, as one would name them."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {"" if file == path else file.relative_to(path).as_posix():
            {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in found}


# --- from one node to another -------------------------------------------------------------------------------

def frames(request: dict[str, Any]) -> Iterator[Frame]:
    """The answer to `fetch`: the offer, then its files in blocks, then the end. Raises Unusable."""
    found = offer(RunDir(Path(request["run_dir"])), request["what"])
    yield {"offer": asdict(found)}, b""
    path = Path(found.path)
    names = [*found.files, *([MANIFEST] if (path / MANIFEST).exists() and MANIFEST not in found.files else [])]
    for name in names:
        with open(path / name if name else path, "rb") as file:
            while True:
                block = file.read(_BLOCK)
                yield {"file": name, "n": len(block)}, block
                if len(block) < _BLOCK:
                    break
    yield {"end": {}}, b""


def place(request: dict[str, Any], payload: BinaryIO) -> dict[str, Any]:
    """What a client carried here: frames, each header a line, its body behind it -> {path}."""
    inputs = Path(request["workdir"]).expanduser() / ".launch" / "inputs"
    return {"path": receive(_carried(io.BufferedReader(payload)), inputs).path}  # type: ignore[arg-type]


def _carried(stream: IO[bytes]) -> Iterator[Frame]:
    while line := stream.readline():
        header = json.loads(line)
        yield header, stream.read(header.get("n", 0))


def receive(arriving: Iterable[Frame], inputs: Path) -> Offer:
    """Put what `frames` sends below `inputs`, under its job and the fingerprint of its content -> the offer as it is
    here. (Two jobs can leave the same bytes; their manifests still name each its own.)

    What is there already is not fetched again. Raises NodeFailure: it did not arrive as it was offered.
    """
    stream = iter(arriving)
    header, _ = next(stream)
    found = Offer(**{name: tuple(value) if isinstance(value, list) else value
                     for name, value in header["offer"].items()})
    name = PurePosixPath(found.path).name
    place = inputs / f"{found.job}-{name}-{found.fingerprint[:16]}"
    if not place.is_dir():
        inputs.mkdir(parents=True, exist_ok=True)
        _clear(inputs)
        who = f"{process.hostname()}-{os.getpid()}-{process.start_time(os.getpid())}"
        aside = inputs / f"{_ASIDE}{who}-{time.monotonic_ns()}"
        try:
            _store(stream, found, aside / name)
            with contextlib.suppress(FileExistsError):  # somebody else was faster with the same
                rename_new(aside, place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return replace(found, path=str(place / name))


def _clear(inputs: Path) -> None:
    """Remove what fetches of this host left that were killed."""
    for path in inputs.glob(f"{_ASIDE}{process.hostname()}-*-*-*"):
        _, pid, started, _ = path.name.rsplit("-", 3)
        if not process.alive(int(pid), int(started)):
            shutil.rmtree(path, ignore_errors=True)


def _store(stream: Iterator[Frame], found: Offer, path: Path) -> None:
    writer = _Writer(found, path)
    for header, body in stream:
        if "end" in header:
            break
        if "file" in header:
            writer.take(header["file"], body)
    writer.close()


class _Writer:
    """Writes the files one after the other and hashes what it writes."""

    def __init__(self, found: Offer, path: Path) -> None:
        self._found, self._path = found, path
        self._open: tuple[str, IO[bytes], Any] | None = None
        self._seen: set[str] = set()

    def take(self, name: str, block: bytes) -> None:
        import hashlib  # loads OpenSSL, as everything here that hashes does

        if self._open is None or self._open[0] != name:
            self._finish()
            self._open = (name, self._file(name), hashlib.sha256())
        self._open[1].write(block)
        self._open[2].update(block)

    def _file(self, name: str) -> IO[bytes]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise NodeFailure(f"{self._found.job} offers a file that leads out of what it offers: {name!r}")
        path = self._path / name if name else self._path
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "xb")

    def _finish(self) -> None:
        if self._open is None:
            return
        name, file, digest = self._open
        file.close()
        self._open = None
        self._seen.add(name)
        expected = self._found.files.get(name)
        if expected and digest.hexdigest() != expected["sha256"]:
            raise NodeFailure(f"{name or self._path.name} of {self._found.job} did not arrive as it was offered")

    def close(self) -> None:
        """Raises NodeFailure when a file is missing."""
        self._finish()
        if missing := sorted(set(self._found.files) - self._seen):
            raise NodeFailure(f"{missing[0] or self._path.name} of {self._found.job} did not arrive")
