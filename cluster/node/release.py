"""Lets a job go on that SLURM put on hold because its node could not start it.

A node that came back too early, a full disk or a failing prolog does that, and SLURM then waits for somebody to say
`scontrol release`. Whoever looks at the job says it here: a few times, not at once again, and written in the job's run
directory first. What a person or an administrator holds stays held.
"""
from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cluster.contract import RunDir, read_json_lines
from cluster.errors import Refused
from cluster.node.slurm_tools import SlurmFailed, run as run_tool
from cluster.node.slurm_words import launch_failed, releasable

MOST = 3  # times without a person
APART_S = 30.0  # a node that fails at once would use them up at once
_SCONTROL_S = 2.0


@dataclass(frozen=True)
class Release:
    """A job was let go. `by` is the person who asked for it; empty: nobody did."""

    t: float
    id: str
    by: str = ""


def go_on(views: Sequence[dict[str, Any]]) -> list[str]:
    """Release those of these jobs whose node could not start them, as often as that is sensible; their `detail` says
    what was done. -> words for a person.
    """
    found = [view for view in views if view["state"] == "PENDING" and not view["unasked"] and view["queue"]
             and view["queue"]["state"] == "PENDING" and launch_failed(view["queue"]["reason"])]
    runs = [RunDir(Path(view["run_dir"])) for view in found]
    released = [view for run, view in zip(runs, found) if _noted(run, view["queue"]["id"])]
    failed = _release([view["queue"]["id"] for view in released])
    for run, view in zip(runs, found):
        view["detail"] = failed if failed and view in released else _words(run, view)
    return [f"{view['id']}: {view['detail']}" for view in released]


def by_person(run: RunDir, view: dict[str, Any], who: str) -> None:
    """Release a job that somebody wants to start, if it is held. Raises Refused: SLURM does not."""
    queued = view["queue"]
    if not releasable(queued["state"], queued["reason"]):
        return
    with _releases(run) as file:
        if file:  # this time it is a person who answers for it
            _note(file, Release(time.time(), queued["id"], who))
    if failed := _release([queued["id"]]):
        raise Refused(f"{view['id']} {failed}", hint=f"on the login node: scontrol release {queued['id']}")


def notes(run: RunDir) -> list[dict[str, Any]]:
    """The releases as events for `launch show`."""
    return [{"event": "note", "t": one.t,
             "text": f"SLURM could not start job {one.id} and held it; released" + (f" by {one.by}" if one.by else "")}
            for one in _read(run)]


def _noted(run: RunDir, id: str) -> bool:
    """Whether the job is to be released now, which is written down then."""
    if _to_end(run):
        return False
    with _releases(run) as file:
        if file is None or _left(_read(run), id) == 0 or _patience_s(_read(run)) > 0:
            return False
        return _note(file, Release(time.time(), id))


def _to_end(run: RunDir) -> bool:
    return (run.control / "stop").exists()


def _release(ids: Sequence[str]) -> str:
    """Empty, or why it could not be done."""
    if not ids:
        return ""
    try:
        run_tool(["scontrol", "release", ",".join(ids)], _SCONTROL_S)
    except SlurmFailed as error:
        return f"is held and could not be released: {error}"
    return ""


def _words(run: RunDir, view: dict[str, Any]) -> str:
    if _to_end(run):
        return view["detail"]
    done, id = _read(run), view["queue"]["id"]
    left = _left(done, id)
    if done and done[-1].t >= view["queue"]["asked_at"]:
        return f"its node could not start it, and SLURM held it; released ({MOST - left} of {MOST})"
    if left == 0:
        return (f"its node could not start it {MOST + 1} times, and SLURM holds it: sinfo -R may say why; "
                f"launch restart {view['id']} lets it go on")
    wait_s = _patience_s(done)
    return view["detail"] + (f"; to be released in {wait_s:.0f} s ({MOST - left + 1} of {MOST})" if wait_s > 0 else "")


def _left(done: Sequence[Release], id: str) -> int:
    """How often it may still be released without a person; one who asked for it begins the count anew."""
    count = 0
    for one in done:
        count = 0 if one.by or one.id != id else count + 1
    return max(0, MOST - count)


def _patience_s(done: Sequence[Release]) -> float:
    return min(APART_S, done[-1].t + APART_S - time.time()) if done else 0.0


# --- what is written in the run directory -------------------------------------------------------------------

def _read(run: RunDir) -> list[Release]:
    return [Release(one["t"], one["id"], one["by"]) for one in read_json_lines(run.releases)]


@contextmanager
def _releases(run: RunDir) -> Iterator[BinaryIO | None]:
    """For one who looks at a time. None: somebody else does, or nothing can be written here."""
    try:
        file = open(run.releases, "ab", buffering=0)
    except OSError:  # a full disk, another person's job: without a trace nothing is done
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file


def _note(file: BinaryIO, release: Release) -> bool:
    """Whether it is written down, in one piece."""
    line = json.dumps(vars(release)).encode() + b"\n"
    try:
        return file.write(line) == len(line)
    except OSError:  # a full disk
        return False
