"""Asking a node through ssh: one connection, opened when first needed, one exec per question.

The only file that knows fabric and paramiko, and turns their exceptions into ours.
"""
from __future__ import annotations

import base64
import contextlib
import importlib
import logging
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import hostkeys, wire
from cluster.errors import ClusterError, Unreachable
from cluster.inventory import Node
from cluster.reach import ProxyCommand, tcp
from cluster.remote import BLOCK, SILENCE_S, Pipe, RemoteShell
from cluster.sshconfig import Target, resolve, split_jump

if TYPE_CHECKING:
    from fabric import Connection
    from paramiko import Channel, MissingHostKeyPolicy, PKey, Transport

KEEPALIVE_S = 5
_WINDOW = 4 << 20  # bytes on their way at most: what a slow reader keeps in memory
_LOGIN_S = 15.0
_loading = threading.Lock()
_RETRIES = 4  # sshd drops new connections at random when many come at once (MaxStartups)


class SshShell(RemoteShell):
    """By fabric, with what the person's own ssh configuration says. Never asks anything."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        if "fabric" not in sys.modules:  # it takes long to load: meanwhile ssh says what it knows of the host
            threading.Thread(target=_load_libraries, daemon=True).start()
        self._lock = threading.Lock()
        self._links: list[_Link] = []  # the way to the node, jump hosts first

    @contextlib.contextmanager
    def open_pipe(self, deadline: float | None) -> Iterator[Pipe]:
        link = self._link(deadline)
        channel = link.session()
        try:
            yield _ChannelPipe(channel)
        finally:
            channel.close()

    def close(self) -> None:
        """A thread that is still connecting to a dead node holds the lock: nobody who gave it up waits for
        it.
        """
        if self._lock.acquire(blocking=False):
            _close(self._links)
            self._lock.release()

    def _link(self, deadline: float | None) -> _Link:
        with self._lock:
            if self._links and not self._links[-1].alive:
                _close(self._links)
            if not self._links:
                self._links = _connect(self._node, deadline)
            return self._links[-1]


def _load_libraries() -> None:
    """In one thread at a time: paramiko's modules import each other in circles, which fails when two threads
    do it.
    """
    with _loading:
        importlib.import_module("fabric")


def _close(links: list[_Link]) -> None:
    while links:
        links.pop().close()


class _ChannelPipe:
    """A channel of the connection itself: fabric's own `run` is quadratic in the output and polls while idle.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._errors = bytearray()

    def send(self, content: bytes) -> None:
        self._channel.settimeout(SILENCE_S)
        self._channel.sendall(content)

    def receive(self, limit: int, timeout_s: float) -> bytes:
        self._channel.settimeout(timeout_s)
        block = self._channel.recv(limit)
        self._drain_errors()
        return block

    def errors(self) -> bytes:
        self._drain_errors()
        return bytes(self._errors)

    def exit_code(self) -> int | None:
        self._channel.status_event.wait(SILENCE_S)
        code = self._channel.recv_exit_status() if self._channel.exit_status_ready() else -1
        return code if code >= 0 else None

    def _drain_errors(self) -> None:
        while self._channel.recv_stderr_ready():
            self._errors += self._channel.recv_stderr(BLOCK)
            del self._errors[:-BLOCK]


# --- connections --------------------------------------------------------------------------------------------

def _connect(node: Node, deadline: float | None) -> list[_Link]:
    """The way to a node, jump hosts first. Raises Unreachable or Unusable."""
    links: list[_Link] = []
    try:
        _extend(links, resolve(node.ssh_name, node.ssh_config, node.connect_timeout_s), node, deadline)
    except ClusterError as error:
        _close(links)
        via = f"{error.node}: " if error.node not in (None, node.name, node.ssh_name) else ""
        raise type(error)(via + error.what, node.name, error.hint) from None
    return links


def _extend(links: list[_Link], target: Target, node: Node, deadline: float | None) -> None:
    """Add the links to `target`: the first jump host by its own configuration, the others through the one
    before.
    """
    for number, jump in enumerate(target.jumps):
        host, user, port = split_jump(jump)
        hop = resolve(host, node.ssh_config, node.connect_timeout_s, user, port)
        if number == 0:
            _extend(links, hop, node, deadline)
        else:
            links.append(_open(hop, links[-1], deadline))
    links.append(_open(target, links[-1] if links and target.jumps else None, deadline))


