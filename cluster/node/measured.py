"""What jobs took, and what others like them will take.

    <workdir>/.launch/measured.jsonl   one line per attempt that was long enough, written when it has ended

A job is like another when both have the same `Cost.work`: the sizes of the network, the batch, the ranks. What is
measured is taken from the metrics that the job wrote; a program that writes none is not measured.
"""
from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.contract import AttemptDir, RunDir, list_checkpoints, read_json_lines
from cluster.errors import ClusterError, Refused
from cluster.node import lines, process
from cluster.spec import Cost, JobSpec
from cluster.states import ENDED_WORDS

FEWEST = 4  # updates: fewer of a job that did not go to its end say little
_TAIL = 1 << 20  # bytes of the file that are looked at
_FRAMES = "opencv_cameras.json"


@dataclass(frozen=True)
class Measure:
    """One attempt. Seconds; bytes."""

    work: str
    job: str
    t: float  # unix s
    host: str
    device: str  # the GPU's name; CPU
    complete: bool  # it went to its end
    steps: int  # done in this attempt
    step_s: float  # the middle one; 0: it has no steps of equal length
    start_s: float  # until the first step or evaluation began
    evaluation_s: float
    end_s: float  # after the last step and evaluation
    val_samples: int | None
    checkpoint_bytes: int  # of one, without the files that all share
    shared_bytes: int
    artifact_bytes: int
    gpu_peak_mb: float = 0.0  # of rank 0's GPU; 0: none, or a program that does not say


@dataclass(frozen=True)
class Expected:
    seconds: float
    disk_bytes: float


def path_of(workdir: Path) -> Path:
    return workdir / ".launch" / "measured.jsonl"


# --- measuring ----------------------------------------------------------------------------------------------

def record(run_dir: str, number: int, launched_at: float, gpus: Sequence[str]) -> str:
    """One more line when the attempt says enough -> why none could be written; empty: all is well."""
    run = RunDir(Path(run_dir))
    attempt = run.attempt(number)
    try:
        spec = JobSpec.from_json(attempt.spec.read_bytes())
        if found := measure(run, attempt, spec, launched_at, time.time(), _device(gpus)):
            with open(path_of(run.path.parent.parent), "ab") as file:
                file.write(json.dumps(asdict(found), sort_keys=True).encode() + b"\n")
    except (OSError, ClusterError) as error:
        return f"what it took was not measured: {error}"
    return ""


def _device(uuids: Sequence[str]) -> str:
    if not uuids:
        return "CPU"
    from cluster.node.gpus import list_gpus

    return ", ".join(dict.fromkeys(gpu.name for gpu in list_gpus() if gpu.uuid in uuids))


