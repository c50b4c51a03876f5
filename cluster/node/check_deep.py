"""The deep tier: what the job's own Python and its GPUs say. For `launch check`, and before each attempt.

    RUN/preflight.json    what an attempt found good; with nothing changed the next one does not look again

`python -m jobs.preflight` of the job's own code looks at the environment, the data and the config. In an attempt on the
CPU it loads no torch: its ranks do that a moment later and say themselves what fails, and it would double the start of
a small job. With GPUs it does: a GPU job starts in a minute, not a second, and what was loaded is in memory then.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cluster.contract import RunDir, write_atomically
from cluster.errors import ClusterError
from cluster.node import environment, gpus, measured
from cluster.node.check import Found, by_severity
from cluster.node.findings import leaves
from cluster.spec import JobSpec

ATTEMPT_S = 60.0  # a file server that hangs is no reason never to begin
CHECK_S = 300.0  # torch from a cold network file system
KEPT = "preflight.json"
_MODULE = Path("jobs") / "preflight.py"
_TIGHT = 0.95  # of a GPU's memory
_FULL = 0.8  # of what is free on the disk
_MEASURE = "submit it with --dry-run --calibrate: that measures it"
_TAIL = 3  # lines of what it said at its end


@dataclass
class Looked:
    """`seconds`: of its parts; `imports`: of each module."""

    found: list[Found] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    imports: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"found": [asdict(one) for one in by_severity(self.found)]}


@dataclass(frozen=True)
class Program:
    """How the job's own Python is started."""

    python: str | None
    cwd: str
    env: Mapping[str, str]
    config: Path
    schema: str | None  # of the run file


# --- the question of `launch check` -------------------------------------------------------------------------

def check(request: dict[str, Any], payload: BinaryIO) -> dict[str, Any]:
    """The deep tier for a job that is not there yet, in a directory that is removed again."""
    from cluster.node.agent import checked_workdir
    from cluster.node.submit import read_spec, unpack_code

    began = time.monotonic()
    spec, looked = read_spec(request["spec"]), Looked()
    workdir = checked_workdir(request["workdir"], force=True)
    code = unpack_code(workdir, spec.code.digest, payload, request.get("payload_size", 0))
    aside = Path(tempfile.mkdtemp(prefix=".check-", dir=workdir / ".launch"))
    try:
        config = aside / "config.yaml"
        config.write_text(request["config"] or "")
        base = environment.activate(spec.python, environment.clean(os.environ))
        env = {**base, **spec.env, **({"PYTHONPATH": str(code)} if code else {})}
        looked.seconds["environment"] = round(time.monotonic() - began, 3)
        program = Program(environment.python_of(spec.python, base), str(code or aside), env, config, spec.preflight)
        cards = _cards(spec) if spec.slurm is None else ()
        said = _look(looked, program, spec, workdir, cards, True, request.get("resume") or "", CHECK_S)
        looked.found += _disk(spec, workdir, said.get("checkpoint_bytes") or 0.0)
    except ClusterError as error:
        looked.found.append(Found("environment", "error", error.what, spec.host(0), "nothing of the job would start",
                                  error.hint or "correct `env:` of the node in cluster.yaml"))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    looked.seconds["all"] = round(time.monotonic() - began, 3)
    return looked.to_json()


def _cards(spec: JobSpec) -> tuple[gpus.Gpu, ...]:
    """Those the job could be given."""
    if not (spec.gpus and gpus.has_driver()):
        return ()
    return tuple(gpu for gpu in gpus.list_gpus() if spec.gpu_choice is None or gpu.index in spec.gpu_choice)


# --- before an attempt --------------------------------------------------------------------------------------

def before(run_dir: str, number: int, spec: JobSpec, python: str | None, cwd: str, env: dict[str, str],
           uuids: Sequence[str], resume: str) -> dict[str, Any]:
    """The deep tier for an attempt that is about to start its ranks."""
    began = time.monotonic()
    run = RunDir(Path(run_dir))
    program = Program(python, cwd, env, run.attempt(number).config, spec.preflight)
    key = _key(run, program, uuids)
    looked, kept = Looked(), run.path / KEPT
    if key == _kept(kept):
        return looked.to_json()
    cards = tuple(gpu for gpu in gpus.list_gpus() if gpu.uuid in uuids) if uuids else ()
    _look(looked, program, spec, run.path.parent.parent, cards, bool(uuids), resume, ATTEMPT_S)
    looked.seconds["all"] = round(time.monotonic() - began, 3)
    if not any(one.severity == "error" for one in looked.found):
        write_atomically(kept, json.dumps({"key": key, "t": time.time()}).encode())
    return looked.to_json()


