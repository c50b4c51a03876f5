"""How far the attempts of a job came since a person started it: whether another one is worth it."""
from __future__ import annotations

from dataclasses import dataclass

from cluster.contract import AttemptDir, RunDir
from cluster.events import AttemptEnded, AttemptStarted, Reason
from cluster.journal import read_journal
from cluster.node import lines
from cluster.node.process import read_heartbeat

IDLE_MAX = 3  # attempts in a row without progress
UNSEEN_S = 600.0  # a program whose steps nobody can see has done something after this time
# Ended by others, whatever the program was doing: says nothing about the program.
NOT_ITS_OWN = (Reason.PREEMPTED, Reason.SCHEDULER, Reason.SUPERSEDED, Reason.NODE_LOST)


@dataclass
class History:
    best: int = -1  # highest step any attempt reached
    resumed: int | str | None = None  # what the last attempt resumed from: a step; a path where no step is known
    idle: int = 0  # attempts in a row without progress
    retries: int = 0  # by the policy
    save_s: float | None = None  # the longest of the last measured saves

    @property
    def exhausted(self) -> bool:
        return self.idle >= IDLE_MAX

    def add(self, reason: Reason, step: int | None, checkpoint_step: int | None, resumed: int | str | None,
            lasted_s: float) -> bool:
        """Take in an attempt that has ended. -> whether it got further than those before it, by what can be seen."""
        reached = max(-1 if step is None else step, -1 if checkpoint_step is None else checkpoint_step)
        progressed = reached > self.best or resumed != self.resumed
        if reached < 0 and lasted_s > UNSEEN_S and reason is not Reason.TIME_LIMIT:
            progressed = True  # at a time limit it has lasted as long as it may, and that every time
        self.best, self.resumed = max(reached, self.best), resumed
        if progressed:
            self.idle = 0
        elif reason not in NOT_ITS_OWN:
            self.idle += 1
        return progressed


def resumed_from(path: str | None, step: int | None) -> int | str | None:
    """The step: another attempt's checkpoint of the same step is another path and no progress."""
    return path if step is None else step


def read_history(run: RunDir) -> History:
    """Of the attempts since the last one that a person started, by their journals.

    An attempt without an ending (its node was lost) counts with what its heartbeat said, and never as idle.
    """
    history = History()
    for attempt in run.attempts():
        events, _ = read_journal(attempt.journal)
        start = next((event for event in events if isinstance(event, AttemptStarted)), None)
        if start is None:
            continue
        if start.by in ("submit", "restart"):
            history = History(save_s=history.save_s)
        beat, resumed = read_heartbeat(attempt) or {}, resumed_from(start.resume, start.resume_step)
        history.save_s = beat.get("save_s") or history.save_s
        end = next((event for event in reversed(events) if isinstance(event, AttemptEnded)), None)
        if end is None:
            history.add(Reason.SCHEDULER, beat.get("step"), None, resumed, 0.0)
            continue
        history.add(end.reason, end.step, end.checkpoint_step, resumed, end.t - start.t)
        failed = end.reason is not Reason.TIME_LIMIT and end.reason not in NOT_ITS_OWN
        history.retries += failed and end.next in ("retry", "requeue")
    return history


def finished(run: RunDir, ours: bool) -> AttemptDir | None:
    """The attempt that did all of the job's work, since a person last started it; None: there is work left. `ours`: its
    program is one of our trainers."""
    for attempt in reversed(run.attempts()):
        events, _ = read_journal(attempt.journal)
        if any(isinstance(event, AttemptEnded) and (event.reason, event.next) == (Reason.DONE, "end")
               for event in events):
            return attempt
        if attempt.metrics.exists():
            return attempt if lines.is_done(run, attempt, ours) else None
        if any(isinstance(event, AttemptStarted) and event.by in ("submit", "restart") for event in events):
            return None
    return None
