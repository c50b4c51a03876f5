"""What must be known before an attempt's processes are started. Slow, so it runs aside of the supervisor."""
from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.contract import ENV_TOKEN, AttemptDir, RunDir
from cluster.errors import ClusterError, Unusable, explain
from cluster.node import control, environment, gpus, resume, torchrun
from cluster.node.torchrun import Seat
from cluster.spec import JobSpec


@dataclass(frozen=True)
class Prepared:
    """`problem` is the reason for a person why the job cannot be started; then the command line is empty."""

    problem: str | None = None
    command: tuple[str, ...] = ()
    program: tuple[str, ...] = ()  # what a person would have typed
    cwd: str = "/"
    env: dict[str, str] | None = None
    python: str | None = None
    gpus: tuple[str, ...] = ()  # UUIDs
    driver: str | None = None
    cards: tuple[str, ...] = ()  # what its GPUs are called
    resume: str | None = None
    resume_step: int | None = None
    found: tuple[str, ...] = ()  # checkpoints that count at the start
    notes: tuple[str, ...] = ()
    alike: dict[str, Any] | None = None  # with several nodes: what must be the same on all of them
    resume_args: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Prepared:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()})


def prepare(run_dir: str, number: int, spec: JobSpec, code_digest: str | None = None,
            seat: Seat | None = None, leased: tuple[gpus.Gpu, ...] = ()) -> dict[str, Any]:
    """Everything attempt `number` needs, as JSON; see Prepared. `code_digest` replaces the job's code first; `leased`:
    the GPUs it has outside of SLURM.

    With several nodes each prepares its own part; what is resumed from, node 0 decides.
    """
    run = RunDir(Path(run_dir))
    node = seat.node if seat else 0
    found = () if node else tuple(path.name for path in resume.counting_checkpoints(run, number))
    try:
        control.install_code(run, code_digest)
        return asdict(_prepare(run, run.attempt(number, node), spec, found, seat, leased))
    except ClusterError as error:
        return asdict(Prepared(problem=str(error), found=found))
    except OSError as error:
        what, hint = explain(error, "the start could not be prepared")
        return asdict(Prepared(problem=f"{what}\n  {hint}" if hint else what, found=found))


def _prepare(run: RunDir, attempt: AttemptDir, spec: JobSpec, found: tuple[str, ...], seat: Seat | None,
             leased: tuple[gpus.Gpu, ...]) -> Prepared:
    _check_expressions(spec)
    cwd = _directory(spec, run)
    # With the token already now: what hangs while it is activated is found by it, should the supervisor die.
    base = environment.activate(spec.python, environment.clean(os.environ) | {ENV_TOKEN: spec.token_on(attempt.node)})
    python = environment.python_of(spec.python, base)
    chosen, has_gpus = _gpus(spec) if spec.slurm is not None else (leased, bool(leased) or gpus.has_driver())
    uuids = tuple(gpu.uuid for gpu in chosen)
    disturbed = gpus.in_use(chosen) if spec.slurm is not None else []  # elsewhere a lease keeps away from others
    if seat and seat.node:
        taken, start = [], resume.Resume(seat.resume, seat.resume_step, tuple(seat.resume_args))
    else:
        taken, start = _taken_over(run, attempt, spec), resume.choose(run, attempt.number, spec, cwd, base)
    secrets, missing = environment.read_secrets(run.path.parent.parent, spec.secrets)
    env = environment.job_environment(spec, run, attempt, base, start.path, uuids, has_gpus, seat) | secrets
    env["PWD"] = cwd  # that of the client would be a lie
    argv = torchrun.program(spec, python, attempt.config, start.args)
    _executable(argv[0], cwd, env)
    command = torchrun.command_line(spec, attempt, cwd, python, argv, seat)
    same = None
    if seat:
        from cluster.node import alike  # a job on one node does without

        same = alike.facts(run, spec, cwd, python, env)
    return Prepared(None, tuple(command), tuple(argv), cwd, env, python, uuids, chosen[0].driver if chosen else None,
                    tuple(gpu.name for gpu in chosen), start.path, start.step, found,
                    (*taken, *start.notes, *missing, *disturbed), same, start.args)


def _taken_over(run: RunDir, attempt: AttemptDir, spec: JobSpec) -> list[str]:
    """What other jobs give to this one stands in the attempt's config afterwards -> notes about it."""
    if not spec.after:
        return []
    from cluster.node import handover

    return handover.resolve(run, attempt, spec)


def _directory(spec: JobSpec, run: RunDir) -> str:
    """Where the job runs: `--cwd` (relative: that directory of the snapshot), else the snapshot, else (a command
    without any code) the run directory."""
    if spec.cwd is None:
        return str(run.code if run.code.is_dir() else run.path)
    path = run.code / Path(spec.cwd).expanduser()
    if path.is_relative_to(run.code):
        path.mkdir(parents=True, exist_ok=True)  # git keeps no empty directories
    if not path.is_dir():
        raise Unusable(f"{spec.cwd}: no such directory on this node")
    return str(path)


def _gpus(spec: JobSpec) -> tuple[tuple[gpus.Gpu, ...], bool]:
    """Of an allocation -> the job's GPUs, and whether CUDA_VISIBLE_DEVICES is to name them (or none) whatever it says
    now."""
    found = gpus.allocated(gpus.list_gpus(), spec.gpus, os.environ) if spec.gpus else ()
    none = not spec.gpus and not gpus.granted(os.environ) and gpus.has_driver()
    return found, bool(found) or none


def _executable(name: str, cwd: str, env: dict[str, str]) -> None:
    """Raises Unusable when there is no such program, before anything was started."""
    where = os.path.join(cwd, name) if "/" in name else name
    if shutil.which(where, path=env.get("PATH", os.defpath)) is None:
        hint = f"PATH is {env.get('PATH', os.defpath)}" if "/" not in name else f"looked in {cwd}"
        raise Unusable(f"command not found or not executable: {name}", hint=hint)


def _check_expressions(spec: JobSpec) -> None:
    for name, text in spec.progress.items():
        try:
            re.compile(text)
        except re.error as error:
            raise Unusable(f"progress: {name}: not a regular expression: {text!r} ({error})") from None
