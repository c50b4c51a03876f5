"""What the supervisors of ended jobs could not tell: the next command that looks at this node has it told, detached."""
from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.errors import ClusterError
from cluster.events import AttemptEnded, Reason
from cluster.journal import read_events
from cluster.node import lines, notify, process
from cluster.states import ENDED_WORDS

_AGAIN_S = 60.0  # after it could not be told
_FINISHING_S = 60.0  # a supervisor on another machine may still be telling it itself
_TAIL = 4 << 10


def catch_up(workdir: Path, to: Collection[str] | None = None) -> list[str]:
    """Begin to tell what is left -> words for a person about what could not be told so far. Costs a look at a
    directory, and a process when something is left. `to`: the addresses that the person who asks has in cluster.yaml;
    of others, which a job was submitted with before, nothing is said to them."""
    left = [run for run in _marked(workdir) if not _supervised(run)]
    failures = {run.path.name: _failures(run) for run in left}
    due = [run for run in left if time.time() - _tried(run, failures[run.path.name]) > _AGAIN_S]
    if due:
        subprocess.run(process.agent_command("notify", str(workdir)), stdin=subprocess.DEVNULL, check=False,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True)
    return [f"{name}: nobody could be told of it yet, it is tried again: {one['problem']}"
            for name, found in failures.items()
            for one in [one for one in found if to is None or one["to"] in to][-1:]]


def _tried(run: RunDir, failures: Sequence[dict[str, Any]]) -> float:
    """When somebody last looked at what is left to tell of this job."""
    return max([notify.looked_at(run), *(one["t"] for one in failures)])


def left_of(workdir: Path, views: Sequence[dict[str, Any]]) -> None:
    """Set `untold` in the VIEWs of ended jobs of which something is left to tell."""
    names = {path.name for path in notify.marks(workdir).iterdir()}
    for seen in views:
        seen["untold"] = seen["state"] in ENDED_WORDS and Path(seen["run_dir"]).name in names


def main(workdir: Path) -> int:
    """Tell all of it, once each, while the caller goes on -> 0."""
    if os.fork():
        os._exit(0)
    lock = os.open(notify.marks(workdir), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for run in _marked(workdir):
            if not _supervised(run):
                _tell(run)
    except BlockingIOError:  # it is being told
        pass
    finally:
        os.close(lock)
    return 0


def _marked(workdir: Path) -> list[RunDir]:
    found = [RunDir(workdir / "runs" / path.name) for path in sorted(notify.marks(workdir).iterdir())]
    for run in found:
        if not run.spec.exists():  # it was pruned, or has moved to another node
            notify.unmark(run)
    return [run for run in found if run.spec.exists()]


def _supervised(run: RunDir) -> bool:
    """Whether its supervisor may still tell it itself."""
    attempts = run.attempts()
    heard = process.heard(attempts[-1]) if attempts else None
    if heard is not None:
        return heard.alive
    beat = process.read_heartbeat(attempts[-1]) if attempts else None  # on another machine
    return beat is None or time.time() - beat["t"] < _FINISHING_S


def _failures(run: RunDir) -> list[dict[str, Any]]:
    """The last try at each address, where that failed; the newest last."""
    try:
        last = {one["to"]: one for one in lines.tail(run.notified, _TAIL)}
    except FileNotFoundError:
        return []
    return sorted((one for one in last.values() if not one["ok"]), key=lambda one: one["t"])


def _tell(run: RunDir) -> None:
    from cluster.node import view

    try:
        seen = view.read_view(run)
        over = seen["state"] in ENDED_WORDS
        events, _ = read_events(run)
        told = bool(events) and isinstance(events[-1], AttemptEnded)
        lost = AttemptEnded(seen["ended_at"] or time.time(), Reason(seen["reason"]), seen["detail"], None, seen["step"],
                            None, seen["checkpoint_step"], "end", None) if over and not told else None
        answer = notify.deliver(str(run.path), lost=lost)
        if answer["left"] or answer.get("unwritten"):
            return
        if over:
            notify.unmark(run)
        else:  # it goes on by itself, some time
            notify.mark(run, looked=True)
    except (ClusterError, view.BrokenRun, OSError, ValueError):  # the next command tries again
        return
