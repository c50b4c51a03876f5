"""A job under a real supervisor, in a run directory of its own."""
from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import AttemptDir, RunDir
from cluster.events import AttemptEnded, Event
from cluster.journal import read_events
from cluster.node import control, process
from cluster.spec import JobSpec, PythonEnv, RestartPolicy
from cluster.states import WORDS, Status, fold
from tests.helpers import wait_until
from tests.node.cards import Cards

SUPERVISE = "import sys; from pathlib import Path; from cluster.node.supervisor import main; " \
            "sys.exit(main(Path(sys.argv[2]), sys.argv[4]))"


@dataclass
class Job:
    run: RunDir
    spec: JobSpec
    supervisor: subprocess.Popen[bytes] | None = None

    def start(self, by: str = "submit", **env: str) -> Job:
        with open(self.run.path / "supervisor.err", "ab") as errors:
            self.supervisor = subprocess.Popen(
                [sys.executable, "-I", "-c", SUPERVISE, "supervise", str(self.run.path), "--by", by], cwd="/",
                stdin=subprocess.DEVNULL, stderr=errors, env={**os.environ, **env}, start_new_session=True)
        return self

    @property
    def attempt(self) -> AttemptDir:
        return wait_until(self.run.attempts, what="an attempt")[-1]

    @property
    def events(self) -> list[Event]:
        return read_events(self.run)[0]

    @property
    def status(self) -> Status:
        return fold(self.events)[0]

    @property
    def state(self) -> str:
        return WORDS[type(self.status)]

    @property
    def endings(self) -> list[AttemptEnded]:
        return [event for event in self.events if isinstance(event, AttemptEnded)]

    def log(self, rank: int = 0, attempt: int = -1) -> str:
        attempts = self.run.attempts()
        path = attempts[attempt].rank_log(rank) if attempts else None
        return path.read_bytes().decode() if path and path.exists() else ""

    def says(self, text: str, rank: int = 0) -> None:
        wait_until(lambda: text in self.log(rank), 30, what=f"{text!r} in {self.log(rank)!r}")

    def wait_for(self, state: str, timeout_s: float = 15.0) -> None:
        wait_until(lambda: self.run.attempts() and self.state == state, timeout_s, f"{state}; events: {self.events}")

    def ended(self, timeout_s: float = 20.0) -> Status:
        """The status once the supervisor itself has gone."""
        assert self.supervisor is not None
        self.supervisor.wait(timeout_s)
        assert (self.run.path / "supervisor.err").read_text() == ""
        return self.status

    def ask(self, request: control.Stop | control.Restart) -> bool:
        made = control.ask(self.run, request)
        if self.supervisor:
            self.supervisor.send_signal(signal.SIGUSR2)
        return made

    def stop(self, grace_s: float | None = None, now: bool = False) -> Status:
        self.ask(control.Stop("me@here", grace_s=grace_s, now=now))
        return self.ended()

    def members(self) -> list[process.Proc]:
        assert self.supervisor is not None
        return process.members(self.supervisor.pid, self.spec.token)


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """make_job("command", "echo", "hi", gpus=1) -> a Job that is not started yet."""
    numbers = itertools.count()
    made: list[Job] = []

    def make(kind: str, *argv: str, **fields: Any) -> Job:
        name = f"job-{next(numbers)}"
        run = RunDir(tmp_path / "work" / "runs" / name)
        for directory in (run.control, run.checkpoints, run.artifacts, run.path / "attempts"):
            directory.mkdir(parents=True)
        base = JobSpec(id=name, token=f"{name}-{os.getpid()}-{tmp_path.name}", stage="command", kind=kind, argv=argv,
                       node="local", python=PythonEnv("python", sys.executable), restart=RestartPolicy(0, 0.1, 0.4))
        spec = replace(base, **fields)
        run.spec.write_bytes(spec.to_json())
        made.append(Job(run, spec))
        return made[-1]

    yield make
    for job in made:
        if job.supervisor:
            job.supervisor.kill()
            job.supervisor.wait()
        process.sweep(None, job.spec.token)
        assert fold(job.events)[1] == 0, f"events that do not fit: {job.events}"


@pytest.fixture
def cards(tmp_path: Path) -> Iterator[Cards]:
    """Four GPUs."""
    found = Cards.put(tmp_path / "bin", 4)
    yield found
    found.take_out()


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """script(source) -> path of a Python file with that source."""
    numbers = itertools.count()

    def write(source: str) -> str:
        path = tmp_path / f"script-{next(numbers)}.py"
        path.write_text(source)
        return str(path)

    return write
