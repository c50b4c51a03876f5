"""The open sockets of a process, as /proc tells them: whom it talks to, or waits for."""
from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

_MOST = 12
_STATES = {"01": "ESTABLISHED", "02": "SYN_SENT", "03": "SYN_RECV", "04": "FIN_WAIT1", "05": "FIN_WAIT2",
           "06": "TIME_WAIT", "07": "CLOSE", "08": "CLOSE_WAIT", "09": "LAST_ACK", "0A": "LISTEN", "0B": "CLOSING"}


def of(pid: int) -> list[str]:
    """A line for each TCP socket, `tcp 10.0.0.1:40112 -> 10.0.0.2:29500 ESTABLISHED`; none where it may not be seen."""
    open_ones = _inodes(pid)
    found = [line for family in ("tcp", "tcp6") for inode, line in _table(pid, family) if inode in open_ones]
    more = [f"and {len(found) - _MOST} more sockets"] if len(found) > _MOST else []
    return [*found[:_MOST], *more]


def _inodes(pid: int) -> set[str]:
    found = set()
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:  # another person's, or it ended meanwhile
        pass
    return found


def _table(pid: int, family: str) -> Iterator[tuple[str, str]]:
    """(inode, line) of each socket of its network namespace."""
    try:
        rows = Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]
    except OSError:
        return
    for row in rows:
        words = row.split()
        here, there, state = _address(words[1]), _address(words[2]), _STATES.get(words[3], words[3])
        waiting = int(words[4].partition(":")[2], 16)
        line = f"tcp {here}" + ("" if state == "LISTEN" else f" -> {there}") + f" {state}"
        yield words[9], line + (f", {waiting} bytes not read" if waiting and state != "LISTEN" else "")


def _address(text: str) -> str:
    """`0100007F:1F90` -> `127.0.0.1:8080`. The kernel prints words of 32 bits in the machine's order."""
    host, _, port = text.partition(":")
    words = [bytes.fromhex(host[at:at + 8])[::-1] for at in range(0, len(host), 8)]
    raw = b"".join(words)
    name = socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
    return f"{name}:{int(port, 16)}" if len(raw) == 4 else f"[{name}]:{int(port, 16)}"
