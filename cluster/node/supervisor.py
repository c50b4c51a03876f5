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
from typing import Literal

from cluster.contract import ENV_PREFIX, RunDir
from cluster.events import AttemptEnded, Reason, StopAsked
from cluster.node.attempt import Attempt
from cluster.node.control import BadRequest, Control, Restart, Stop, install
from cluster.node.ending import Outcome
from cluster.node.failure import Retry
from cluster.node.loop import Loop
from cluster.spec import BadSpec, JobSpec

IDLE_MAX = 3  # attempts in a row without progress
DOUBLINGS_MAX = 30  # of the back-off: no float holds 2 ** 2000
HELPERS_S = 10.0  # env.json of a job that ended at once is still finished for this long
UNSEEN_S = 600.0  # a program whose steps nobody can see has done something after this time
_TICK_S = 0.5


def main(run_dir: Path, by: str) -> int:
    """Supervise the job in `run_dir` until it has ended for good. Returns an exit code for nobody but a log."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]  # a job that is submitted from inside a job must not be swept with it
    run = RunDir(run_dir)
    lock = os.open(run.path / ".supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write(f"{run.path}: another supervisor is at work\n")
        return 1
    try:
        return Supervisor(run).run_until_ended(by)
    except BadSpec as error:
        sys.stderr.write(f"{run.spec}: {error}\n")
        return 2
    finally:
        os.close(lock)


@dataclass(frozen=True)
class Next:
    """What follows an attempt."""

    what: Literal["end", "retry", "restart"]
    why_end: str = ""  # added to the detail when the policy gives up
    retry_at: float | None = None  # unix seconds


class Supervisor:
    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._loop = Loop()
        self._control = Control(run)
        self._code_digest: str | None = None
        self._helpers: set[int] = set()
        self._save_s: float | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        """A person started or restarted the job: limits and counters begin again."""
        self._spec = JobSpec.from_json(self._run.spec.read_bytes())
        self._ends_at = None if self._spec.time_s is None else time.monotonic() + self._spec.time_s
        self._retries = 0
        self._idle = 0
        self._best = -1  # highest step any attempt reached
        self._resumed: str | None = None  # what the last attempt resumed from

    def run_until_ended(self, by: str) -> int:
        if by == "restart":
            self._control.discard()
        while True:
            attempt = self._new_attempt()
            outcome = attempt.live(by, self._code_digest)
            self._code_digest = None
            following = self._decide(attempt, outcome)
            self._end(attempt, outcome, following)
            self._control.consume()
            by = self._follow(attempt, outcome, following)
            attempt.says.close()
            self._helpers |= attempt.helpers
            if not by:
                return self._finish()

    def _new_attempt(self) -> Attempt:
        attempts = self._run.attempts()
        new = self._run.attempt(attempts[-1].number + 1 if attempts else 0)
        new.path.parent.mkdir(exist_ok=True)
        new.path.mkdir()  # exclusive: nobody else writes here
        new.logs.mkdir()
        new.ranks.mkdir()
        shutil.copyfile(self._run.spec, new.spec)
        if self._run.config.exists():
            shutil.copyfile(self._run.config, new.config)
        return Attempt(self._run, new.number, self._spec, self._loop, self._control, self._ends_at, self._save_s)

    def _decide(self, attempt: Attempt, outcome: Outcome) -> Next:
        """Whether and when another attempt follows."""
        progressed = self._progressed(attempt, outcome)
        self._idle = 0 if progressed else self._idle + 1
        self._save_s = attempt.watch.now.save_s or self._save_s
        if outcome.restart is not None:
            return Next("restart")
        retry = outcome.verdict.retry
        if outcome.asked or retry is Retry.NEVER or retry is Retry.IF_PROGRESS and not progressed:
            return Next("end")
        policy = self._spec.restart
        if self._retries >= policy.max_restarts:
            return Next("end", f"given up after {self._retries} restarts" if self._retries else "")
        if self._idle >= IDLE_MAX:
            return Next("end", f"given up: {self._idle} attempts in a row made no progress")
        pause = min(policy.backoff_max_s, policy.backoff_s * 2 ** min(self._retries, DOUBLINGS_MAX))
        self._retries += 1
        return Next("retry", retry_at=time.time() + pause)

    def _progressed(self, attempt: Attempt, outcome: Outcome) -> bool:
        """Whether the attempt got further than those before it, by what can be seen of its program."""
        step = attempt.watch.now.step
        reached = max(-1 if step is None else step, outcome.checkpoint_step or -1)
        progressed = reached > self._best or attempt.resumed != self._resumed
        if reached < 0 and time.monotonic() - attempt.begun_at > UNSEEN_S:
            progressed = True
        self._best, self._resumed = max(reached, self._best), attempt.resumed
        return progressed

    def _end(self, attempt: Attempt, outcome: Outcome, following: Next) -> None:
        verdict = outcome.verdict
        detail = "; ".join(text for text in (verdict.detail, following.why_end) if text)
        attempt.says.record(AttemptEnded(
            time.time(), verdict.reason, detail, outcome.exit_code, attempt.watch.now.step, outcome.checkpoint,
            outcome.checkpoint_step, following.what, following.retry_at, outcome.survivors))

    def _follow(self, attempt: Attempt, outcome: Outcome, following: Next) -> str:
        """-> who starts the next attempt; empty: nobody, the job has ended."""
        if following.what == "retry":
            return self._back_off(attempt, outcome, following.retry_at or 0.0)
        if following.what == "restart" and outcome.restart is not None:
            self._take_over(attempt, outcome.restart)
            return "restart"
        return ""

    def _back_off(self, attempt: Attempt, outcome: Outcome, until: float) -> str:
        """Wait for the retry; a person's word or the time limit ends the waiting at once."""
        deadline = time.monotonic() + until - time.time()  # a clock that is set must not make it longer
        while (left := deadline - time.monotonic()) > 0:
            self._loop.wait(min(left, _TICK_S))
            for request in self._requests():
                if isinstance(request, Restart):
                    self._take_over(attempt, request)
                    self._control.consume()
                    return "restart"
                self._stop_waiting(attempt, outcome, request)
                self._control.consume()
                return ""
            attempt.beat_if_due()
        return "policy"

    def _requests(self) -> list[Stop | Restart]:
        requests = list(self._control.new_requests())
        if self._loop.terminated:
            self._loop.terminated = False
            requests.append(Stop(by="a SIGTERM to the supervisor"))
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            requests.append(Stop(by="launch", why="time limit"))
        return requests

    def _stop_waiting(self, attempt: Attempt, outcome: Outcome, request: Stop) -> None:
        reason = Reason.TIME_LIMIT if request.why == "time limit" else Reason.KILLED
        attempt.says.record(StopAsked(time.time(), request.by, request.why, 0.0))
        attempt.says.record(AttemptEnded(
            time.time(), reason, f"by {request.by}, while it waited for a retry", None, attempt.watch.now.step,
            outcome.checkpoint, outcome.checkpoint_step, "end", None))

    def _take_over(self, attempt: Attempt, request: Restart) -> None:
        try:
            install(self._run, request)
            self._code_digest = request.code_digest
        except BadRequest as error:
            attempt.says.note(str(error))
        self._begin_anew()

    def _finish(self) -> int:
        until = time.monotonic() + HELPERS_S
        while time.monotonic() < until and not self._helpers <= self._loop.exits.keys():
            self._loop.wait(_TICK_S)
        return 0