def _open(target: Target, through: _Link | None, deadline: float | None) -> _Link:
    """Connect and log in; again after a short pause when sshd dropped us before it said anything."""
    for attempt in range(_RETRIES):
        timeout_s = target.timeout_s
        if deadline is not None:
            timeout_s = min(timeout_s, max(0.1, deadline - time.monotonic()))
        try:
            return _Link(target, through, timeout_s)
        except _Dropped as error:
            dropped = error
            time.sleep(random.uniform(0.1, 0.3) * 2**attempt)
            if deadline is not None and time.monotonic() > deadline:
                break
    raise Unreachable(f"it closes every connection at once ({dropped})", target.name,
                      f"try: {target.command}")


class _Dropped(Exception):
    """The connection ended before sshd said anything."""


class _Link:
    """One ssh connection, logged in."""

    def __init__(self, target: Target, through: _Link | None, timeout_s: float) -> None:
        """Raises Unreachable or _Dropped; nothing is left open then."""
        self._target = target
        self._proxy = ProxyCommand(target) if target.proxy_command and not through else None
        self._socket: Any = None
        with contextlib.ExitStack() as undo:
            undo.callback(self._close_below)
            try:
                self._socket = self._reach(through, timeout_s)
                self._connection = _login(target, self._socket, timeout_s)
            except _Dropped:
                said = self._proxy.last_words() if self._proxy else ""
                if said and "reset by peer" not in said:
                    raise Unreachable(f"its ProxyCommand failed: {said}", target.name,
                                      f"try: {target.command}") from None
                raise
            undo.pop_all()

    @property
    def alive(self) -> bool:
        transport = self._connection.transport
        return transport is not None and transport.is_active()

    def session(self) -> Channel:
        with self._translated():
            channel = self._connection.transport.open_session(window_size=_WINDOW, timeout=SILENCE_S)
            channel.exec_command(wire.LINE)
            return channel

    def tunnel(self, host: str, port: int, timeout_s: float) -> Channel:
        from paramiko import ChannelException
        with self._translated():
            try:
                return self._connection.transport.open_channel(
                    "direct-tcpip", (host, port), ("", 0), window_size=_WINDOW, timeout=timeout_s)
            except ChannelException as error:
                raise Unreachable(f"from there {host} port {port} cannot be reached ({error.text or error})",
                                  self._target.name) from None

    def close(self) -> None:
        self._connection.close()
        self._close_below()

    def _close_below(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._proxy:
            self._proxy.close()

    def _reach(self, through: _Link | None, timeout_s: float) -> Any:
        target = self._target
        if through:
            return through.tunnel(target.hostname, target.port, timeout_s)
        return self._proxy.socket if self._proxy else tcp(target, timeout_s)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        from paramiko import ChannelException, SSHException
        try:
            yield
        except ChannelException as error:
            raise Unreachable(f"it opens no channel: {error.text or error}", self._target.name) from None
        except (SSHException, OSError, EOFError) as error:
            why = str(error) or type(error).__name__
            raise Unreachable(f"the connection broke ({why})", self._target.name) from None


# --- logging in ---------------------------------------------------------------------------------------------

def _login(target: Target, reached: Any, timeout_s: float) -> Connection:
    """A fabric connection over what has been reached. Raises Unreachable or _Dropped."""
    known = hostkeys.known_keys(target)
    _load_libraries()
    import paramiko
    from fabric import Config, Connection
    logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else its tracebacks reach stderr
    keys = _keys(target)
    connection = Connection(
        target.hostname, user=target.user, port=target.port, connect_timeout=max(1, int(timeout_s)),
        config=Config(ssh_config=paramiko.SSHConfig(), lazy=True),
        connect_kwargs={
            "sock": reached, "auth_strategy": keys, "banner_timeout": timeout_s, "auth_timeout": _LOGIN_S,
            "channel_timeout": SILENCE_S, "transport_factory": _transport_preferring(known)})
    connection.client.set_missing_host_key_policy(_policy(target, known))
    begun = time.monotonic()
    try:
        connection.open()
    except (paramiko.SSHException, ClusterError, OSError, EOFError) as error:
        connection.client.close()
        if isinstance(error, ClusterError):
            raise
        raise _login_failed(error, target, keys.tried(), time.monotonic() - begun >= timeout_s) from None
    finally:
        keys.close()
    connection.transport.set_keepalive(KEEPALIVE_S)
    return connection


def _login_failed(error: Exception, target: Target, tried: str, late: bool) -> Exception:
    from paramiko import AuthenticationException, SSHException
    if isinstance(error, AuthenticationException):
        return Unreachable(f"it does not let {target.user} in ({tried})", target.name,
                           f"try: {target.command}")
    if late:
        return Unreachable("it was reached, but its sshd does not answer", target.name,
                           "it may be overloaded, or one of its file systems hangs")
    if isinstance(error, SSHException) and "banner" not in str(error):
        return Unreachable(f"no connection ({error})", target.name, f"try: {target.command}")
    return _Dropped(str(error) or type(error).__name__)


def _transport_preferring(known: list[hostkeys.KnownKey]) -> Callable[..., Transport]:
    """Makes transports that ask for a host key of a kind that is known, as ssh does: a host has several."""
    from paramiko import Transport
    kinds = {key.kind for key in known if not key.marker}

    def make(reached: Any, **options: Any) -> Transport:
        transport = Transport(reached, **options)
        security = transport.get_security_options()
        security.key_types = sorted(
            security.key_types, key=lambda kind: ("ssh-rsa" if kind[:4] == "rsa-" else kind) not in kinds)
        security.ciphers = sorted(security.ciphers, key=lambda cipher: "gcm" not in cipher)  # half the CPU
        return transport

    return make


def _policy(target: Target, known: list[hostkeys.KnownKey]) -> MissingHostKeyPolicy:
    """paramiko itself is told of no known host, so every key comes to this policy; it accepts none by itself.
    """
    from paramiko import MissingHostKeyPolicy

    class Policy(MissingHostKeyPolicy):
        def missing_host_key(self, _client: object, _name: str, key: PKey) -> None:
            hostkeys.check(target, key.get_name(), key.get_base64(), key.fingerprint, known)

    return Policy()


def _keys(target: Target) -> Any:
    """How to log in, in the order of ssh: keys of the agent that the configuration names, the agent's others
    (not with IdentitiesOnly), key files. Never a password, never a question.
    """
    from paramiko import SSHException
    from paramiko.auth_strategy import AuthSource, AuthStrategy, InMemoryPrivateKey, NoneAuth

    class Keys(AuthStrategy):
        def __init__(self) -> None:
            super().__init__(ssh_config=None)
            self._tried: list[str] = []
            self._agent: Any = None

        def get_sources(self) -> Iterator[AuthSource]:
            named = {blob: path for path in target.identities if (blob := _public_blob(path))}
            held = self._held()
            for key in sorted(held, key=lambda key: key.asbytes() not in named):
                if key.asbytes() in named or not target.identities_only:
                    self._tried.append(f"{key.get_name()} of the agent")
                    yield InMemoryPrivateKey(target.user, key)
            blobs = {key.asbytes() for key in held}
            for path in target.identities:
                try:
                    key = _private_key(path)
                except SSHException as error:
                    self._tried.append(f"{path}: {error}")
                    continue
                if key and key.asbytes() not in blobs:
                    self._tried.append(str(path))
                    yield InMemoryPrivateKey(target.user, key)
            yield NoneAuth(target.user)

        def _held(self) -> list[PKey]:
            try:
                self._agent = _agent(target.agent) if target.agent else None
            except (OSError, SSHException):  # no agent is no error: there may be key files
                return []
            return list(self._agent.get_keys()) if self._agent else []

        def close(self) -> None:
            if self._agent:
                self._agent.close()

        def tried(self) -> str:
            if not self._tried:
                return "there is no key and no agent to try"
            return "tried: " + ", ".join(self._tried)

    return Keys()


def _public_blob(path: Path) -> bytes | None:
    """Of an identity file, or of the .pub beside it."""
    for public in (path, path.with_name(path.name + ".pub")):
        try:
            words = public.read_text().split()
            if len(words) >= 2 and words[0].startswith(("ssh-", "ecdsa-", "sk-")):
                return base64.b64decode(words[1])
        except (OSError, ValueError):
            continue
    return None


def _private_key(path: Path) -> PKey | None:
    """None: there is no private key in that file. Raises SSHException with the reason why it cannot be used.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from paramiko import PKey, SSHException
    from paramiko.pkey import UnknownKeyType
    if not path.is_file() or path.suffix == ".pub":
        return None
    try:
        return PKey.from_path(path)
    except TypeError:  # what cryptography raises for one with a passphrase
        raise SSHException(f"needs its passphrase, so: ssh-add {path}") from None
    except (ValueError, UnknownKeyType, UnsupportedAlgorithm, OSError) as error:
        raise SSHException(f"cannot be used here ({type(error).__name__})") from None


def _agent(path: str) -> Any:
    """The ssh agent at a socket: paramiko's own class knows $SSH_AUTH_SOCK only, not IdentityAgent."""
    from paramiko.agent import AgentSSH

    class Agent(AgentSSH):
        def __init__(self) -> None:
            super().__init__()
            with contextlib.ExitStack() as undo:
                connection = undo.enter_context(socket.socket(socket.AF_UNIX))
                connection.settimeout(_LOGIN_S)
                connection.connect(path)
                self._connect(connection)
                undo.pop_all()

        def close(self) -> None:
            self._close()

    return Agent()