def measure(run: RunDir, attempt: AttemptDir, spec: JobSpec, launched_at: float, ended_at: float,
            device: str) -> Measure | None:
    """None: too short, or it writes no metrics."""
    written = [line for line in read_json_lines(attempt.metrics)
               if isinstance(line.get("t"), int | float) and isinstance(line.get("step"), int)]
    complete = bool(written) and written[-1].get("event") == "done"
    paces, evaluations = _intervals(written)
    if not written or spec.cost is None or not complete and len(paces) < FEWEST:
        return None
    last = max((line["t"] for line in written if "it_s" in line or line.get("event") == "eval"), default=None)
    own, shared = _checkpoint_bytes(run.checkpoints)
    step_s = sorted(paces)[len(paces) // 2] if paces else 0.0
    return Measure(
        work=spec.cost.work, job=spec.id, t=ended_at, host=process.hostname(), device=device, complete=complete,
        steps=written[-1]["step"] - written[0]["step"], step_s=step_s,
        start_s=(ended_at if last is None else written[0]["t"]) - launched_at,
        evaluation_s=max(0.0, _mean(s - steps * step_s for steps, s in evaluations)),
        end_s=max(0.0, ended_at - last) if last and complete else 0.0, val_samples=spec.cost.val_samples,
        checkpoint_bytes=own, shared_bytes=shared, artifact_bytes=_bytes_below(run.artifacts),
        gpu_peak_mb=float(written[-1].get("gpu_peak_mb", 0.0)))


def _intervals(written: list[dict[str, Any]]) -> tuple[list[float], list[tuple[int, float]]]:
    """Seconds per step from one update to the next; (steps since then, seconds) of each evaluation.

    Only an update's last line has a speed: the passes of an update are written at once. Saves go on in the background.
    """
    paces: list[float] = []
    evaluations: list[tuple[int, float]] = []
    before = written[0] if written else {}
    for line in written[1:]:
        steps, seconds = line["step"] - before["step"], line["t"] - before["t"]
        if line.get("event") == "eval":
            evaluations.append((steps, seconds))
        elif "it_s" in line and steps > 0:
            paces.append(seconds / steps)
        else:
            continue
        before = line
    return paces, evaluations


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _checkpoint_bytes(directory: Path) -> tuple[int, int]:
    """Of the newest: its own files; those with other names too (parts that do not change)."""
    own = shared = 0
    for path in list_checkpoints(directory)[:1]:
        for info in _files(path):
            if info.st_nlink > 1:
                shared += info.st_size
            else:
                own += info.st_size
    return own, shared


def _bytes_below(directory: Path) -> int:
    return sum(info.st_size for info in _files(directory))


def _files(directory: Path) -> list[os.stat_result]:
    return [os.stat(os.path.join(above, name), follow_symlinks=False)
            for above, _, names in os.walk(directory) for name in names]


# --- asking -------------------------------------------------------------------------------------------------

def newest(workdir: Path, work: str) -> Measure | None:
    """Of a job of that work: the newest that went to its end, else the newest."""
    try:
        written = lines.tail(path_of(workdir), _TAIL)
    except OSError:
        return None
    found = [line for line in written if line.get("work") == work]
    chosen = next((line for line in reversed(found) if line.get("complete")), found[-1] if found else None)
    try:
        return Measure(**chosen) if chosen else None
    except TypeError:  # of another version of launch
        return None


def expected(cost: Cost, found: Measure) -> Expected | None:
    """What a whole job takes; None: nobody knows how many steps it has."""
    if cost.steps is None and found.step_s:
        return None
    steps = cost.steps or 0
    more = cost.val_samples / found.val_samples if cost.val_samples and found.val_samples else 1.0
    seconds = (found.start_s + steps * found.step_s + cost.evaluations * found.evaluation_s * more + found.end_s)
    artifacts = found.artifact_bytes * (steps / found.steps if cost.growing and found.steps else 1)
    return Expected(seconds, found.shared_bytes + cost.checkpoints * found.checkpoint_bytes + artifacts)


def expected_s(workdir: Path, cost: dict[str, Any] | None) -> float | None:
    """Of a job that has not begun, by its spec."""
    if not cost or not (found := newest(workdir, cost["work"])):
        return None
    answer = expected(Cost(**cost), found)
    return None if answer is None else round(answer.seconds, 1)


def count(path: str) -> dict[str, int] | None:
    """{samples, views} of a list of samples; None: it cannot be read."""
    try:
        file = Path(path).expanduser()
        named = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        first = file.parent / named[0] / _FRAMES
        return {"samples": len(named), "views": len(json.loads(first.read_bytes())["frames"])}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


# --- calibrations -------------------------------------------------------------------------------------------

def discard(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Remove jobs that ran only to be measured. Raises Refused for any other, and for one that has not ended."""
    from cluster.node.view import read_view

    runs = [RunDir(Path(path)) for path in request["run_dirs"]]
    for run in runs:
        cost = JobSpec.from_json(run.spec.read_bytes()).cost
        state = read_view(run)["state"]
        if cost is None or not cost.calibration or state not in ENDED_WORDS:
            raise Refused(f"{run.path} is no calibration that has ended ({state}): it stays")
    for run in runs:
        shutil.rmtree(run.path)
    return {"removed": [str(run.path) for run in runs]}
