"""What the person's own ssh says about a host: `ssh -G` is asked once, so Include, Match and tokens mean what
they mean.
"""
from __future__ import annotations

import glob
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import Unusable

_NONE = ("none", "")
_JUMP = re.compile(r"\[(?P<v6>[^]]+)\](?::(?P<p6>\d+))?|(?P<host>[^:]+)(?::(?P<port>\d+))?|(?P<bare>.+)")


@dataclass(frozen=True)
class Target:
    """One host as OpenSSH would reach it."""

    name: str  # what a person calls it
    config: str | None  # the configuration file given with -F
    hostname: str
    port: int
    user: str
    identities: tuple[Path, ...]  # private keys, or the public ones of keys in the agent, that exist here
    identities_only: bool
    agent: str | None  # socket of the ssh agent; None: not to be asked
    jumps: tuple[str, ...]  # [user@]host[:port], first hop first
    proxy_command: str | None
    known_hosts: tuple[Path, ...]
    key_alias: str | None  # HostKeyAlias
    timeout_s: float

    @property
    def key_name(self) -> str:
        """The name under which known_hosts has the host."""
        if self.key_alias:
            return self.key_alias
        return self.hostname if self.port == 22 else f"[{self.hostname}]:{self.port}"

    @property
    def command(self) -> str:
        """What a person types to try it."""
        config = f"-F {shlex.quote(self.config)} " if self.config else ""
        return f"ssh {config}{shlex.quote(self.name)}"


def resolve(name: str, config: str | None, timeout_s: float, user: str | None = None,
            port: int | None = None) -> Target:
    """Raises Unusable: no ssh program here, or a configuration it does not accept."""
    path = str(Path(config).expanduser()) if config else None
    options = (("-F", path), ("-l", user), ("-p", port))
    given = [word for option, value in options if value for word in (option, str(value))]
    try:
        done = subprocess.run(["ssh", "-G", *given, "--", name], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True)
    except FileNotFoundError:
        raise Unusable("there is no ssh program on this computer",
                       hint="apt-get install openssh-client") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unusable(f"ssh does not accept its configuration: {said[-1]}", name)
    return parse(done.stdout, name, path, timeout_s)


def parse(text: str, name: str, config: str | None, timeout_s: float) -> Target:
    """The output of `ssh -G name`."""
    said: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        said.setdefault(key.lower(), []).append(value)

    def one(key: str) -> str | None:
        value = said.get(key, ["none"])[0]
        return None if value in _NONE else value

    tokens = {"h": one("hostname") or name, "n": name, "p": one("port") or "22", "r": one("user") or "",
              "u": os.environ.get("USER", ""), "d": str(Path.home()), "%": "%"}
    identities = [Path(_expanded(value, tokens)).expanduser() for value in said.get("identityfile", [])]
    known = [word for key in ("userknownhostsfile", "globalknownhostsfile") for value in said.get(key, [])
             for word in shlex.split(value)]
    timeout = one("connecttimeout")
    proxy_command = one("proxycommand")
    return Target(
        name=name, config=config, hostname=tokens["h"], port=int(tokens["p"]), user=tokens["r"],
        identities=tuple(path for path in identities if path.is_file() or Path(f"{path}.pub").is_file()),
        identities_only=one("identitiesonly") == "yes",
        agent=_agent(said.get("identityagent", ["SSH_AUTH_SOCK"])[0]),
        jumps=tuple((one("proxyjump") or "").split(",")) if one("proxyjump") else (),
        proxy_command=_expanded(proxy_command, tokens) if proxy_command else None,
        known_hosts=tuple(Path(_expanded(word, tokens)).expanduser() for word in known if word not in _NONE),
        key_alias=one("hostkeyalias"), timeout_s=float(timeout or 0) or timeout_s)


def host_names(config: str | None, depth: int = 8) -> list[str]:
    """The hosts that a configuration names, in its order, Includes followed; patterns name no host.

    Raises Unusable: the file that was named cannot be read. A person without any configuration knows no hosts.
    """
    path = Path(config or "~/.ssh/config").expanduser()
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        if config is None:
            return []
        raise Unusable(f"{path} cannot be read: {error.strerror}") from None
    found: dict[str, None] = {}
    for line in lines:
        keyword, *words = _words(line)
        if keyword == "host":
            found.update(dict.fromkeys(word for word in words if not set(word) & set("*?!")))
        elif keyword == "include" and depth:
            files = [name for word in words for name in sorted(glob.glob(str(_included(word))))]
            found.update(dict.fromkeys(name for file in files for name in host_names(file, depth - 1)))
    return list(found)


def _words(line: str) -> list[str]:
    """`Host a b`, `Host=a`: the keyword in small letters and its words."""
    try:
        keyword, *words = shlex.split(line.replace("=", " ", 1) if "=" in line.split(" ")[0] else line, comments=True)
    except ValueError:
        return [""]
    return [keyword.lower(), *(word for word in words if word != "=")]


def _included(word: str) -> Path:
    path = Path(word).expanduser()
    return path if path.is_absolute() else Path("~/.ssh").expanduser() / path


def split_jump(jump: str) -> tuple[str, str | None, int | None]:
    """`[user@]host[:port]` or `ssh://…` -> (host, user, port)."""
    user, _, rest = jump.removeprefix("ssh://").rpartition("@")
    found = _JUMP.fullmatch(rest)
    if not found:
        raise Unusable(f"ProxyJump {jump!r} names no host")
    port = found["p6"] or found["port"]
    return found["v6"] or found["host"] or found["bare"], user or None, int(port) if port else None


def _expanded(value: str, tokens: dict[str, str]) -> str:
    return re.sub(r"%(.)", lambda found: tokens.get(found[1], found[0]), value)


def _agent(value: str) -> str | None:
    if value == "none":
        return None
    if value in ("SSH_AUTH_SOCK", ""):
        return os.environ.get("SSH_AUTH_SOCK") or None
    if value.startswith("$"):
        return os.environ.get(value[1:]) or None
    return str(Path(value).expanduser())
