"""The attempt after one that did all of the job's work and was lost before anybody had written that: it says so."""
from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cluster.contract import AttemptDir, RunDir
from cluster.events import AttemptStarted, Reason
from cluster.node.attempt import Attempt
from cluster.node.ending import Outcome
from cluster.node.failure import Verdict
from cluster.node.history import finished
from cluster.node.progress import Watch
from cluster.node.vigil import LOOK_S
from cluster.spec import JobSpec

if TYPE_CHECKING:
    from cluster.node.team import Team

TEAM_S = 30.0  # for the supervisors of the other nodes to come and be told


def work_done(run: RunDir, spec: JobSpec) -> AttemptDir | None:
    """The attempt that left nothing to do; None: it left something, or the job has been changed since then."""
    found = finished(run, spec.resume_rule.kind == "launch")
    try:
        return found if found and found.spec.read_bytes() == run.spec.read_bytes() else None
    except FileNotFoundError:
        return None


class FinishedAttempt(Attempt):
    """Starts nothing. `done` is the attempt that did the work; `team`: of several nodes in one allocation, which all
    have to end well."""

    def __init__(self, *how: Any, done: AttemptDir, team: Team | None) -> None:
        self._done, self._team = done, team
        super().__init__(*how)

    def live(self, by: str, code_digest: str | None) -> Outcome:
        me = self.says.me
        found = self._unprepared().found
        self.says.record(AttemptStarted(
            time.time(), self.dir.number, by, me["hostname"], me["boot_id"], me["pid"], me["pid_started"], found, None,
            None, **self._place.facts))
        self.watch = Watch(self._done, self.spec.progress)
        self.watch.drain()
        self._gather()
        return self._not_started(Verdict(
            Reason.DONE, f"attempt {self._done.number} had done all of it when it was lost: nothing was started"))

    def _gather(self) -> None:
        until = time.monotonic() + TEAM_S
        while self._team and self._team.missing() and time.monotonic() < until:
            self._wait(LOOK_S)
            self._team.look()
