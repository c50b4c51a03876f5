"""Where the benchmarks run: this computer with a state of its own, and the test beds when they are needed."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from tests.bench.measure import Spent, spend
from tests.testbed.bed import unavailable
from tests.testbed.slurmbed import SlurmBed, not_installed
from tests.testbed.testbed import Testbed

LAUNCH = Path(sys.prefix) / "bin" / "launch"
GPU_NODES = ("gpu01", "gpu02", "gpu03", "gpu04", "gpu05")
USER = "alice"
WORKDIR = f"/scratch/{USER}/launch"  # on every node
ALIASES = {f"n{number:02d}": GPU_NODES[number % len(GPU_NODES)] for number in range(50)}
_ALIAS_ADDRESS = "10.77.0.1{}"  # fabric takes two names of one address for one host: each alias has its own
_OURS = ("LAUNCH_", "XDG_")
_FILES = {"train.py": "print('a small project')\n"}
_HOLD = {
    "configs/stages/hold.yaml": "about: holds its place\ncommand: [sleep, '600']\npass_config: false\n"
                                "default_config: one\ngrace_s: 1\n",
    "configs/runs/hold/one.yaml": "point: 0\n"}
NOOP = {
    "configs/stages/noop.yaml": "about: does nothing\ncommand: ['true']\ndefault_config: one\n",
    "configs/runs/noop/one.yaml": "point: 0\n"}


class Unavailable(Exception):
    """Something that a benchmark needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Client:
    """A person with an index of their own who stands in `project`."""

    project: Path
    state: Path
    cluster: Path | None = None
    prefix: tuple[str, ...] = ()  # runs the command in the network of the test bed

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        own = {"LAUNCH_HOME": str(self.state), "LAUNCH_WORKDIR": str(self.state / "work"),
               "XDG_CONFIG_HOME": str(self.state / "config")}
        return kept | own | ({"LAUNCH_CLUSTER": str(self.cluster)} if self.cluster else {})

    def argv(self, *words: str | Path) -> list[str]:
        return [*self.prefix, str(LAUNCH), *map(str, words)]

    def launch(self, *words: str | Path, codes: Sequence[int] = (0,)) -> Spent:
        return spend(self.argv(*words), env=self.env, cwd=self.project, codes=codes)

    def submit(self, *words: str | Path) -> str:
        """-> the job id."""
        return self.launch("submit", *words).stdout.strip()

    def status(self, job: str) -> dict:
        (view,) = json.loads(self.launch("status", job, "--json").stdout)
        return view

    def wait(self, job: str) -> None:
        self.launch("wait", job)

    @contextmanager
    def running(self, *words: str | Path) -> Iterator[str]:
        """A job that is killed at the end, if it still runs then."""
        job = self.submit(*words)
        try:
            yield job
        finally:
            self.launch("kill", job, "--now", codes=(0, 1, 3))

    @contextmanager
    def started(self, *words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """`launch WORDS` with its stdout in a pipe, ended at the end."""
        with piped(self.argv(*words), env=self.env, cwd=self.project) as process:
            yield process


@contextmanager
def piped(argv: Sequence[str], **how: object) -> Iterator[subprocess.Popen[bytes]]:
    """A command whose stdout is read as it comes; ended at the end."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, bufsize=0, **how)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Remote:
    """The test bed as a client inside its network sees it: plain TCP to each node, as in a lab."""

    bed: Testbed
    client: Client
    ssh_config: Path

    def ssh(self, node: str, *words: str) -> list[str]:
        return [*self.client.prefix, "ssh", "-F", str(self.ssh_config), node, *words]

    def on_host(self, node: str, path: str) -> Path:
        """Where this machine sees a file below /scratch of a node."""
        return self.bed.root / "nodes" / node / path.lstrip("/")


@dataclass(frozen=True)
class Login(Remote):
    """The SLURM test bed, whose cluster the client knows as `lab` and reaches through its login node."""

    bed: SlurmBed


class Places:
    """Made once per run; everything it started is gone when it is left."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._remote: Remote | None = None
        self._login: Login | None = None

    def __enter__(self) -> Places:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="launch-bench-")))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._stack.close()

    def local(self, name: str, files: Mapping[str, str] = _FILES) -> Client:
        """The client of this name on this computer: an index of its own, a small git project of these files."""
        folder = self.folder / name
        project = folder / "project"
        return Client(project if project.exists() else _project(project, files), folder / "state")

    def remote(self) -> Remote:
        """The test bed and one client of it. Raises Unavailable."""
        self._remote = self._remote or self._bring_up()
        return self._remote

    def login(self) -> Login:
        """The SLURM test bed and one client of it. Raises Unavailable."""
        self._login = self._login or self._bring_up_slurm()
        return self._login

    def _bring_up(self) -> Remote:
        bed = Testbed(f"bench-{os.getpid()}", "private")
        self._up(bed)
        _give_addresses(bed)
        folder = self.folder / "remote"
        project = _project(folder / "project", _FILES)
        config = folder / "ssh_config"
        config.write_text(_direct_ssh_config(bed))
        cluster = _cluster_yaml(folder / "cluster.yaml", config)
        return Remote(bed, Client(project, folder / "state", cluster, _inside(bed)), config)

    def _bring_up_slurm(self) -> Login:
        bed = SlurmBed(f"bench-slurm-{os.getpid()}")
        self._up(bed)
        folder = self.folder / "slurm"
        project = _project(folder / "project", _FILES | _HOLD)
        config = folder / "ssh_config"
        config.write_text(_direct_ssh_config(bed))
        cluster = folder / "cluster.yaml"
        cluster.write_text(bed.slurm_cluster(USER, ssh_config=config))
        return Login(bed, Client(project, folder / "state", cluster, _inside(bed)), config)

    def _up(self, bed: Testbed) -> None:
        if why_not := unavailable() or (isinstance(bed, SlurmBed) and not_installed()):
            raise Unavailable(why_not)
        if os.geteuid() != 0:
            raise Unavailable("a client is put into the test bed's network, and only root can do that")
        self._stack.callback(bed.down)
        bed.up()


