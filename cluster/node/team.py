"""Node 0's side of a job on several nodes: where the supervisors of the other nodes come to, and who is here.

team.json in the run directory says where that is; whoever can read it and knows the job's token is let in.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from queue import Empty, SimpleQueue

from cluster.contract import RunDir, write_atomically
from cluster.node.link import Link, Message, NotOurs, receive_member
from cluster.node.loop import Loop
from cluster.node.process import boot_id, hostname
from cluster.spec import JobSpec

CLOCKS_S = 5.0  # nodes whose clocks differ by more are told to a person
_AGAIN_S = 0.1
_STRANGERS = 32  # connections that have not said yet who they are


class Team:
    """Lives as long as its supervisor, through all attempts."""

    def __init__(self, run: RunDir, spec: JobSpec, loop: Loop, allocation: str = "") -> None:
        self.links: dict[int, Link] = {}
        self.gone: dict[int, tuple[float, str]] = {}  # node -> unix time and why, of one that was here
        self.hostnames: dict[int, str] = {}  # of those that were ever here
        self.clocks: dict[int, float] = {}  # node -> seconds that its clock is ahead of ours
        self._run, self._spec, self._loop, self._allocation = run, spec, loop, allocation
        self._arrived: SimpleQueue[Link] = SimpleQueue()
        self._strangers = threading.Semaphore(_STRANGERS)
        self._bell, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._socket = _listening()
        loop.watch(self._bell)
        port = self._socket.getsockname()[1]
        where = {"addresses": addresses(), "port": port, "hostname": hostname(), "boot_id": boot_id(), "t": time.time(),
                 "allocation": allocation}
        self._where = json.dumps(where).encode()
        write_atomically(run.team, self._where, mode=0o600)
        self._thread = threading.Thread(target=self._listen, name="team", daemon=True)
        self._thread.start()

    def look(self) -> list[tuple[int, Message]]:
        """Take in who came and who is lost -> messages, in order, with the node that sent each."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._bell, 4096)
        with contextlib.suppress(Empty):
            while True:
                self._welcome(self._arrived.get_nowait())
        lost = [node for node, link in self.links.items() if link.lost]  # before the messages are read: the last count
        found = [(node, message) for node, link in self.links.items() for message in link.received()]
        for node in lost:
            self._part_with(node)
        return found

    def missing(self) -> list[int]:
        return [node for node in range(1, self._spec.nodes) if node not in self.links]

    def name(self, node: int) -> str:
        """As a person calls it."""
        if node < len(self._spec.hosts):
            return self._spec.hosts[node]
        if node == 0:
            return hostname()
        return self.hostnames.get(node, f"node {node}")

    def names(self, nodes: Iterable[int]) -> str:
        """`gpu02`, `gpu02 (lost 14:02), gpu03`."""
        return ", ".join(self.name(node) + self._since(node) for node in nodes)

    def why_gone(self, node: int) -> str:
        return self.gone[node][1] if node in self.gone else "its supervisor was started anew"

    def close(self, goodbye: Message) -> None:
        """The job has ended: the others need not wait any longer."""
        with contextlib.suppress(OSError):
            if self._run.team.read_bytes() == self._where:  # else that of a newer supervisor
                self._run.team.unlink()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # the thread wakes up
        self._thread.join()
        self._socket.close()
        self.look()
        for link in self.links.values():
            link.send(goodbye)
        for node in list(self.links):
            self._part_with(node)
        self._loop.forget(self._bell)

    def _since(self, node: int) -> str:
        if node not in self.gone:
            return ""
        return time.strftime(" (lost %H:%M)", time.localtime(self.gone[node][0]))

    def _welcome(self, link: Link) -> None:
        node = link.peer.get("node")
        ours = link.peer.get("allocation") == self._allocation
        if not ours or not isinstance(node, int) or not 0 < node < self._spec.nodes:
            link.close()
            return
        if node in self.links:  # it came again before we saw that it had gone
            self._part_with(node)
        self.links[node] = link
        self.hostnames[node] = str(link.peer.get("hostname"))
        self.gone.pop(node, None)
        with contextlib.suppress(KeyError, TypeError):
            self.clocks[node] = link.peer["t"] - link.peer["received"]
        self._loop.watch(link.descriptor)

    def _part_with(self, node: int) -> None:
        link = self.links.pop(node)
        self.gone[node] = (time.time(), link.lost)
        self._loop.forget(link.descriptor)
        link.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EBADF):  # closed
                    return
                time.sleep(_AGAIN_S)  # one that broke before it was taken, or too many open files: others will come
                continue
            self._strangers.acquire()
            threading.Thread(target=self._greet, args=(connection,), name="greet", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            link = receive_member(connection, self._spec.token)
            link.peer["received"] = time.time()
            self._arrived.put(link)
            os.write(self._ring, b"!")
        except (OSError, NotOurs, ValueError):
            connection.close()
        finally:
            self._strangers.release()


def _listening() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    return socket.create_server(("", 0), backlog=64)


def addresses() -> list[str]:
    """Where others may reach this host: its name, then every IPv4 address it has. No question to a name server, which
    may take long to say nothing."""
    try:
        with open("/proc/net/fib_trie") as file:
            found = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", file.read())
    except OSError:
        found = []
    return list(dict.fromkeys([hostname(), *(one for one in found if not one.startswith("127."))]))
