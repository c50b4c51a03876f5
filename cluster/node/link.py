"""One connection between the supervisors of two nodes that run a job together.

    node 0                                        node K
      <- {"node": K, "nonce": …, "hostname": …, "t": …}
      -> {"nonce": …, "mac": of both nonces}      only who has the job's token can make it
      <- {"mac": of both nonces}
      <> MAC JSON                                 one line per message, numbered and signed; beats every 5 s

A peer that says nothing for 15 s is lost, whatever TCP still believes. A thread of its own reads, writes and beats:
neither a disk that hangs nor a look at ten thousand processes makes a living supervisor look dead.
"""
from __future__ import annotations

import contextlib
import hmac
import json
import os
import select
import socket
import threading
import time
from collections import deque
from typing import Any

BEAT_S = 5.0
SILENT_S = 15.0
HANDSHAKE_S = 5.0
LINE_MAX = 4 << 20  # of one message; a stranger who sends more without a newline is cut off
_HELLO_MAX = 4096
_GOODBYE_S = 2.0  # for what is still to be sent when it is closed

Message = dict[str, Any]


class NotOurs(Exception):
    """Whoever is at the other end does not know the job's token, or does not speak as it should."""


class Link:
    """`descriptor` is readable while there is news: a message, or that the peer is lost."""

    def __init__(self, connection: socket.socket, session: bytes, side: str, peer: Message) -> None:
        self.peer = peer  # what it said of itself
        self.address = connection.getsockname()[0].removeprefix("::ffff:")  # ours, as the peer reaches it
        self.lost = ""  # why; empty while it lives
        self.descriptor, self._news = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poked, self._poke = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._connection = connection
        self._seals = _Seal(session, side), _Seal(session, "member" if side == "leader" else "leader")
        self._inbox: deque[Message] = deque()
        self._outbox: deque[Message] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._live, name="link", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Never blocks; what a lost peer did not get is forgotten."""
        self._outbox.append(message)
        self._wake()

    def received(self) -> list[Message]:
        """What has come since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 4096)
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def close(self) -> None:
        """What was sent is still delivered, if that is soon done. Not to be used afterwards."""
        self._closing = True
        self._wake()
        self._thread.join(_GOODBYE_S + 1.0)
        for descriptor in (self.descriptor, self._news, self._poked, self._poke):
            os.close(descriptor)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._poke, b"!")

    def _live(self) -> None:
        try:
            self._talk()
        except (OSError, NotOurs) as error:
            self.lost = getattr(error, "strerror", None) or str(error)
        self.lost = self.lost or "closed"
        self._connection.close()
        with contextlib.suppress(BlockingIOError):
            os.write(self._news, b"!")

    def _talk(self) -> None:
        poll, out, rest = select.poll(), b"", b""
        poll.register(self._poked, select.POLLIN)
        said = heard = time.monotonic()
        until = None
        self._connection.setblocking(False)
        while True:
            now = time.monotonic()
            if self._closing:
                until = until or now + _GOODBYE_S
                if now > until or not out and not self._outbox:
                    return
            if now - heard > SILENT_S:
                raise NotOurs(f"nothing heard for {SILENT_S:g} s")
            if now - said >= BEAT_S:
                said = now
                self._outbox.append({})
            while self._outbox:
                out += self._seals[0].sealed(self._outbox.popleft())
            poll.register(self._connection, select.POLLIN | (select.POLLOUT if out else 0))
            poll.poll(1000 * max(0.0, min(said + BEAT_S, heard + SILENT_S, until or now + BEAT_S) - now) + 1)
            with contextlib.suppress(BlockingIOError):
                os.read(self._poked, 4096)
            if out:
                with contextlib.suppress(BlockingIOError, ConnectionError):  # what was said before is read
                    out = out[self._connection.send(out):]
            with contextlib.suppress(BlockingIOError):
                block = self._connection.recv(1 << 16)
                if not block:
                    raise NotOurs("the connection was closed")
                heard = time.monotonic()
                rest = self._take(rest + block)

    def _take(self, received: bytes) -> bytes:
        """-> what belongs to a line that has not come whole."""
        *lines, rest = received.split(b"\n")
        if len(rest) > LINE_MAX:
            raise NotOurs("a line without an end")
        for message in filter(None, map(self._seals[1].opened, lines)):
            self._inbox.append(message)
            with contextlib.suppress(BlockingIOError):
                os.write(self._news, b"!")
        return rest


class _Seal:
    """Signs the messages of one direction, in order: none can be added, changed, left out or repeated."""

    def __init__(self, session: bytes, side: str) -> None:
        self._key, self._number = _mac(session, side), 0

    def sealed(self, message: Message) -> bytes:
        text = json.dumps(message).encode()
        return self._next(text) + b" " + text + b"\n"

    def opened(self, line: bytes) -> Message:
        """Raises NotOurs."""
        mac, _, text = line.partition(b" ")
        if not hmac.compare_digest(mac, self._next(text)):
            raise NotOurs("a message that the job's other supervisors did not send")
        return json.loads(text)

    def _next(self, text: bytes) -> bytes:
        self._number += 1
        return _mac(self._key, f"{self._number}".encode() + b" " + text).hex()[:32].encode()


def receive_member(connection: socket.socket, token: str) -> Link:
    """Node 0's side. Raises NotOurs and OSError."""
    _prepare(connection)
    hello = _read_line(connection)
    mine = os.urandom(16).hex()
    nonces = f"{hello.get('nonce')} {mine}"
    _write_line(connection, {"nonce": mine, "mac": _proof(token, "leader", nonces)})
    _check(_read_line(connection), token, "member", nonces, hello)
    return Link(connection, _mac(token.encode(), f"session {nonces}"), "leader", hello)


def greet_leader(connection: socket.socket, token: str, me: Message) -> Link:
    """The side of another node. Raises NotOurs and OSError."""
    _prepare(connection)
    hello = {**me, "nonce": os.urandom(16).hex()}
    _write_line(connection, hello)
    answer = _read_line(connection)
    nonces = f"{hello['nonce']} {answer.get('nonce')}"
    _check(answer, token, "leader", nonces)
    _write_line(connection, {"mac": _proof(token, "member", nonces, hello)})
    return Link(connection, _mac(token.encode(), f"session {nonces}"), "member", answer)


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(HANDSHAKE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _proof(token: str, side: str, nonces: str, hello: Message | None = None) -> str:
    return _mac(token.encode(), f"{side} {nonces} {json.dumps(hello, sort_keys=True)}").hex()


def _check(said: Message, token: str, side: str, nonces: str, hello: Message | None = None) -> None:
    if not hmac.compare_digest(str(said.get("mac")).encode(), _proof(token, side, nonces, hello).encode()):
        raise NotOurs(f"the {side} does not know the job's token")


def _mac(key: bytes, text: str | bytes) -> bytes:
    return hmac.new(key, text.encode() if isinstance(text, str) else text, "sha256").digest()


def _write_line(connection: socket.socket, message: Message) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read_line(connection: socket.socket) -> Message:
    """Byte by byte, as what follows the handshake belongs to the link; three short lines in all."""
    line, until = b"", time.monotonic() + HANDSHAKE_S
    while not line.endswith(b"\n"):
        block = connection.recv(1)
        line += block
        if not block or len(line) > _HELLO_MAX or time.monotonic() > until:
            raise NotOurs("it does not say who it is")
    try:
        said = json.loads(line)
    except ValueError:
        raise NotOurs("it speaks another language") from None
    if not isinstance(said, dict):
        raise NotOurs("it speaks another language")
    return said
