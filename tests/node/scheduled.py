"""Jobs of SLURM: rows as squeue and sacct show them, and run directories on a shared file system."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.events import AttemptStarted, Event
from cluster.spec import Slurm
from tests.cluster.jobs import past_run


def queued(id: str, **changed: str) -> dict[str, str]:
    """A job of who runs the tests that waits, as squeue shows it, with some fields changed."""
    return {
        "JobArrayID": id, "JobID": id, "State": "PENDING", "Reason": "Priority", "Partition": "main",
        "PriorityLong": "100", "StartTime": "N/A", "EndTime": "N/A", "UserID": str(os.getuid()), "NodeList": "",
        "RestartCnt": "0", "Comment": "(null)", "Name": "a job", **changed}


def accounted(id: str, state: str, **changed: str) -> dict[str, str]:
    """A job as sacct shows it. The fake finds it by its number, as the real one does those of an array."""
    return {"JobID": id, "JobIDRaw": id, "ArrayJobID": id.partition("_")[0], "State": state, "Start": "Unknown",
            "End": iso(time.time()), "NodeList": "None assigned", "Partition": "main", "Reason": "None", **changed}


def iso(t: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(t))


def slurm_run(workdir: Path, name: str, events: Iterable[Event], ids: Iterable[str], beat_age_s: float = 1.0,
              started: bool = True, **spec: Any) -> RunDir:
    """The run directory of a job on `lab`, whose supervisor wrote from another host `beat_age_s` ago."""
    run = past_run(workdir / "runs", name, events, node="lab", **{"slurm": Slurm(partition="main"), **spec})
    if started:
        beat = run.attempt(0).heartbeat
        beat.write_text(json.dumps(json.loads(beat.read_text()) | {
            "hostname": "gpu01", "boot_id": "another", "t": time.time() - beat_age_s}))
    else:
        for path in sorted((run.path / "attempts").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    run.slurm.write_text(json.dumps({"ids": list(ids)}))
    for path in (run.slurm, run.spec):
        os.utime(path, (time.time() - beat_age_s, time.time() - beat_age_s))
    return run


def started_on(slurm_id: str) -> AttemptStarted:
    """An attempt that began five minutes ago on gpu01."""
    return AttemptStarted(
        time.time() - 300, 0, "submit", "gpu01", "boot", 4, 5, (), None, None, slurm_id, 0, ("gpu01",))
