"""The run directory: the one place where the launcher, the supervisor and the training code meet.

Only names and the definition of a verified checkpoint live here. Standard library only: this file is carried to nodes
and imported by training code.

    <workdir>/runs/<job-id>/
      spec.json  config.yaml  slurm.json  adopted.json  code/  control/  artifacts/
      attempts/000/   journal.jsonl heartbeat.json metrics.jsonl env.json spec.json config.yaml inputs.json
                      gpu_use.jsonl ranks/ logs/ evidence/
                      node-1.jsonl node-1.heartbeat.json node-1.env.json … by the supervisors of the other nodes
      team.json       where the supervisor of node 0 listens for those of the other nodes
      checkpoints/step-00000500-a000/   … manifest.json (written last)
      artifacts/NAME/   … manifest.json (written last), when another job may take it over
"""
from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# What the environment of a job says about its world. Nothing else does.
ENV_RUN_DIR = "LAUNCH_RUN_DIR"
ENV_JOB_ID = "LAUNCH_JOB_ID"
ENV_ATTEMPT = "LAUNCH_ATTEMPT"
ENV_CHECKPOINT_DIR = "LAUNCH_CHECKPOINT_DIR"
ENV_RESUME = "LAUNCH_RESUME"  # path of the verified checkpoint to resume from, or empty
ENV_TOKEN = "LAUNCH_TOKEN"  # in the environment of every process of the job: the second net for orphans
ENV_PREFIX = "LAUNCH_"

# Has our jobs write the stack of every thread to stderr. This signal harms nobody who does not know it: by itself it
# does nothing. SLURM sends USR1 and USR2 to whole jobs.
STACK_SIGNAL = signal.SIGURG

# In a metrics line t, step, applied, total, loss, lr, grad_norm, samples and epoch have a fixed meaning; event is
# resumed, stopped, checkpoint, skipped, eval, weights, gradients or done; every other key is a scalar of the job's own.

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
BEST = "best.json"  # in checkpoints/: {"checkpoint": name, …}, the one that `${job.checkpoints.best}` means
_CHECKPOINT_NAME = re.compile(r"step-(\d{8,})-a(\d{3,})")
_ATTEMPT_NAME = re.compile(r"\d{3,}")


@dataclass(frozen=True)
class AttemptDir:
    """`attempts/NNN`: written by this attempt's supervisors and ranks, by nobody else."""

    path: Path
    node: int = 0  # of several nodes: whose supervisor's files these are

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def journal(self) -> Path:
        return self.path / (f"node-{self.node}.jsonl" if self.node else "journal.jsonl")

    @property
    def heartbeat(self) -> Path:
        return self.path / (f"node-{self.node}.heartbeat.json" if self.node else "heartbeat.json")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def env(self) -> Path:
        return self.path / (f"node-{self.node}.env.json" if self.node else "env.json")

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def inputs(self) -> Path:
        """[{reference, path, fingerprint, job, step}]: what this attempt took over from other jobs."""
        return self.path / "inputs.json"

    @property
    def ranks(self) -> Path:
        """One `<global rank>.json` {pid, started} per rank, written by the rank shim before it becomes the program."""
        return self.path / "ranks"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def evidence(self) -> Path:
        """What its processes were doing when they stood still: stalled.txt, node-1.stalled.txt …"""
        return self.path / "evidence"

    @property
    def gpu_use(self) -> Path:
        """A line {t, busy: {UUID: per cent of the time}} every few minutes, of a job that has GPUs and makes steps."""
        return self.path / (f"node-{self.node}.gpu_use.jsonl" if self.node else "gpu_use.jsonl")

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    @property
    def agent(self) -> str:
        """The name of this node's torchrun; its output is logs/<name>.log."""
        return f"agent-{self.node}" if self.node else "agent"

    @property
    def agent_log(self) -> Path:
        return self.logs / f"{self.agent}.log"

    @property
    def supervisor_log(self) -> Path:
        return self.logs / (f"supervisor-{self.node}.log" if self.node else "supervisor.log")


