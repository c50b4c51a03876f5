"""A running test bed: commands on its nodes, files there, and what a client needs to reach them."""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

SCRIPT = Path(__file__).with_name("testbed.sh")
REPOSITORY = Path(__file__).resolve().parents[2]
NODES = ("head", "gpu01", "gpu02", "gpu03", "gpu04", "gpu05")
USERS = ("alice", "bob")


class TestbedError(Exception):
    """A command of the test bed, or one on a node, failed."""

    __test__ = False


def poll(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether `condition` became true within the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def unavailable() -> str | None:
    """Why this machine cannot run the test bed, or None."""
    if sys.platform != "linux":
        return "the SSH test bed needs Linux namespaces"
    if os.geteuid() != 0 and not _sudo_works():
        return "the SSH test bed needs root, or sudo without a password"
    try:
        as_root(["unshare", "--net", "--uts", "--pid", "--mount", "--ipc", "--fork", "true"])
    except (TestbedError, FileNotFoundError) as error:
        return f"the SSH test bed cannot make namespaces here: {error}"
    return None


def _sudo_works() -> bool:
    try:
        return subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def as_root(
    argv: list[str], *, input: str | None = None, check: bool = True, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a command of this machine as root. Raises TestbedError when it fails."""
    if os.geteuid() != 0:
        argv = ["sudo", "-n", *argv]
    # No pipe is held by what outlives the command: a node's daemons write to files of their own.
    done = subprocess.run(
        argv, input=input, stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True, text=True, timeout=timeout_s,
    )
    if check and done.returncode != 0:
        output = (done.stderr + done.stdout).strip()
        raise TestbedError(f"{' '.join(argv)} ended with {done.returncode}: {output}")
    return done


class Bed:
    """One instance of the test bed; several live side by side under different names."""

    def __init__(self, name: str, home: str = "shared", binds: Iterable[Path] | None = None) -> None:
        self.name = name
        self.home = home
        self.slurm_setting = "off"
        self.binds = tuple(default_binds() if binds is None else binds)
        self.owner: int | None = os.getpid()  # None: it stays until `down`
        self.root = Path(f"/srv/launch-testbed.{name}")

    def command(self, *argv: str) -> list[str]:
        """The command line of the script for this bed; it needs root."""
        settings = {
            "TB_NAME": self.name,
            "TB_HOME": self.home,
            "TB_SLURM": self.slurm_setting,
            "TB_BIND": "\n".join(map(str, self.binds)),
            "TB_OWNER": str(self.owner or ""),
        }
        env = [f"{key}={value}" for key, value in settings.items()]
        return ["env", *env, str(SCRIPT), *argv]

    def script(self, *argv: str, **how: object) -> subprocess.CompletedProcess[str]:
        return as_root(self.command(*argv), **how)  # type: ignore[arg-type]

    def up(self) -> None:
        self.script("up")

    def down(self) -> None:
        self.script("down")

    # -------------------------------------------------------------------------------------- on a node
    def exec(
        self, node: str, *argv: str, user: str | None = None, input: str | None = None,
        check: bool = True, timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, in the user's home directory, without ssh. Raises TestbedError."""
        as_user = ["-u", user or "root"]
        return self.script("exec", node, *as_user, *argv, input=input, check=check, timeout_s=timeout_s)

    def sh(self, node: str, line: str, *args: str, user: str | None = None, input: str | None = None) -> str:
        """Run a line of POSIX sh on a node, `args` being its $1, $2, ...; its stdout."""
        return self.exec(node, "sh", "-ec", line, "sh", *args, user=user, input=input).stdout

    def write(self, node: str, path: str, text: str, user: str | None = None, mode: str = "644") -> None:
        line = 'mkdir -p "$(dirname "$1")"; cat >"$1"; chmod "$2" "$1"'
        self.sh(node, line, path, mode, user=user, input=text)

    def read(self, node: str, path: str, user: str | None = None) -> str:
        return self.exec(node, "cat", path, user=user).stdout

    def fault(self, node: str, action: str, *args: str) -> None:
        """Inject a fault; the actions are in testbed.sh. Prefer the context managers, which undo it."""
        self.script("fault", node, action, *args)

    # -------------------------------------------------------------------------------------- what is there
    def processes(self) -> list[str]:
        """The users' processes on all nodes, one line each: node, pid on the host, user, command."""
        return self.script("ps").stdout.splitlines()

    def sweep(self) -> None:
        """Kill every process of the users on all nodes."""
        self.script("sweep")

    def mounts(self) -> list[str]:
        """The mount table of all nodes, one line each: node, directory."""
        return sorted(self.script("mounts").stdout.splitlines())

    def powered_off(self) -> list[str]:
        lines = self.script("status").stdout.splitlines()
        return [line.split()[0] for line in lines if line.endswith("powered off")]

    # -------------------------------------------------------------------------------------- for clients
    def ssh_config(self, user: str) -> Path:
        """An OpenSSH configuration that reaches every node, and `inner` (gpu05 behind head), as `user`."""
        return self.root / "ssh" / f"config.{user}"

    def cluster_yaml(
        self, path: Path, user: str, nodes: Iterable[str], workdir: str,
        ssh_config: Path | None = None, **node_extra: object,
    ) -> Path:
        """Write a cluster.yaml with these nodes; `node_extra` adds or replaces keys of every node."""
        common = {
            "via": "ssh",
            "workdir": workdir,
            "env": {"python": sys.executable},
            "data": str(REPOSITORY / "data"),
            **node_extra,
        }
        cluster = {
            "ssh_config": str(ssh_config or self.ssh_config(user)),
            "nodes": {node: {"host": node, **common} for node in nodes},
        }
        path.write_text(yaml.safe_dump(cluster, sort_keys=False))
        return path


def default_binds() -> list[Path]:
    """Host directories that a job needs on a node: this checkout, its Python, and the data beside it."""
    wanted = [REPOSITORY, REPOSITORY.parent / "shared", Path(sys.base_prefix), Path(sys.prefix)]
    if "LAUNCH_SHARED" in os.environ:
        wanted.append(Path(os.environ["LAUNCH_SHARED"]))
    existing = {path.resolve() for path in wanted if path.exists()}
    return sorted(path for path in existing if not any(parent in existing for parent in path.parents))
