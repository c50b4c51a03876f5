"""A person with a laptop and a few nodes: runs the real `launch` as a program of its own."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.helpers import wait_until
from tests.testbed.bed import poll
from tests.testbed.slurmbed import SlurmBed
from tests.testbed.testbed import Testbed

LAUNCH = Path(sys.prefix) / "bin" / "launch"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"}


class Command(NamedTuple):
    argv: Sequence[str | Path]
    cwd: Path | None
    env: dict[str, str]


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
    bed: Testbed | None = None  # whose nodes it aims at

    def settings(self) -> dict[str, str]:
        settings = {"LAUNCH_HOME": f"{self.home}/state", "LAUNCH_WORKDIR": f"{self.home}/work"}
        return settings | ({"LAUNCH_CLUSTER": str(self.cluster)} if self.cluster else {}) | self.extra_env

    def command(self, *argv: str) -> Command:
        return Command([LAUNCH, *argv], self.project, os.environ | self.settings())

    def start(self, *argv: str) -> Started:
        """A `launch` that goes on beside the test; its stdout is a file."""
        output = self.home / f"stdout-{uuid.uuid4().hex}"
        with open(output, "wb") as file:
            command = self.command(*argv)
            process = subprocess.Popen(command.argv, cwd=command.cwd, env=command.env, stdin=subprocess.DEVNULL,
                                       stdout=file, stderr=subprocess.DEVNULL)
        return Started(process, output)

    def launch(self, *argv: str, code: int | None = 0, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        command = self.command(*argv)
        done = subprocess.run(command.argv, cwd=command.cwd, env=command.env, stdin=subprocess.DEVNULL,
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

    def findings(self, job: str) -> list[str]:
        """What `launch doctor` calls an error or a warning."""
        found = json.loads(self.launch("doctor", job, "--json", code=None).stdout)["findings"]
        return [f"{one['rule']}: {one['what']}" for one in found if one["severity"] != "info"]

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

    def seen_here(self, path: str | Path) -> Path:
        """Where the tests see a path of the node."""
        return self.bed.root / Path(path).relative_to("/") if self.bed else Path(path)

    def written(self, job: str) -> str:
        """The ends of its journals and logs, SLURM's too: what explains a job that ended as none should."""
        paths = [path for path in sorted(self.seen_here(self.run_dir(job)).rglob("*"))
                 if path.name == "journal.jsonl" or path.suffix in (".log", ".out")]
        return "\n".join(f"== {path}\n{path.read_bytes()[-3000:].decode(errors='replace')}" for path in paths)

    def left_over(self) -> list[str]:
        """alice's processes on the nodes and her jobs in the queue, when they do not go away within a moment."""
        if self.bed is None or poll(lambda: not self._there(), 15):
            return []
        return self._there()

    def _there(self) -> list[str]:
        assert self.bed
        queue = self.bed.queue("alice") if isinstance(self.bed, SlurmBed) else ()
        return [*self.bed.processes(), *map(str, queue)]

    def submit_and_read(self, *argv: str) -> str:
        """Submit, wait for the end, and return the log."""
        job = self.submit(*argv)
        self.launch("wait", job)
        return self.logs(job)


@dataclass
class LoginLab(Lab):
    """The same person, logged in on the head of the cluster: `project` and `home` are paths there."""

    def command(self, *argv: str) -> Command:
        assert self.bed
        settings = [f"{name}={value}" for name, value in self.settings().items()]
        there = ["env", *settings, "sh", "-c", 'cd "$0" && exec "$@"', str(self.project), str(LAUNCH), *argv]
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        return Command([*root, *self.bed.command("exec", "head", "-u", "alice", *there)], None, dict(os.environ))
