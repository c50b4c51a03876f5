"""One attempt of a job: prepare, start, watch, stop, and the certainty that nothing of it is left.

Straight code over `Loop.wait`: whatever it waits for, `_wait` keeps looking at requests, progress and the clock.
"""
from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.events import AttemptStarted, Event, Launched, Note, Reason, StopAsked, encode
from cluster.journal import Journal
from cluster.node import failure, resume
from cluster.node.aside import Aside, AsideFailed
from cluster.node.control import Control, Restart, Stop
from cluster.node.failure import Facts, Verdict
from cluster.node.loop import Loop
from cluster.node.prepare import Prepared, prepare
from cluster.node.process import (
    SWEEP_S, Proc, boot_id, dead_children, descendants, hostname, members, read_process, send, start_time)
from cluster.node.progress import Watch
from cluster.node.rank import ENV_PARENT
from cluster.node.scribe import Scribe
from cluster.node.stopping import Identity, Told
from cluster.node.tail import last_bytes
from cluster.spec import JobSpec
from cluster.states import Pending, Status, apply

LOOK_S = 0.5  # requests and progress
BEAT_S = 10.0  # heartbeat and memory
FIRST_BEAT_S = 1.0  # after the start, so that a short job has a figure for its memory too
GRACE_MIN_S = 60.0
GRACE_SAVES = 3.0  # times the last measured save
LEFTOVERS_S = 10.0  # what is left of a program that has ended well may end by itself for this long
VERIFY_S = 300.0


@dataclass
class Outcome:
    """How an attempt ended, before anybody decided what comes next."""

    verdict: Verdict
    exit_code: int | None = None
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    survivors: tuple[int, ...] = ()
    restart: Restart | None = None
    asked: bool = False


@dataclass
class Asked:
    """A stop that is under way."""

    why: str
    by: str
    deadline: float  # time.monotonic
    restart: Restart | None = None


