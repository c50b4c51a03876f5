"""The words for an attempt that was asked to stop, and what the supervisor needs to know of any that ended."""
from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.contract import AttemptDir, RunDir
from cluster.events import Reason
from cluster.node import resume
from cluster.node.control import Restart, Stop
from cluster.node.failure import Facts, Verdict
from cluster.node.progress import Progress
from cluster.node.tail import last_bytes
from cluster.spec import JobSpec

Why = Literal["kill", "restart", "time limit", "scheduler", "superseded", "guard"]
# A kill overrules the scheduler, which would start the job again; where a newer attempt runs, that one is killed.
_WEIGHT: dict[Why, int] = {"restart": 0, "scheduler": 1, "time limit": 2, "kill": 2, "guard": 2, "superseded": 3}


@dataclass
class Outcome:
    """How an attempt ended, before anybody decided what comes next."""

    verdict: Verdict = Verdict(Reason.ERROR, "")
    exit_code: int | None = None
    checkpoint: str | None = None  # newest that verifies
    checkpoint_step: int | None = None
    survivors: tuple[int, ...] = ()
    asked: str = ""  # why it was told to stop
    restart: Restart | None = None


@dataclass
class Asked:
    """A stop that is under way."""

    why: Why
    by: str
    deadline: float  # time.monotonic
    restart: Restart | None = None
    reason: Reason | None = None  # of the scheduler

    def overrule(self, request: Stop) -> None:
        """Another stop: the heavier word counts, and of two equal ones the later."""
        if _WEIGHT[request.why] < _WEIGHT[self.why]:
            return
        if self.why != request.why:
            self.reason = request.reason
        self.why, self.by, self.restart = request.why, request.by, None


def stopped(asked: Asked, how: str) -> Verdict:
    match asked.why:
        case "restart":
            if asked.reason is Reason.GUARD:
                return Verdict(Reason.GUARD, f"{asked.by}: {how}")
            return Verdict(Reason.RESTART_ASKED, f"by {asked.by}: {how}")
        case "guard":
            return Verdict(Reason.GUARD, f"{asked.by}: {how}")
        case "time limit":
            return Verdict(Reason.TIME_LIMIT, how)
        case "scheduler":
            return Verdict(asked.reason or Reason.SCHEDULER, how)
        case "superseded":
            return Verdict(Reason.SUPERSEDED, how)
    return Verdict(Reason.KILLED, f"by {asked.by}: {how}")


def how_it_stopped(now: Progress, outcome: Outcome, ours: bool, by_force: bool) -> str:
    """Judged by the `stopped` line and a verified checkpoint, not by an exit code: that of torchrun says nothing."""
    kept = f"checkpoint at step {outcome.checkpoint_step}" if outcome.checkpoint else "no checkpoint"
    at = "" if now.step is None else f" at step {now.step}"
    if not ours:
        return f"ended by SIGKILL{at}" if by_force else f"exit code {outcome.exit_code}{at}"
    if now.stopped is not None:
        return f"at step {now.stopped}, {kept}"
    return f"{'ended by SIGKILL' if by_force else 'ended without saving'}{at}, {kept}"


def newest_checkpoint(run_dir: str, number: int) -> dict[str, Any]:
    """The newest checkpoint of the attempts up to `number` that verifies -> name, step, notes about others."""
    run = RunDir(Path(run_dir))
    best = resume.newest_verified(run, resume.counting_checkpoints(run, number + 1))
    return {"name": Path(best.path).name if best.path else None, "step": best.step, "notes": list(best.notes)}


def facts(attempt: AttemptDir, spec: JobSpec, now: Progress, exit_code: int | None, oom_kills: int) -> Facts:
    """What `failure.judge` is to look at. `exit_code` None: that of the root never came."""
    from cluster.node import room  # a start does without

    first = attempt.node * spec.ranks
    logs = {rank: last_bytes(attempt.rank_log(rank)) for rank in range(first, first + spec.ranks)}
    inside = logs[first] if "torch" in logs[first] else None  # a torchrun that a command started
    agent = last_bytes(attempt.agent_log) if spec.kind == "torchrun" else inside
    code = -signal.SIGKILL if exit_code is None else exit_code
    return Facts(code, spec.resume_rule.kind == "launch", logs, agent, now, oom_kills, room.is_full(attempt.path))