def _kept(path: Path) -> str | None:
    try:
        return json.loads(path.read_bytes())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(run: RunDir, program: Program, uuids: Sequence[str]) -> str:
    """Code, config, environment and inputs, each by what tells that it was replaced. The job itself may write into its
    code's folder, so of that only a file counts: another snapshot is another copy of it.
    """
    text = program.config.read_text() if program.config.exists() else ""
    inputs = sorted({value for value in leaves(text).values() if value.startswith("/")})
    looked_at = [str(run.code / _MODULE), *inputs, *_packages(program.python)]
    said = [text, program.python, sorted(uuids), [(path, _stamp(path)) for path in looked_at]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _packages(python: str | None) -> list[str]:
    """Where an environment's packages are: installing one changes the folder."""
    return [str(one) for one in Path(python).parent.parent.glob("lib/python3*/site-packages")] if python else []


def _stamp(path: str) -> list[int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return [info.st_ino, info.st_size if os.path.isfile(path) else 0, info.st_mtime_ns]


# --- both ---------------------------------------------------------------------------------------------------

def _look(looked: Looked, program: Program, spec: JobSpec, workdir: Path, cards: Sequence[gpus.Gpu], imports: bool,
          resume: str, limit_s: float) -> dict[str, Any]:
    """What the job's Python said goes to `looked`, and comes back."""
    began = time.monotonic()
    said = _ask(program, spec, len(cards) and spec.gpus, imports, resume, limit_s)
    looked.found += [Found.from_json(one) for one in said.get("found", ())]
    looked.imports = said.get("imports", {})
    looked.seconds["preflight"] = round(time.monotonic() - began, 3)
    began = time.monotonic()
    looked.found += _memory(spec, workdir, cards, said.get("least_gpu_mb") or 0.0, said.get("counted") or "")
    looked.seconds["gpus"] = round(time.monotonic() - began, 3)
    return said


def _ask(program: Program, spec: JobSpec, cards: int, imports: bool, resume: str, limit_s: float) -> dict[str, Any]:
    """What `jobs.preflight` says; a code that has none (an older one, another project's) is not asked."""
    if program.schema is None or program.python is None or not (Path(program.cwd) / _MODULE).is_file():
        return {}
    command = [program.python, "-m", "jobs.preflight", program.schema, str(program.config), "--json",
               "--gpus", str(cards), "--ranks", str(spec.world), *(["--imports"] if imports else []),
               *(["--resume", resume] if resume else [])]
    try:
        done = subprocess.run(command, cwd=program.cwd, env=dict(program.env), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="replace", timeout=limit_s)
    except subprocess.TimeoutExpired:
        return _trouble("warning", f"the inputs could not be looked at within {limit_s:g} s", program,
                        "a file server may hang: time ls on the folders of the config")
    except OSError as error:
        return _trouble("error", f"{program.python}: {error.strerror}", program, "correct `env:` in cluster.yaml")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = "; ".join(done.stderr.strip().splitlines()[-_TAIL:]) or f"exit code {done.returncode}"
        missing = "ModuleNotFoundError" in last or "ImportError" in last
        return _trouble("error" if missing else "warning", last, program,
                        f"{program.python} -m pip install what is missing there" if missing
                        else "launch check says the rest; --no-check goes without")


def _trouble(severity: Any, what: str, program: Program, fix: str) -> dict[str, Any]:
    return {"found": [asdict(Found("environment", severity, what, program.python or "", "the job runs in this Python",
                                   fix))]}


def _memory(spec: JobSpec, workdir: Path, cards: Sequence[gpus.Gpu], least_mb: float,
            counted: str) -> Iterator[Found]:
    """What was measured of such work; what it takes at least, which is `counted`."""
    known = measured.newest(workdir, spec.cost.work) if spec.cost else None
    least = f"it takes at least {_gb(least_mb)} ({counted})"
    if not cards:
        if spec.gpus and spec.slurm is not None and least_mb and not (known and known.gpu_peak_mb):
            yield Found("memory", "info", least, spec.host(0), "which GPU it gets, the cluster decides", _MEASURE)
        return
    largest = sorted(cards, key=lambda gpu: -gpu.memory_mb)
    card = largest[min(len(cards), max(1, spec.gpus)) - 1]  # the smallest that it would have to take
    there = f"GPU {card.index} ({card.name}) has {_gb(card.memory_mb)}"
    if least_mb > card.memory_mb:
        yield Found("memory", "error", f"{least}, {there}",
                    spec.host(0), "it would end with out of memory before its first step",
                    "a node with larger GPUs: launch nodes; or a smaller model")
    elif known and known.gpu_peak_mb:
        if known.gpu_peak_mb > _TIGHT * card.memory_mb:
            yield Found("memory", "warning", f"{known.job} took {_gb(known.gpu_peak_mb)} on {known.device}, {there}",
                        spec.host(0), "it may end with out of memory; a stage that chooses by what is free may fit",
                        "--set training.batch_per_rank=1, or a node with larger GPUs: launch nodes")
    elif least_mb:
        tight = least_mb > _TIGHT * card.memory_mb
        yield Found("memory", "warning" if tight else "info", f"{least}, {there}", spec.host(0),
                    "what is not counted comes on top: nothing like it was measured there", _MEASURE)


def _disk(spec: JobSpec, workdir: Path, checkpoint: float) -> Iterator[Found]:
    """Of its checkpoints, by the shapes of what is in them, where none was measured yet."""
    from cluster.node import room

    if spec.cost is None or not checkpoint or measured.newest(workdir, spec.cost.work):
        return
    need, free = spec.cost.checkpoints * checkpoint, room.of(workdir).bytes
    if need > _FULL * free:
        yield Found("disk", "error" if need > free else "warning", f"{spec.cost.checkpoints} checkpoints will take "
                    f"{need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free", str(workdir),
                    "a full disk ends it in the middle", "launch prune, or --set checkpoint.keep_last=1")


def _gb(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB"
