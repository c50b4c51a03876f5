"""What an attempt waits for before it begins: other jobs that must have ended, and its turn in a sweep.

Nothing is written about it but the heartbeat's `waits`. A supervisor that waits reads other run directories (or asks
their nodes) aside of itself, so that a file system that hangs never keeps anybody from killing it.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.errors import ClusterError
from cluster.events import AttemptEnded, Reason
from cluster.journal import read_journal
from cluster.node import process
from cluster.node.aside import Aside, AsideFailed
from cluster.node.failure import Verdict
from cluster.spec import After, JobSpec
from cluster.states import ENDED_WORDS

NEAR_S = (0.5, 2.0)  # from one look at a job that is seen here to the next: at first, and later
PEER_S = (2.0, 30.0)  # and at one that another node must be asked about
TURN_S = 10.0  # at the points of a sweep before this one, at most
_SLOWER = 1.5
_UNBORN_S = 60.0  # a job without an attempt is being submitted for this long


@dataclass(frozen=True)
class Look:
    """What one look came to: `verdict`: it will never begin; no `text` either: nothing is to be waited for."""

    text: str = ""
    verdict: Verdict | None = None


class Waiting:
    """`step` whenever `pause_s` is over, until `over`; then `verdict` says whether the attempt may begin."""

    def __init__(self, run: RunDir, spec: JobSpec, aside: Callable[..., Aside]) -> None:
        self.text = ""
        self.verdict: Verdict | None = None
        self.pause_s = 0.0
        self._spec, self._aside = spec, aside
        self._after = list(spec.after)  # not known to have ended as it should
        self._turn = Turn(run, spec) if has_turns(spec) else None
        self._asking: Aside | None = None
        self._interval_s = PEER_S[0] if any(one.peer for one in spec.after) else NEAR_S[0]
        self._next = 0.0  # time.monotonic of the next look

    @property
    def over(self) -> bool:
        return self.verdict is not None or not self._after and self._turn is None

    def step(self) -> None:
        """Never blocks."""
        if self._asking or self._after and time.monotonic() >= self._next:
            self._look_at_jobs()
        elif not self._after and self._turn and time.monotonic() >= self._next:
            self._look_at_turn(self._turn)
        self.pause_s = NEAR_S[0] if self._asking else max(0.0, self._next - time.monotonic())

    def close(self) -> None:
        if self._asking:
            self._asking.kill()

    def _look_at_jobs(self) -> None:
        if self._asking is None:
            self._asking = self._aside(see, self._after)
        if not self._asking.done():
            return
        try:
            seen = self._asking.result()
        except AsideFailed as error:
            seen = [{"unseen": f"it cannot be seen: {error}"}] * len(self._after)
        self._asking = None
        looks = [(one, judge(one, facts)) for one, facts in zip(self._after, seen)]
        self.verdict = next((look.verdict for _, look in looks if look.verdict), None)
        self._after = [one for one, look in looks if look.text or look.verdict]
        self.text = ", ".join(look.text for _, look in looks if look.text)
        if self._after:
            self._next = time.monotonic() + self._interval_s
            self._interval_s = min(self._longest_s, self._interval_s * _SLOWER)

    @property
    def _longest_s(self) -> float:
        return PEER_S[1] if any(one.peer for one in self._after) else NEAR_S[1]

    def _look_at_turn(self, turn: Turn) -> None:
        ahead = turn.ahead()
        left = ahead - turn.parallel + 1
        if left <= 0:
            self._turn, self.text = None, ""
            return
        self.text = f"its turn: {ahead} of {turn.group} before it, {turn.parallel} at a time"
        self._next = time.monotonic() + min(TURN_S, float(left))  # the further back, the seldomer


# --- other jobs ---------------------------------------------------------------------------------------------

def see(jobs: Sequence[After]) -> list[dict[str, Any]]:
    """What is known of each of `jobs` now: its VIEW, or {gone: why}, or {unseen: why}."""
    return [_see(one) for one in jobs]


def _see(job: After) -> dict[str, Any]:
    try:
        return _ask(job) if job.peer else _read(RunDir(Path(job.run_dir)))
    except (ClusterError, OSError) as error:
        return {"unseen": str(error)}


def _ask(job: After) -> dict[str, Any]:
    from cluster.node import peer

    answer = peer.ask(job.peer, {"op": "status", "workdir": "", "jobs": [job.run_dir]})
    if answer["jobs"]:
        return answer["jobs"][0]
    why = answer["broken"][0]["why"] if answer["broken"] else "it is not there"
    return {"unseen": why}


def _read(run: RunDir) -> dict[str, Any]:
    from cluster.node.view import BrokenRun, view_of

    if not run.path.is_dir():
        if run.path.parent.is_dir():
            return {"gone": "its run directory was removed"}
        return {"unseen": f"{run.path.parent} is not there"}  # a file system that is not mounted
    try:
        return view_of(run)
    except BrokenRun as error:
        return {"unseen": str(error)}


def judge(job: After, seen: dict[str, Any]) -> Look:
    """Whether the job that is waited for lets this one begin. "Could not ask" is never an ending."""
    if why := seen.get("unseen"):
        return Look(f"{job.id} ({str(why).splitlines()[0]})")
    if why := seen.get("gone"):
        return Look(verdict=Verdict(Reason.DEPENDENCY, f"{job.id}: {why}"))
    state = seen["state"]
    if seen.get("revivable"):
        return Look(f"{job.id} ({state}: its node was restarted, the next launch command goes on with it)")
    if state == "COMPLETED" or job.any and state in ENDED_WORDS:
        return Look()
    if state in ENDED_WORDS:
        why = ": ".join(part for part in (seen.get("reason"), seen.get("detail")) if part)
        return Look(verdict=Verdict(Reason.DEPENDENCY, f"{job.id} {state}" + (f": {why}" if why else "")))
    step = seen.get("step")
    total = f" of {seen['total']}" if seen.get("total") else ""
    return Look(f"{job.id} ({state}{'' if step is None else f', step {step}{total}'})")


# --- the points of a sweep ----------------------------------------------------------------------------------

def has_turns(spec: JobSpec) -> bool:
    """A scheduler has its own way to run so many at a time."""
    return spec.group is not None and spec.group.parallel > 0 and spec.slurm is None


class Turn:
    """The points of the same sweep that come before this one. They lie beside it: `<sweep>-<number>`."""

    def __init__(self, run: RunDir, spec: JobSpec) -> None:
        assert spec.group is not None
        self.group, self.parallel = spec.group.id, spec.group.parallel
        stem = run.path.name.removesuffix(f"-{spec.group.member}")
        self._before = [RunDir(run.path.with_name(f"{stem}-{number}")) for number in range(int(spec.group.member))]

    def ahead(self) -> int:
        """How many of them have not ended. One that ended is never waited for again, restarted or not."""
        self._before = [run for run in self._before if not has_ended(run)]
        return len(self._before)


def has_ended(run: RunDir) -> bool:
    """By its newest journal and heartbeat alone: fifty points look at each other. A lost supervisor has ended too."""
    attempts = run.attempts()
    if not attempts:
        try:
            return time.time() - run.spec.stat().st_mtime > _UNBORN_S
        except FileNotFoundError:
            return not run.path.is_dir()
    events, _ = read_journal(attempts[-1].journal)
    if events and isinstance(events[-1], AttemptEnded):
        ended = events[-1]
        if ended.next == "end":
            return True
    heard = process.heard(attempts[-1])
    return heard is not None and not heard.alive
