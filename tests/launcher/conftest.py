"""A small project with a stage of its own, and `launch` as a person runs it: two streams and an exit code."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = '''\
import os, pathlib, signal, sys, time

settings = dict(line.split(": ", 1) for line in open(sys.argv[1]).read().splitlines())
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print(f"attempt {os.environ['LAUNCH_ATTEMPT']} in {os.getcwd()}", flush=True)
for step in range(1, int(settings["steps"]) + 1):
    print(f"step {step} of {settings['steps']} loss {1 / step:.4f}", flush=True)
    gate = pathlib.Path(settings["gate"])
    while gate.name != "open" and not gate.exists() and not stop:
        time.sleep(0.02)
    if stop:
        print("stopping", flush=True)
        sys.exit(0)
if settings["fail"] == "true":
    raise RuntimeError("the mouse ran away")
'''
_STAGE = r'''
about: counts to a number; waits for the file `gate` after each step, unless that is named `open`
python: tick.py
default_config: quick
resources: {gpus: 0}
paths: [gate]
restart: {max_restarts: 0}
progress: {step: 'step (\d+)', total: 'of (\d+)', loss: 'loss ([\d.]+)'}
'''
END_S = 60.0


@dataclass
class Person:
    """Somebody in the directory `at`, who uses `launch`."""

    at: Path
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def start(self, *words: str, **streams: Any) -> subprocess.Popen[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        return subprocess.Popen([sys.executable, "-m", "launcher.cli", *words], cwd=self.at, env=self.env,
                                text=True, stdin=subprocess.DEVNULL, **streams)

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Raises when the exit code is another one, or when a person would see a traceback."""
        with self.start(*words) as process:
            out, err = process.communicate(timeout=END_S)
        assert "Traceback" not in err, err
        assert process.returncode == code, f"launch {' '.join(words)} -> {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(words, code, out, err)

    def submit(self, *words: str) -> str:
        out = self.run("submit", *words).stdout
        assert out.count("\n") == 1
        return out.strip()

    def status(self, job: str) -> dict[str, Any]:
        [found] = json.loads(self.run("status", "--json", job).stdout)
        return found

    def until(self, job: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Look until `true` of the job's status."""
        deadline = time.monotonic() + END_S
        while not true(found := self.status(job)):
            assert time.monotonic() < deadline, found
        return found


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    project = tmp_path / "생쥐 it's $HOME"
    (project / "configs" / "stages").mkdir(parents=True)
    (project / "configs" / "runs" / "tick").mkdir(parents=True)
    (project / "configs" / "stages" / "tick.yaml").write_text(_STAGE)
    (project / "configs" / "runs" / "tick" / "quick.yaml").write_text("steps: 3\ngate: open\nfail: false\n")
    (project / "configs" / "runs" / "tick" / "failing.yaml").write_text("steps: 1\ngate: open\nfail: true\n")
    (project / "tick.py").write_text(_PROGRAM)
    somebody = Person(project, {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    yield somebody
    left = json.loads(somebody.run("status", "--json").stdout)
    for job in left:
        if job["ended_at"] is None:
            somebody.run("kill", "--now", job["id"])


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Ctrl-C -> exit code and what was said."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=END_S)
    return process.returncode, err
