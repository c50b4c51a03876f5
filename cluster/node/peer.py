"""Asking the agent of another node from this one, by the command that a submit tested (`After.peer`).

The command's last word is no argument: it is the script that sh reads there, with places for what the agent is to do
and for the mark around its answer.
"""
from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from cluster.errors import NodeFailure, Unreachable

COMMAND, MARK = "@COMMAND@", "@MARK@"  # in the script
ASK_S = 60.0
REACH_S = 20.0
_SSH_FAILED = 255

Frame = tuple[dict[str, Any], bytes]


def ask(peer: Sequence[str], request: dict[str, Any], timeout_s: float = ASK_S) -> dict[str, Any]:
    """One question, one answer. Raises Unreachable, and NodeFailure with what the other agent says."""
    mark, told = _opening(peer, "answer", request)
    try:
        done = subprocess.run(peer[:-1], input=told, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{_name(peer)}: no answer in {timeout_s:g} s") from None
    except OSError as error:
        raise Unreachable(f"{peer[0]}: {error.strerror}") from None
    parts = done.stdout.split(mark)
    if len(parts) < 3:
        raise _failed(peer, done.returncode, done.stderr)
    return _checked(peer, json.loads(parts[1]))


def reach(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Whether the agent of another node can be asked from here -> {problem}, None when it can."""
    try:
        ask(request["peer"], {"op": "status", "workdir": "", "jobs": []}, REACH_S)
    except (Unreachable, NodeFailure) as error:
        return {"problem": error.what}
    return {"problem": None}


def stream(peer: Sequence[str], request: dict[str, Any]) -> Iterator[Frame]:
    """The frames of an answer that is long, the `end` frame included. Close it to stop. Raises as `ask`."""
    mark, told = _opening(peer, "stream", request)
    with tempfile.TemporaryFile() as errors, subprocess.Popen(
            peer[:-1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(told)
            process.stdin.flush()  # and it stays open: its end would mean that nobody listens any more
            if not any(mark in line for line in iter(process.stdout.readline, b"")):
                errors.seek(0)
                raise _failed(peer, process.wait(), errors.read())
            yield from _frames(peer, process.stdout)
        except BrokenPipeError:
            raise Unreachable(f"{_name(peer)}: the connection broke") from None
        finally:
            process.terminate()


def _frames(peer: Sequence[str], stdout: IO[bytes]) -> Iterator[Frame]:
    while line := stdout.readline():
        header = _checked(peer, json.loads(line))
        body = stdout.read(header.get("n", 0))
        if len(body) < header.get("n", 0):
            break
        yield header, body
        if "end" in header:
            return
    raise Unreachable(f"{_name(peer)}: the connection broke")


def _opening(peer: Sequence[str], command: str, request: dict[str, Any]) -> tuple[bytes, bytes]:
    """-> the mark, and what goes into the command: the script with its size before it, then the request."""
    mark = f"=={os.urandom(12).hex()}=="
    script = peer[-1].replace(COMMAND, command).replace(MARK, mark).encode()
    line = json.dumps(request | {"payload_size": 0}).encode()
    return mark.encode(), b"%d\n%b%b\n" % (len(script), script, line)


def _checked(peer: Sequence[str], answer: dict[str, Any]) -> dict[str, Any]:
    if error := answer.get("error"):
        raise NodeFailure(f"{_name(peer)}: {error['what']}", hint=error["hint"])
    return answer


def _failed(peer: Sequence[str], code: int, stderr: bytes) -> Unreachable:
    lines = stderr.decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else f"no answer of launch's agent there (exit code {code})"
    return Unreachable(f"{_name(peer)}: {f'{peer[0]}: ' if code == _SSH_FAILED else ''}{said}")


def _name(peer: Sequence[str]) -> str:
    """What ssh calls the other node: the word before the line that its login shell gets."""
    return peer[-3]