def _inside(bed: Testbed) -> tuple[str, ...]:
    """Runs a command of this computer in the network of the nodes, away from those that it asks."""
    place = "gpu05" if isinstance(bed, SlurmBed) else "head"
    return ("nsenter", f"--net={bed.root}/net/{place}", "--")


def _project(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "begin"]):
        spend(["git", "-c", "user.name=bench", "-c", "user.email=bench@example.org", *words], cwd=folder)
    return folder


def _direct_ssh_config(bed: Testbed) -> str:
    """The person's config of the test bed, with the aliases and without the way in from outside."""
    lines = [line for line in bed.ssh_config(USER).read_text().splitlines() if "ProxyCommand" not in line]
    aliases = [f"Host {alias}\n  HostName {_ALIAS_ADDRESS.format(alias[1:])}\n  HostKeyAlias {node}"
               for alias, node in ALIASES.items()]
    return "\n".join([*aliases, *lines]).replace("Host inner head gpu*", "Host *") + "\n"


def _give_addresses(bed: Testbed) -> None:
    for node in GPU_NODES:
        own = [_ALIAS_ADDRESS.format(alias[1:]) for alias, at in ALIASES.items() if at == node]
        bed.sh(node, 'for one; do ip addr add "$one/24" dev eth0; done', *own)


def _cluster_yaml(path: Path, ssh_config: Path) -> Path:
    def node(host: str, workdir: str) -> dict:
        return {"via": "ssh", "host": host, "workdir": workdir, "env": {"python": sys.executable}}

    nodes = {name: node(name, WORKDIR) for name in GPU_NODES}
    nodes |= {alias: node(alias, WORKDIR) for alias in ALIASES}
    path.write_text(json.dumps({"ssh_config": str(ssh_config), "nodes": nodes}))  # JSON is YAML
    return path


def settle(word: str) -> None:
    """Until no process has `word` in its command line: one round must not weigh on the next."""
    def gone() -> str:
        lines = (" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))
        return "" if any(word in line for line in lines) else "gone"

    poll(f"end of {word}", gone)


def poll(what: str, look: Callable[[], str | None], timeout_s: float = 30) -> str:
    """The first answer of `look`. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s:g} s still no {what}")
        time.sleep(0.01)
    return found
