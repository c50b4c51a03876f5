"""A person with a laptop and a few nodes: runs the real `launch` as a program of its own."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers import wait_until

LAUNCH = Path(sys.prefix) / "bin" / "launch"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"}


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes]
    output: Path


@dataclass
class Lab:
    """`node` is the node that the test aims at; `home` holds the client's index, so a second laptop is a second Lab."""

    project: Path  # the directory the person stands in
    home: Path
    node: str = "local"
    cluster: Path | None = None  # cluster.yaml
    extra_env: dict[str, str] = field(default_factory=dict)

    def env(self) -> dict[str, str]:
        env = os.environ | {"LAUNCH_HOME": str(self.home / "state"), "LAUNCH_WORKDIR": str(self.home / "work")}
        return env | ({"LAUNCH_CLUSTER": str(self.cluster)} if self.cluster else {}) | self.extra_env

    def start(self, *argv: str) -> Started:
        """A `launch` that goes on beside the test; its stdout is a file."""
        output = self.home / f"stdout-{uuid.uuid4().hex}"
        with open(output, "wb") as file:
            process = subprocess.Popen([LAUNCH, *argv], cwd=self.project, env=self.env(), stdin=subprocess.DEVNULL,
                                       stdout=file, stderr=subprocess.DEVNULL)
        return Started(process, output)

    def launch(self, *argv: str, code: int | None = 0, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([LAUNCH, *argv], cwd=self.project, env=self.env(), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="surrogateescape", timeout=timeout_s)
        said = f"launch {' '.join(argv)} -> {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, said
        assert code is None or done.returncode == code, said
        return done

    def submit(self, *argv: str) -> str:
        """The job id, which is all that stdout may hold."""
        where = [] if "--node" in argv else ["--node", self.node]
        (job,) = self.launch("submit", *where, *argv).stdout.splitlines()
        return job

    def status(self, job: str) -> dict:
        (view,) = json.loads(self.launch("status", job, "--json").stdout)
        return view

    def wait_state(self, job: str, *states: str, timeout_s: float = 60) -> dict:
        found: dict = {}

        def reached() -> bool:
            found.update(self.status(job))
            wrong = found["state"] in ENDED and found["state"] not in states
            assert not wrong, f"{job} is {found['state']}: {found['reason']}\n{self.logs(job)}"
            return found["state"] in states

        wait_until(reached, timeout_s, f"{job} {'/'.join(states)}")
        return found

    def logs(self, job: str, *argv: str) -> str:
        return self.launch("logs", job, *argv, code=None).stdout

    def run_dir(self, job: str) -> Path:
        return Path(self.status(job)["run_dir"])

    def submit_and_read(self, *argv: str) -> str:
        """Submit, wait for the end, and return the log."""
        job = self.submit(*argv)
        self.launch("wait", job)
        return self.logs(job)
