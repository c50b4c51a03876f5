"""What a person has on their own computer: an ssh configuration, known hosts, an agent."""
from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .bed import Bed


def client_config(
    bed: Bed, user: str, folder: Path, *, unknown: Collection[str] = (), wrong_key: Collection[str] = (),
    agent_only: bool = False, include: bool = False,
) -> Path:
    """A variant of `bed.ssh_config(user)`, written into `folder`.

    unknown: nodes whose key is not in known_hosts. wrong_key: nodes for which it holds another key.
    agent_only: names no key file. include: the file holds nothing but an `Include` of the real one.
    """
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(_known_hosts(bed, unknown, wrong_key))
    lines = bed.ssh_config(user).read_text().splitlines()
    if agent_only:
        lines = [line for line in lines if not line.strip().startswith("Identit")]
    text = "\n".join(lines) + "\n"
    config = folder / f"config.{user}"
    config.write_text(text.replace(str(bed.root / "ssh" / "known_hosts"), str(known_hosts)))
    if not include:
        return config
    including = folder / f"config.{user}.include"
    including.write_text(f"Include {config}\n")
    return including


def _known_hosts(bed: Bed, unknown: Collection[str], wrong_key: Collection[str]) -> str:
    lines = (bed.root / "ssh" / "known_hosts").read_text().splitlines()
    names = {line.split(",")[0]: line for line in lines}
    keys = {name: line.split(" ", 1)[1] for name, line in names.items()}
    other = {name: next(key for host, key in keys.items() if host != name) for name in wrong_key}
    kept = [
        f"{line.split(' ', 1)[0]} {other.get(name, keys[name])}"
        for name, line in names.items() if name not in unknown
    ]
    return "\n".join(kept) + "\n"


@contextmanager
def ssh_agent(bed: Bed, user: str, folder: Path) -> Iterator[dict[str, str]]:
    """An agent that holds the user's key; yields the environment that points to it."""
    socket = folder / "agent.sock"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.PIPE)
    assert agent.stdout is not None
    agent.stdout.readline()  # printed once it listens
    env = {"SSH_AUTH_SOCK": str(socket)}
    try:
        subprocess.run(
            ["ssh-add", "-q", str(bed.root / "ssh" / f"id_{user}")], env={**os.environ, **env}, check=True
        )
        yield env
    finally:
        agent.send_signal(signal.SIGTERM)
        agent.wait()
        agent.stdout.close()
        socket.unlink(missing_ok=True)


@contextmanager
def open_master(bed: Bed, user: str, node: str, folder: Path) -> Iterator[Path]:
    """Somebody typed a one-time code at `node`: yields a configuration with no key, in which that connection is open
    and nothing but the ssh program can use it.
    """
    socket = Path(f"/tmp/master-{os.getpid()}")  # a socket's path must be short
    config = client_config(bed, user, folder, agent_only=True)
    text = config.read_text()
    config.write_text(f"Host {node}\n  ControlPath {socket}\n  IdentityFile none\n  IdentityAgent none\n{text}")
    command = ["ssh", "-F", str(config)]
    key = str(bed.root / "ssh" / f"id_{user}")
    # Its stderr stays open as long as the connection: nobody may wait for the end of a pipe.
    subprocess.run([*command, "-i", key, "-o", "ControlMaster=yes", "-o", "ControlPersist=yes", "-N", "-f", node],
                   check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30)
    try:
        yield config
    finally:
        subprocess.run([*command, "-O", "exit", node], check=True, capture_output=True, timeout=30)
