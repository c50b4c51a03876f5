"""The agent's command line. Clients and supervisors use it; a person never has to.

    answer MARK              a request on stdin (a JSON line, then its payload) -> mark, JSON, mark on stdout
    stream MARK              a request on stdin -> mark, newline, frames on stdout until the end
    supervise RUN_DIR --by   the supervisor of one job; prints its pid and goes on detached
    supervise RUN_DIR --node the same of one of the other nodes of a job on several
    allocated RUN_DIR        the same inside a SLURM allocation, in the foreground; exit code 0: the job completed
    sbatch                       a request on stdin: hands jobs to SLURM (cluster/backends/slurm.py)
    notify WORKDIR               tells what ended supervisors could not
    rank …                   becomes one rank below torchrun
"""
from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

KEEPALIVE_S = 5.0  # a client that hears nothing for several of these knows that the link is dead


def main(argv: list[str] | None = None) -> int:
    command, *rest = sys.argv[1:] if argv is None else argv
    match command:
        case "answer":
            return _answer(rest[0])
        case "stream":
            from cluster.node import logs
            return logs.serve(read_request(sys.stdin.buffer), rest[0].encode())
        case "supervise":
            return _supervise(Path(rest[0]), rest[1], rest[2])
        case "allocated":
            return _allocated(Path(rest[0]))
        case "sbatch":
            from cluster.backends import slurm
            return slurm.main()
        case "notify":
            from cluster.node import untold
            return untold.main(Path(rest[0]))
        case "rank":
            from cluster.node import rank
            return rank.main(rest)
    sys.stderr.write(f"launch's agent knows no {command!r}\n")
    return 2


def _answer(mark: str) -> int:
    """What a login shell prints before is cut off by the marks; the newlines while it works keep the client
    patient.
    """
    from cluster.node import agent
    working = threading.Event()
    patience = threading.Thread(target=_keep_alive, args=(working,), daemon=True)
    patience.start()
    try:
        request = read_request(sys.stdin.buffer)
        given = agent.answer(request, Payload(sys.stdin.buffer, request.get("payload_size", 0)))
    except Exception as error:  # the client cannot see a traceback: it gets the name, the words and the place
        import traceback
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        what = f"launch's agent failed: {type(error).__name__}: {error} ({place})"
        given = {"error": {"exit_code": 1, "what": what, "hint": None}}
    working.set()
    patience.join()
    sys.stdout.buffer.write(mark.encode() + json.dumps(given).encode() + mark.encode() + b"\n")
    sys.stdout.buffer.flush()
    return 0


def _keep_alive(working: threading.Event) -> None:
    while not working.wait(KEEPALIVE_S):
        os.write(1, b"\n")


def _supervise(run_dir: Path, what: str, value: str) -> int:
    """The second fork: the caller has called setsid, so what goes on here can never get a terminal again."""
    pid = os.fork()
    if pid:
        os.write(1, b"%d\n" % pid)
        os._exit(0)
    os.dup2(2, 1)
    if what == "--node":
        from cluster.node import member
        return member.main(run_dir, int(value))
    from cluster.node import supervisor
    return supervisor.main(run_dir, value)


def _allocated(run_dir: Path) -> int:
    """What is left of the batch script's world is its output: directory, mask and stdin are those of any supervisor."""
    from cluster.node import allocation
    os.umask(0o027 if run_dir.stat().st_mode & 0o040 else 0o077)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return allocation.main(run_dir)


def read_request(stdin: BinaryIO) -> dict[str, Any]:
    line = stdin.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the request did not arrive whole")
    return json.loads(line)


class Payload(io.RawIOBase):
    """The next `size` bytes of a stream, as a file of their own. Raises EOFError when the stream ends before.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._left = stream, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(min(len(buffer), self._left))
        if not block and self._left:
            raise EOFError(f"{self._left} bytes are missing")
        buffer[:len(block)] = block
        self._left -= len(block)
        return len(block)


if __name__ == "__main__":
    sys.exit(main())