@dataclass(frozen=True)
class RunDir:
    """`<workdir>/runs/<job-id>`."""

    path: Path

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def team(self) -> Path:
        """Where the supervisor of node 0 listens for those of the other nodes; not there on one node."""
        return self.path / "team.json"

    def member(self, node: int) -> Path:
        """{pid, pid_started, hostname, boot_id} of the supervisor of node `node` (from 1), while it waits or works."""
        return self.path / f".member-{node}.json"

    @property
    def slurm(self) -> Path:
        """{"ids": [SLURM's ids of this job, the newest last]}; not there without a scheduler."""
        return self.path / "slurm.json"

    @property
    def releases(self) -> Path:
        """A JSON line {t, id, by} for each time that SLURM held this job and was told to let it go."""
        return self.path / "releases.jsonl"

    @property
    def notified(self) -> Path:
        """A JSON line {t, key, to, ok, problem} for each time that somebody was told, or could not be."""
        return self.path / "notified.jsonl"

    @property
    def moved_to(self) -> Path:
        """{node, run_dir, by, t}: the job goes on there; what is left here is what did not go with it."""
        return self.path / "moved_to.json"

    @property
    def adopted(self) -> Path:
        """{pid, started, log, gpus}: what attempt 0 took over; only of a job whose program runs without launch."""
        return self.path / "adopted.json"

    def attempt(self, number: int, node: int = 0) -> AttemptDir:
        return AttemptDir(self.path / "attempts" / f"{number:03d}", node)

    def attempts(self) -> list[AttemptDir]:
        """Every attempt there is, oldest first."""
        try:
            names = os.listdir(self.path / "attempts")
        except FileNotFoundError:
            return []
        return [self.attempt(number) for number in sorted(int(n) for n in names if _ATTEMPT_NAME.fullmatch(n))]


def checkpoint_name(step: int, attempt: int) -> str:
    return f"step-{step:08d}-a{attempt:03d}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """`step-00000500-a002` -> (500, 2); anything else (a half-written `.tmp-…` too) -> None."""
    match = _CHECKPOINT_NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoint directories, newest first. Not yet verified.

    Newest is the highest step of the latest attempt: after a resume from further back, the higher steps of an older
    attempt belong to a branch that was left.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    parsed = [(found[1], found[0], name) for name in names if (found := parse_checkpoint_name(name))]
    return [directory / name for _, _, name in sorted(parsed, reverse=True)]


class BadCheckpoint(Exception):
    """A checkpoint that does not verify; the message says which file and why."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of; its last file to be written."""

    job: str
    attempt: int
    step: int
    resumed_from: str | None
    files: dict[str, dict[str, int | str]]  # path inside the checkpoint -> {"size": bytes, "sha256": hex}


def verify_checkpoint(path: Path, known: dict[str, str] | None = None) -> Manifest:
    """Check that every file of the checkpoint at `path` is the one its manifest names.

    `known` remembers files that were hashed before, by inode, size and mtime; it is read and added to, so a second look
    at an unchanged 3.5 GB file costs one stat.

    Raises BadCheckpoint: no manifest, unreadable manifest, a file missing, of another size or with another hash.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        _verify_file(path / name, expected, {} if known is None else known)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint. Raises BadCheckpoint when it is missing or not one of ours."""
    try:
        raw = json.loads((path / MANIFEST).read_bytes())
        if raw["version"] != MANIFEST_VERSION:
            raise BadCheckpoint(f"{path}: manifest version {raw['version']}, this launch reads {MANIFEST_VERSION}")
        return Manifest(raw["job"], raw["attempt"], raw["step"], raw["resumed_from"], raw["files"])
    except FileNotFoundError:
        raise BadCheckpoint(f"{path}: no {MANIFEST}, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path / MANIFEST}: not readable ({error})") from None


# --- artifacts that are handed over -------------------------------------------------------------------------

class BadArtifact(Exception):
    """An artifact that does not verify; the message says which file and why."""


@dataclass(frozen=True)
class ArtifactManifest:
    """What an artifact (a directory below artifacts/) consists of; its last file to be written."""

    job: str
    attempt: int
    files: dict[str, dict[str, int | str]]  # path inside the artifact -> {"size": bytes, "sha256": hex}


