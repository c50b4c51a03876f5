"""Where a job runs and how it ends: its run directory, its error exits, SIGTERM. Imports no torch: a mistake
in the config is told before the slow imports.

Ends of a job: 0 done (or stopped when asked), 2 a mistake in config or data, 3 the non-finite guard, 1
anything else. A mistake of a person is one block on stderr that begins with `error: `; a fault of ours keeps
its traceback.
"""
from __future__ import annotations

import errno
import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cluster.contract import (
    ENV_ATTEMPT, ENV_CHECKPOINT_DIR, ENV_JOB_ID, ENV_RESUME, ENV_RUN_DIR, STACK_SIGNAL, AttemptDir, RunDir,
)
from configs.errors import ConfigError


class JobError(Exception):
    """Something a person can mend: `what` and where, `hint` what to do next. Ends the job without a
    traceback."""

    exit_code = 2

    def __init__(self, what: str, hint: str | None = None) -> None:
        self.what, self.hint = what, hint
        super().__init__(what, hint)  # both, so that it survives the way out of a loader process

    def __str__(self) -> str:
        return f"{self.what}\n  {self.hint}" if self.hint else self.what


class NonFinite(JobError):
    """Too many updates in a row were not finite or exploded."""

    exit_code = 3


class WriteFailed(JobError):
    """The disk did not take a checkpoint or a metrics line."""

    exit_code = 1


class AgreedError(Exception):
    """An error that every rank knows of: rank 0 has it told, the others only end with the same code."""

    def __init__(self, error: JobError) -> None:
        self.error = error
        super().__init__(str(error))


def run_job(main: Callable[[], None], rank: int) -> NoReturn:
    """Run `main` and end the process with the exit code that tells what happened."""
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    code = 0
    try:
        main()
    except (JobError, ConfigError) as error:
        code = tell(error)
    except AgreedError as agreed:
        code = tell(agreed.error) if rank == 0 else agreed.error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code = tell(WriteFailed(str(error), "free some disk space (`launch prune`), then `launch restart`"))
    finally:
        _end_loaders()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """Of one rank of several, when all is written: gloo has threads that still live when the interpreter is taken down,
    and abort one process in ten or so that has done its work."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()  # a checkpoint that is being written
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_loaders() -> None:
    """Loader processes ignore TERM (see jobs.loader): after an error the interpreter would wait for them
    forever, and the other ranks for this one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for a failure
    for process in multiprocessing.active_children():
        process.kill()


def tell(error: JobError | ConfigError) -> int:
    """One block on stderr; returns the exit code."""
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


class StopFlag:
    """Set by SIGTERM. A handler alone must not act: the ranks first agree on one step (see jobs.trainer)."""

    def __init__(self) -> None:
        self.asked = False

    def install(self) -> StopFlag:
        signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, _signal: int, _frame: object) -> None:
        self.asked = True


@dataclass(frozen=True)
class Job:
    """One attempt of one job, as the environment or the command line describes it."""

    id: str
    run: RunDir
    attempt: AttemptDir
    checkpoints: Path
    resume: Path | None  # the checkpoint to go on from

    @property
    def superseded(self) -> bool:
        """Whether a newer attempt runs (a node that was lost and came back): what they share is its alone to change."""
        return any(other.number > self.attempt.number for other in self.run.attempts())


def job_from_environment(resume: str | None, environment: Mapping[str, str] = os.environ) -> Job | None:
    """The job that a supervisor started, or None by hand. `resume` (--resume) beats LAUNCH_RESUME."""
    directory = environment.get(ENV_RUN_DIR)
    if not directory:
        return None
    run = RunDir(Path(directory))
    chosen = resume or environment.get(ENV_RESUME)
    return Job(
        id=environment.get(ENV_JOB_ID) or run.path.name,
        run=run,
        attempt=run.attempt(int(environment.get(ENV_ATTEMPT) or 0)),
        checkpoints=Path(environment.get(ENV_CHECKPOINT_DIR) or run.checkpoints),
        resume=Path(chosen).absolute() if chosen else None,
    )


def job_by_hand(stage: str, run_dir: str | None, resume: str | None) -> Job:
    """A run directory (`runs/<stage>-by-hand-<time>` unless given) and a new attempt in it. Only rank 0 calls
    this.

    Raises JobError when the directory cannot be made.
    """
    try:
        run = RunDir(Path(run_dir).absolute() if run_dir else _new_directory(stage))
        attempt = _new_attempt(run)
        run.artifacts.mkdir(exist_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise JobError(f"cannot make a run directory at {error.filename}: {error.strerror}",
                       "choose another place with --run-dir") from None
    return Job(run.path.name, run, attempt, run.checkpoints, Path(resume).absolute() if resume else None)


def _new_directory(stage: str) -> Path:
    base = Path.cwd() / "runs" / f"{stage}-by-hand-{time.strftime('%Y%m%d-%H%M%S')}"
    base.parent.mkdir(exist_ok=True)
    for number in range(1, 1000):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise JobError(f"{base}: a thousand runs of this second exist already")


def _new_attempt(run: RunDir) -> AttemptDir:
    number = max((attempt.number for attempt in run.attempts()), default=-1) + 1
    while True:
        attempt = run.attempt(number)
        try:
            attempt.path.mkdir(parents=True)
            return attempt
        except FileExistsError:
            number += 1
