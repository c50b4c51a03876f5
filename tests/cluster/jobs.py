"""Small jobs, and run directories as a supervisor would have left them."""
from __future__ import annotations

import io
import json
import sys
import tarfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.events import AttemptEnded, AttemptStarted, Event, Launched, Reason, encode
from cluster.node import process
from cluster.spec import JobSpec, PythonEnv

STARTED = AttemptStarted(10.0, 0, "submit", "a-host", "a-boot", 4, 5, (), None, None)
LAUNCHED = Launched(11.0, ("true",), (), 6)
DONE = AttemptEnded(20.0, Reason.DONE, "", 0, 7, None, None, "end", None)


def command(*argv: str, **more: Any) -> JobSpec:
    """A job that runs one command."""
    return JobSpec(**{
        "id": f"command-{uuid.uuid4().hex[:6]}", "token": uuid.uuid4().hex, "stage": "command",
        "kind": "command", "argv": argv, "node": "local", "submitted_at": time.time(),
        "submitted_by": "me@here", "python": PythonEnv("python", sys.executable), **more})


def past_run(runs: Path, name: str, events: Iterable[Event], **spec: Any) -> RunDir:
    """The directory of a job with this journal, one attempt, and the heartbeat of this very process."""
    run = RunDir(runs / name)
    attempt = run.attempt(0)
    attempt.logs.mkdir(parents=True)
    for directory in (run.control, run.checkpoints):
        directory.mkdir()
    run.spec.write_bytes(command("true", id=name, **spec).to_json())
    write_journal(attempt.journal, events)
    attempt.heartbeat.write_text(json.dumps({
        "t": time.time(), "hostname": process.hostname(), "boot_id": process.boot_id(), "pid": 1,
        "pid_started": -1, "attempt": 0, "step": 7, "total": 9, "loss": 0.5, "it_s": 2.0,
        "eta_s": 1.0, "peak_rss_mb": 3.0}))
    return run


def write_journal(path: Path, events: Iterable[Event]) -> None:
    path.write_text("".join(json.dumps(encode(event)) + "\n" for event in events))


def archive(*members: tuple[str, bytes | None, str]) -> bytes:
    """A tar.gz of (name, content or None for a link, link target)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, content, target in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, target
                tar.addfile(info)
            else:
                info.size, info.mode = len(content), 0o755
                tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()