class Attempt:
    """`live` runs it to its end; `record` writes an event and is the only thing that changes the status."""

    def __init__(self, run: RunDir, number: int, spec: JobSpec, loop: Loop, control: Control,
                 ends_at: float | None, save_s: float | None) -> None:
        self.run, self.dir, self.spec, self.loop = run, run.attempt(number), spec, loop
        self.status: Status = Pending(spec.submitted_at, None, "submitted")
        self.asked: Asked | None = None
        self.watch = Watch(self.dir, {})
        self.helpers: set[int] = set()  # children of the supervisor that are not the job
        self._control, self._ends_at, self._save_s = control, ends_at, save_s
        self._journal: Journal | None = None
        self._scribe = Scribe(self.dir)
        self._early: list[Stop | Restart] = []
        self._root: Identity | None = None
        self._gpus: tuple[str, ...] = ()
        self._peak_rss_mb = 0.0
        self._ended_first = False  # the program had ended by itself when the stop came
        self._used_force = False
        self._next_look = self._next_beat = 0.0
        self._me = {"hostname": hostname(), "boot_id": boot_id(), "pid": os.getpid(),
                    "pid_started": start_time(os.getpid()), "attempt": number}
        self.beat()

    @property
    def grace_s(self) -> float:
        """How long a stop may take: the spec's word, else what the saves seen so far suggest."""
        if self.spec.grace_s is not None:
            return self.spec.grace_s
        return max(GRACE_MIN_S, GRACE_SAVES * (self.watch.now.save_s or self._save_s or 0.0))

    # what it says

    def record(self, event: Event) -> None:
        self.status = apply(self.status, event)
        if self._journal is None:
            self._journal = Journal(self.dir.journal)
        self._journal.append(event)
        self._scribe.log(json.dumps(encode(event), ensure_ascii=False))
        self.beat()

    def note(self, text: str) -> None:
        self.record(Note(time.time(), text))

    def beat(self) -> None:
        now = self.watch.now
        self._next_beat = time.monotonic() + BEAT_S
        self._scribe.beat({
            "t": time.time(), **self._me, "step": now.step, "total": now.total, "loss": now.loss, "it_s": now.it_s,
            "eta_s": now.eta_s, "applied": now.applied, "peak_rss_mb": round(self._peak_rss_mb, 1),
            "gpus": list(self._gpus), "save_s": now.save_s or self._save_s})

    def beat_if_due(self) -> None:
        if time.monotonic() >= self._next_beat:
            self.beat()

    def close(self) -> None:
        self.beat()
        self._scribe.close()
        if self._journal is not None:
            self._journal.close()

    # its life

    def live(self, by: str, code_digest: str | None) -> Outcome:
        prepared = self._prepare(code_digest)
        self.record(AttemptStarted(time.time(), self.dir.number, by, self._me["hostname"], self._me["boot_id"],
                                   self._me["pid"], self._me["pid_started"], prepared.found, prepared.resume,
                                   prepared.resume_step))
        for text in prepared.notes:
            self.note(text)
        for request in self._early:
            self._ask(request)
        if self.asked:
            return Outcome(self._stopped_verdict("before its processes were started"), asked=True,
                           restart=self.asked.restart)
        if prepared.problem:
            return Outcome(Verdict(Reason.CANNOT_START, prepared.problem))
        return self._live(prepared)

    def _live(self, prepared: Prepared) -> Outcome:
        oom_before = failure.oom_kills()
        try:
            root = self._start(prepared)
        except OSError as error:
            return Outcome(Verdict(Reason.CANNOT_START, f"{prepared.command[0]}: {error.strerror}"))
        told = Told(self.spec, self.dir, root)
        self._leftovers(told, ended_well=self._watch_root(root[0], told))
        survivors = self._sweep(root)
        self.watch.drain()
        exit_code = self.loop.exits.pop(root[0], None)
        outcome = Outcome(Verdict(Reason.ERROR, ""), exit_code, survivors=tuple(one.pid for one in survivors))
        self._verify(outcome)
        outcome.verdict = self._verdict(exit_code, oom_before, outcome)
        if self.asked:
            outcome.asked, outcome.restart = True, self.asked.restart
        return outcome

    def _prepare(self, code_digest: str | None) -> Prepared:
        aside = self._aside(prepare, str(self.run.path), self.dir.number, self.spec, code_digest)
        while not aside.done() and not self._early:
            self._wait(LOOK_S)
        if not aside.done():
            aside.kill()
            return Prepared()
        try:
            return Prepared.from_json(aside.result())
        except AsideFailed as error:
            return Prepared(problem=f"launch itself failed while it prepared the start: {error}")

    def _start(self, prepared: Prepared) -> Identity:
        """Start the one child from this (the main) thread: PDEATHSIG is bound to the thread that starts it."""
        self._gpus = prepared.gpus
        env = {**(prepared.env or {}), ENV_PARENT: str(os.getpid())}
        pid = _spawn(list(prepared.command), env)
        self.loop.adopt(pid)
        born = read_process(pid)
        root = (pid, born.started if born else 0)
        self._root = root
        self.watch = Watch(self.dir, self.spec.progress)
        self.record(Launched(time.time(), prepared.program, prepared.gpus, pid))
        self._next_beat = time.monotonic() + FIRST_BEAT_S
        self._describe(prepared)
        return root

    def _describe(self, prepared: Prepared) -> None:
        if prepared.python is None:
            return
        facts = {"hostname": self._me["hostname"], "driver": prepared.driver, "gpus": list(prepared.gpus)}
        source = __loader__.get_data(os.path.join(os.path.dirname(__file__), "describe.py")).decode()
        secretless = {name: value for name, value in (prepared.env or {}).items() if not name.startswith("LAUNCH_")}
        try:
            pid = _spawn([prepared.python, "-c", source, str(self.dir.env), json.dumps(facts)], secretless)
        except OSError as error:
            self.note(f"env.json is missing: {prepared.python}: {error.strerror}")
            return
        self.loop.adopt(pid)
        self.helpers.add(pid)

    def _watch_root(self, pid: int, told: Told) -> bool:
        """Until the root process has ended or the grace is over. -> whether it ended with exit code 0."""
        while pid not in self.loop.exits:
            self._wait(LOOK_S)
            if self.asked and pid not in self.loop.exits:
                if time.monotonic() >= self.asked.deadline or told.not_begun():
                    self.asked.deadline = 0.0
                    return False
                for identity in told.while_it_runs(self._members() if self.spec.kind == "command" else ()):
                    send(identity, signal.SIGTERM)
        self._ended_first = self.asked is None
        return self.loop.exits[pid] == 0

    def _leftovers(self, told: Told, ended_well: bool) -> None:
        """The root has ended: what is left of the job is told once and may take its time."""
        patience = min(LEFTOVERS_S, self.grace_s) if ended_well else self.grace_s
        until, pause = time.monotonic() + patience, 0.02
        while left := self._members():
            until = min(until, self.asked.deadline) if self.asked else until
            if time.monotonic() >= until:
                return
            for identity in told.after_the_root(left):
                send(identity, signal.SIGTERM)
            self._wait(min(pause, max(0.0, until - time.monotonic())))
            pause = min(LOOK_S, pause * 1.5)

    def _sweep(self, root: Identity) -> list[Proc]:
        """SIGKILL until nothing is left; torchrun first, or it starts its ranks again. -> what could not be ended."""
        until = time.monotonic() + SWEEP_S
        while left := self._members():
            if time.monotonic() > until:
                return left
            self._used_force = True
            send(root, signal.SIGKILL)
            for one in left:
                send(one.identity, signal.SIGKILL)
            self.loop.wait(0.02)
        while dead_children(os.getpid(), self.helpers) and time.monotonic() < until:
            self.loop.wait(0.01)
        return []

    def _members(self) -> list[Proc]:
        return members(os.getpid(), self.spec.token, self.helpers)

    # what it looks at while it waits

    def _wait(self, longest_s: float) -> None:
        woken = self.loop.wait(longest_s)
        now = time.monotonic()
        if woken or now >= self._next_look:
            self._look()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self.watch.update()
        if now >= self._next_beat:
            if self._root is not None:
                rss = sum(one.rss_mb for one in descendants(os.getpid(), self.helpers))
                self._peak_rss_mb = max(self._peak_rss_mb, rss)
            self.beat()

    def _look(self) -> None:
        requests: list[Stop | Restart] = list(self._control.new_requests())
        if self.loop.terminated:
            self.loop.terminated = False
            requests.append(Stop(by="a SIGTERM to the supervisor"))
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            self._ends_at = None
            requests.append(Stop(by="launch", why="time limit"))
        for request in requests:
            if self._journal is None:
                self._early.append(request)
            else:
                self._ask(request)

    def _ask(self, request: Stop | Restart) -> None:
        """Begin a stop, or shorten the one under way. A kill overrules a restart, never the other way round."""
        now = isinstance(request, Stop) and request.now
        grace_s = 0.0 if now else self.grace_s if request.grace_s is None else request.grace_s
        restart = request if isinstance(request, Restart) else None
        deadline = time.monotonic() + grace_s
        if self.asked is None:
            self.asked = Asked("restart" if restart else request.why, request.by, deadline, restart)
        elif restart is not None:
            self.note(f"{request.by} asked for a restart while the job was being stopped: not done")
            return
        else:
            self.asked.deadline = min(self.asked.deadline, deadline)
            self.asked.restart, self.asked.why, self.asked.by = None, request.why, request.by
        self.record(StopAsked(time.time(), request.by, self.asked.why, grace_s))

    # how it ended

    def _verify(self, outcome: Outcome) -> None:
        """The newest checkpoint that verifies now; a hash takes its time, so it is done aside."""
        if self.spec.resume_rule.kind != "launch" or not self.run.checkpoints.is_dir():
            return
        found = self._ask_aside(newest_checkpoint, VERIFY_S, str(self.run.path), self.dir.number)
        if found is None:
            self.note("the checkpoints could not be verified in time")
            return
        outcome.checkpoint, outcome.checkpoint_step = found["name"], found["step"]
        for text in found["notes"]:
            self.note(text)

    def _verdict(self, exit_code: int | None, oom_before: int, outcome: Outcome) -> Verdict:
        now = self.watch.now
        ours = self.spec.resume_rule.kind == "launch"
        if self.asked is None or self._ended_first and self.asked.why != "restart":
            return failure.judge(self._facts(exit_code, oom_before, ours))
        if ours and exit_code == 0 and now.complete:
            self.asked.restart = None
            return Verdict(Reason.DONE, f"step {now.step}: it was complete when the stop came")
        return self._stopped_verdict(self._how_it_stopped(exit_code, ours, outcome))

    def _facts(self, exit_code: int | None, oom_before: int, ours: bool) -> Facts:
        logs = {rank: last_bytes(self.dir.rank_log(rank)) for rank in range(self.spec.ranks)}
        is_torchrun = self.spec.kind == "torchrun"
        agent = last_bytes(self.dir.logs / "agent.log") if is_torchrun else logs[0] if "torch" in logs[0] else None
        return Facts(exit_code if exit_code is not None else -signal.SIGKILL, ours, logs, agent, self.watch.now,
                     failure.oom_kills() - oom_before)

    def _how_it_stopped(self, exit_code: int | None, ours: bool, outcome: Outcome) -> str:
        now = self.watch.now
        kept = f"checkpoint at step {outcome.checkpoint_step}" if outcome.checkpoint else "no checkpoint"
        if ours and now.stopped is not None:
            return f"at step {now.stopped}, {kept}"
        at = f" at step {now.step}" if now.step is not None else ""
        if self._used_force:
            return f"ended by SIGKILL{at}" + (f", {kept}" if ours else "")
        return (f"without saving{at}, {kept}" if ours else f"{at.strip()} exit code {exit_code}".strip())

    def _stopped_verdict(self, how: str) -> Verdict:
        asked = self.asked
        assert asked is not None
        match asked.why:
            case "restart":
                return Verdict(Reason.RESTART_ASKED, f"by {asked.by}: {how}")
            case "time limit":
                return Verdict(Reason.TIME_LIMIT, how)
        return Verdict(Reason.KILLED, f"by {asked.by}: {how}")

    # work aside

    def _aside(self, function: Callable[..., Any], *args: Any) -> Aside:
        aside = Aside(self.loop, function, *args)
        self.helpers.add(aside.pid)
        return aside

    def _ask_aside(self, function: Callable[..., Any], timeout_s: float, *args: Any) -> Any:
        """None when it took too long or failed; a failure is logged."""
        aside, until = self._aside(function, *args), time.monotonic() + timeout_s
        while not aside.done():
            if time.monotonic() >= until:
                aside.kill()
                return None
            self._wait(min(LOOK_S, until - time.monotonic()))
        try:
            return aside.result()
        except AsideFailed as error:
            self._scribe.log(str(error))
            return None


def newest_checkpoint(run_dir: str, number: int) -> dict[str, Any]:
    """The newest checkpoint of the attempts up to `number` that verifies -> name, step, notes about those that do not."""
    run = RunDir(Path(run_dir))
    best = resume.newest_verified(run, resume.counting_checkpoints(run, number + 1))
    return {"name": Path(best.path).name if best.path else None, "step": best.step, "notes": list(best.notes)}


def _spawn(command: list[str], env: dict[str, str]) -> int:
    null = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    return os.posix_spawn(command[0], command, env, file_actions=[null], setsid=True, setsigmask=())
