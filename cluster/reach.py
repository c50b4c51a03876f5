"""The bytes between here and an sshd, before anybody logs in: TCP, or the host's ProxyCommand."""
from __future__ import annotations

import socket
import subprocess
import tempfile

from cluster.errors import Unreachable
from cluster.sshconfig import Target


def tcp(target: Target, timeout_s: float) -> socket.socket:
    """A connection to the port of its sshd. Raises Unreachable."""
    where = f"{target.hostname} port {target.port}"
    try:
        connection = socket.create_connection((target.hostname, target.port), timeout_s)
    except socket.gaierror as error:
        raise Unreachable(f"its name {target.hostname!r} is not known ({error.strerror})", target.name,
                          f"check HostName in the ssh configuration; try: {target.command}") from None
    except ConnectionRefusedError:
        raise Unreachable(f"{where} refuses the connection: no sshd runs there", target.name) from None
    except TimeoutError:
        raise Unreachable(f"{where} did not answer in {timeout_s:g} s: it is down, or a firewall is between",
                          target.name) from None
    except OSError as error:
        raise Unreachable(f"{where}: {error.strerror or error}", target.name) from None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class ProxyCommand:
    """The ProxyCommand of a host, run as ssh runs it, as a socket."""

    def __init__(self, target: Target) -> None:
        self.socket, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()
        with theirs:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {target.proxy_command}"], stdin=theirs, stdout=theirs,
                stderr=self._errors, start_new_session=True)

    def last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        self.socket.close()
        self._process.terminate()
        self._process.wait()
        self._errors.close()