def write_artifact_manifest(path: Path, job: str, attempt: int) -> ArtifactManifest:
    """Make the directory `path` an artifact that other jobs can take over: name and hash every file in it.

    The last thing a job does with it; what is changed afterwards makes it fail to verify.
    """
    found = sorted(file for file in path.rglob("*") if file.is_file() and file != path / MANIFEST)
    files: dict[str, dict[str, int | str]] = {
        file.relative_to(path).as_posix(): {"size": file.stat().st_size, "sha256": sha256_file(file)}
        for file in found}
    content = {"version": MANIFEST_VERSION, "job": job, "attempt": attempt, "files": files}
    write_atomically(path / MANIFEST, json.dumps(content, indent=1).encode())
    return ArtifactManifest(job, attempt, files)


def verify_artifact(path: Path) -> ArtifactManifest:
    """Check that every file of the artifact at `path` is the one its manifest names. Raises BadArtifact."""
    try:
        raw = json.loads((path / MANIFEST).read_bytes())
        if raw["version"] != MANIFEST_VERSION:
            raise BadArtifact(f"{path}: manifest version {raw['version']}, this launch reads {MANIFEST_VERSION}")
        manifest = ArtifactManifest(raw["job"], raw["attempt"], raw["files"])
        for name, expected in manifest.files.items():
            _verify_file(path / name, expected, {})
    except FileNotFoundError:
        there = "it was never finished" if path.is_dir() else "it was never made"
        raise BadArtifact(f"{path}: no {MANIFEST}, so {there}") from None
    except BadCheckpoint as error:
        raise BadArtifact(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadArtifact(f"{path / MANIFEST}: not readable ({error})") from None
    return manifest


def fingerprint(files: Mapping[str, Mapping[str, int | str]]) -> str:
    """One name for the content that a manifest's `files` describe."""
    import hashlib  # loads OpenSSL; most who import this module never hash

    return hashlib.sha256("".join(f"{name}\0{files[name]['sha256']}\n" for name in sorted(files)).encode()).hexdigest()


def _verify_file(path: Path, expected: dict[str, int | str], known: dict[str, str]) -> None:
    try:
        info = path.stat()
        if info.st_size != expected["size"]:
            raise BadCheckpoint(f"{path}: {info.st_size} bytes, the manifest says {expected['size']}")
        key = f"{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"
        if known.get(key) != expected["sha256"]:
            digest = sha256_file(path)
            if digest != expected["sha256"]:
                raise BadCheckpoint(f"{path}: its content is not what was written (sha256 differs)")
            known[key] = digest
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror or error}") from None


def sha256_file(path: Path) -> str:
    import hashlib  # loads OpenSSL; most who import this module never hash

    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace `path` in one step: a reader sees the old content or the new, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def rename_new(source: Path, target: Path) -> None:
    """Give a directory its name. Raises FileExistsError when there is one of that name that is not empty: what the
    kernel says of that is another error on most file systems."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise FileExistsError(error.errno, error.strerror, str(target)) from None


def read_json_lines(path: Path) -> Iterator[dict]:
    """Every line of a JSON-lines file that parses to an object; a torn last line is normal and skipped.

    A file that is not there has no lines.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def merged_metrics(run: RunDir) -> list[dict]:
    """The metrics of all attempts as one series without a step twice."""
    return merged(read_json_lines(attempt.metrics) for attempt in run.attempts())


def merged(attempts: Iterable[Iterable[dict]]) -> list[dict]:
    """The metrics lines of attempts, oldest first, as one series.

    The newest attempt wins from its resume step on: the step of its `resumed` line (always the first one our trainer
    writes), or for a program that writes none, the step before its first line. Of that step itself it may only have
    evaluated again. `resumed` lines are left out.
    """
    series: list[dict] = []
    for attempt in attempts:
        lines = [line for line in attempt if isinstance(line.get("step"), int)]
        if lines:
            start = lines[0]["step"] if lines[0].get("event") == "resumed" else lines[0]["step"] - 1
            again = any(line["step"] == start and line.get("event") == "eval" for line in lines)
            series = [line for line in series if line["step"] < start
                      or line["step"] == start and not (again and line.get("event") == "eval")]
            series += [line for line in lines if line.get("event") != "resumed"]
    return series
