"""The supervisor of one job: one attempt after the other, until a person or the policy ends it.

It is the root of everything the job starts (child subreaper), the only writer of its journal, and small: nothing in it
blocks, so it can always reap, kill and answer.
"""
from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.contract import ENV_PREFIX, AttemptDir, RunDir
from cluster.events import AttemptEnded, Reason, StopAsked
from cluster.node.attempt import Attempt
from cluster.node.control import BadRequest, Restart, Stop, install
from cluster.node.ending import Asked, Outcome, stopped
from cluster.node.failure import Retry, Verdict
from cluster.node.history import History
from cluster.node.loop import Loop
from cluster.node.place import Place
from cluster.spec import BadSpec, JobSpec

if TYPE_CHECKING:
    from cluster.node.team import Team

DOUBLINGS_MAX = 30  # of the back-off: no float holds 2 ** 2000
HELPERS_S = 10.0  # env.json of a job that ended at once is still finished for this long
_TICK_S = 0.5


def main(run_dir: Path, by: str) -> int:
    """Supervise the job in `run_dir` until it has ended for good, alone and detached -> 0 when it completed."""
    forget_outer_job()
    run = RunDir(run_dir)
    lock = os.open(run.path / ".supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write(f"{run.path}: another supervisor is at work\n")
        return 1
    try:
        loop = Loop()
        place = Place(run, loop)
        if by == "restart":
            place.control.discard()
        return supervise(run, loop, place, History(), by)
    finally:
        os.close(lock)


def forget_outer_job() -> None:
    """A job that is submitted from inside a job must not be swept with it."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]


def supervise(run: RunDir, loop: Loop, place: Place, history: History, by: str) -> int:
    """-> an exit code: 0 when the job has completed and in no other case."""
    try:
        return Supervisor(run, loop, place, history).run_until_ended(by)
    except BadSpec as error:
        sys.stderr.write(f"{run.spec}: {error}\n")
        return 2


@dataclass(frozen=True)
class Next:
    """What follows an attempt."""

    what: Literal["end", "retry", "restart", "requeue"]
    why_end: str = ""  # added to the detail when the policy gives up
    retry_at: float | None = None  # unix seconds


class Supervisor:
    """Raises BadSpec when the job's spec cannot be read."""

    def __init__(self, run: RunDir, loop: Loop, place: Place, history: History) -> None:
        self._run, self._loop, self._place, self._history = run, loop, place, history
        self._code_digest: str | None = None
        self._helpers: set[int] = set()
        self._number: int | None = None  # of the last attempt made here
        self._team: Team | None = None  # of several nodes
        self._read_spec()

    def _read_spec(self) -> None:
        self._spec = JobSpec.from_json(self._run.spec.read_bytes())
        self._place.begin(self._spec, self._history.save_s)
        self._place.tells(self._run, self._spec)

    def run_until_ended(self, by: str) -> int:
        completed = False
        while by and (attempt := self._new_attempt(by)):
            outcome = attempt.live(by, self._code_digest)
            self._code_digest = None
            following = self._decide(attempt, outcome)
            self._end(attempt, outcome, following)
            self._place.control.consume()
            by = self._follow(attempt, outcome, following)
            attempt.says.close()
            self._helpers |= attempt.helpers
            completed = following.what == "end" and outcome.verdict.reason is Reason.DONE
        if self._team is not None:
            self._team.close({"do": "over", "code": 0 if completed else 1})
        self._await_helpers()
        return 0 if completed else 1

    def _new_attempt(self, by: str) -> Attempt | None:
        """None: somebody else has made one after ours, the job is no longer this supervisor's."""
        attempts = self._run.attempts()
        number = attempts[-1].number + 1 if attempts else 0
        if self._number is None:
            while not self._make(self._run.attempt(number)):
                number += 1
        elif number != self._number + 1 or not self._make(self._run.attempt(number)):
            # Not even made for a moment: whoever has the newest would take it for a newer one, and end its job.
            sys.stderr.write(f"{self._run.path}: the attempt after {self._number} is another supervisor's\n")
            return None
        new, self._number = self._run.attempt(number), number
        new.logs.mkdir()
        new.ranks.mkdir()
        shutil.copyfile(self._run.spec, new.spec)
        if self._run.config.exists():
            shutil.copyfile(self._run.config, new.config)
        if by in ("scheduler", "policy") and (done := self._finished(number)):
            return done
        if self._spec.nodes > 1:
            return self._led(number)
        if number == 0 and self._run.adopted.exists():
            from cluster.node.adopted import AdoptedAttempt  # most jobs are started here

            return AdoptedAttempt(self._run, number, self._spec, self._loop, self._place, self._history.save_s)
        return Attempt(self._run, number, self._spec, self._loop, self._place, self._history.save_s)

    def _led(self, number: int) -> Attempt:
        from cluster.node.parts import LedAttempt  # and all that several nodes take

        return LedAttempt(self._run, number, self._spec, self._loop, self._place, self._history.save_s,
                          team=self._own_team())

    def _own_team(self) -> Team:
        from cluster.node.team import Team

        if self._team is None:
            self._team = Team(self._run, self._spec, self._loop, self._place.allocation)
        return self._team

    def _finished(self, number: int) -> Attempt | None:
        """It goes on by itself after an attempt that may have left nothing to do."""
        from cluster.node.finished import FinishedAttempt, work_done  # most jobs begin once

        if (done := work_done(self._run, self._spec)) is None:
            return None
        team = self._own_team() if self._spec.nodes > 1 and self._place.allocation else None
        return FinishedAttempt(self._run, number, self._spec, self._loop, self._place, self._history.save_s, done=done,
                               team=team)

    @staticmethod
    def _make(new: AttemptDir) -> bool:
        """Exclusive: whoever makes the directory is the only one to write there."""
        new.path.parent.mkdir(exist_ok=True)
        try:
            new.path.mkdir()
        except FileExistsError:
            return False
        return True

    def _decide(self, attempt: Attempt, outcome: Outcome) -> Next:
        """Whether and when another attempt follows."""
        verdict, now, history = outcome.verdict, attempt.watch.now, self._history
        progressed = history.add(verdict.reason, now.step, outcome.checkpoint_step, attempt.resumed,
                                 time.monotonic() - attempt.begun_at)
        history.save_s = now.save_s or history.save_s
        if self._place.superseded(attempt.dir.number):
            outcome.asked, outcome.verdict = "superseded", Verdict(Reason.SUPERSEDED, verdict.detail)
            return Next("requeue")
        if outcome.restart is not None:
            return Next("restart")
        if outcome.asked:
            return self._after_stop(outcome)
        if verdict.retry is Retry.NEVER or verdict.retry is Retry.IF_PROGRESS and not progressed:
            return Next("end")
        policy = self._spec.restart
        if history.retries >= policy.max_restarts:
            return Next("end", f"given up after {history.retries} restarts" if history.retries else "")
        if history.exhausted:
            return Next("end", f"given up: {history.idle} attempts in a row made no progress")
        pause = min(policy.backoff_max_s, policy.backoff_s * 2 ** min(history.retries, DOUBLINGS_MAX))
        history.retries += 1
        if not self._place.has_room(pause):
            return Next("requeue")
        return Next("retry", retry_at=time.time() + pause)

    def _after_stop(self, outcome: Outcome) -> Next:
        """It was told to stop, by somebody who did not ask for a restart."""
        reason = outcome.verdict.reason
        if reason is Reason.DONE or outcome.asked in ("kill", "time limit", "guard"):
            return Next("end")
        if reason is Reason.TIME_LIMIT and self._history.exhausted:
            return Next("end", f"given up: {self._history.idle} times in a row its time was over before it had got any "
                               "further; give it more with --time, or save checkpoints more often")
        return Next("requeue")

    def _end(self, attempt: Attempt, outcome: Outcome, following: Next) -> None:
        verdict = outcome.verdict
        if following.what == "end":  # who hears that it has ended may take its GPUs
            self._place.release()
        detail = "; ".join(text for text in (verdict.detail, following.why_end) if text)
        now = time.time()
        attempt.says.record(AttemptEnded(
            now, verdict.reason, detail, outcome.exit_code, attempt.watch.now.step, outcome.checkpoint,
            outcome.checkpoint_step, following.what, following.retry_at, outcome.survivors))
        self._place.tell(now)

    def _follow(self, attempt: Attempt, outcome: Outcome, following: Next) -> str:
        """-> who starts the next attempt here; empty: nobody."""
        if following.what == "retry":
            return self._back_off(attempt, outcome, following.retry_at or 0.0)
        if following.what == "restart" and outcome.restart is not None:
            self._take_over(attempt, outcome.restart)
            return "restart"
        if following.what == "requeue" and outcome.asked != "superseded":
            self._requeue(attempt, outcome)
        return ""

    def _requeue(self, attempt: Attempt, outcome: Outcome) -> None:
        if problem := self._place.go_on(self._spec, attempt.beat_if_due):
            outcome.verdict = Verdict(outcome.verdict.reason, problem)
            self._end(attempt, outcome, Next("end"))

    def _back_off(self, attempt: Attempt, outcome: Outcome, until: float) -> str:
        """Wait for the retry; a person's word, the time limit or the scheduler ends the waiting at once."""
        deadline = time.monotonic() + until - time.time()  # a clock that is set must not make it longer
        while (left := deadline - time.monotonic()) > 0:
            self._loop.wait(min(left, _TICK_S))
            for request in self._place.requests(attempt.dir.number):
                if isinstance(request, Restart):
                    self._take_over(attempt, request)
                    self._place.control.consume()
                    return "restart"
                return self._stop_waiting(attempt, outcome, request)
            attempt.beat_if_due()
            if self._place.teller:
                self._place.teller.step()
        return "policy"

    def _stop_waiting(self, attempt: Attempt, outcome: Outcome, request: Stop) -> str:
        asked = Asked(request.why, request.by, 0.0, reason=request.reason)
        outcome.asked, outcome.verdict = asked.why, stopped(asked, "while it waited for a retry")
        attempt.says.record(StopAsked(time.time(), request.by, request.why, 0.0))
        following = self._after_stop(outcome)
        self._end(attempt, outcome, following)
        self._place.control.consume()
        return self._follow(attempt, outcome, following)

    def _take_over(self, attempt: Attempt, request: Restart) -> None:
        try:
            install(self._run, request)
            self._code_digest = request.code_digest
        except BadRequest as error:
            attempt.says.note(str(error))
        self._history = History(save_s=self._history.save_s)
        self._read_spec()

    def _await_helpers(self) -> None:
        if self._place.teller:
            self._place.teller.finish(self._loop.wait, min(HELPERS_S, self._place.ending_s))
        until = time.monotonic() + HELPERS_S
        while time.monotonic() < until and not self._helpers <= self._loop.exits.keys():
            self._loop.wait(_TICK_S)
