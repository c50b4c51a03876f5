"""One attempt of a job: prepare, start, watch, stop, and the certainty that nothing of it is left.

Straight code over `Vigil._wait`, which keeps looking at requests, progress and the clock.
"""
from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cluster.events import AttemptStarted, Launched, Reason
from cluster.journal import read_journal
from cluster.node import described, ending, failure, measured, preflight, rank
from cluster.node.aside import AsideFailed
from cluster.node.ending import Outcome
from cluster.node.failure import Verdict
from cluster.node.guarding import Guards
from cluster.node.history import resumed_from
from cluster.node.prepare import Prepared, prepare
from cluster.node.process import SWEEP_S, Proc, dead_children, read_process, send
from cluster.node.progress import Watch, will_step
from cluster.node.resume import counting_checkpoints
from cluster.node.stopping import Identity, Told
from cluster.node.vigil import FIRST_BEAT_S, LOOK_S, Vigil
from cluster.node.waiting import Waiting

if TYPE_CHECKING:
    from cluster.node.leasing import Leasing

LEFTOVERS_S = 10.0  # what is left of a program that has ended well may end by itself for this long
VERIFY_S = 300.0
MEASURE_S = 30.0


class Attempt(Vigil):
    """`live` runs it to its end. The supervisor then decides what follows, records that and calls `close`.

    What is different with several nodes is in `parts` (node 0's side) and `member` (the others').
    """

    def __init__(self, *how: Any) -> None:
        self.resumed: int | str | None = None  # step; path where no step is known
        self.begun_at = time.monotonic()
        self._launched_at = 0.0  # unix s
        self._ended_first = False  # the program had ended by itself when the stop came
        self._by_force = False
        super().__init__(*how)

    @property
    def _ours(self) -> bool:
        """Whether the program writes our metrics and checkpoints."""
        return self.spec.resume_rule.kind == "launch"

    def _will_step(self) -> bool:
        with suppress(OSError):
            return will_step(self.spec.preflight, self.dir.config.read_text(encoding="utf-8"))
        return False

    # --- until it may start -------------------------------------------------------------------------------------------

    def live(self, by: str, code_digest: str | None) -> Outcome:
        blocked = None if self._had_its_turn(by) else self._hold()
        prepared = self._unprepared() if blocked else self._prepare(code_digest)
        self.resumed = resumed_from(prepared.resume, prepared.resume_step)
        me = self.says.me
        self.says.record(AttemptStarted(
            time.time(), self.dir.number, by, me["hostname"], me["boot_id"], me["pid"], me["pid_started"],
            prepared.found, prepared.resume, prepared.resume_step, **self._place.facts, **self._start_facts()))
        for text in prepared.notes:
            self.says.note(text)
        for request in self._early:
            self._ask(request)
        if self._asked:
            return self._not_started(ending.stopped(self._asked, "before its processes were started"))
        if blocked:
            return self._not_started(blocked)
        if prepared.problem:
            return self._not_started(Verdict(Reason.CANNOT_START, prepared.problem))
        if problem := self._preflight(prepared):
            return self._not_started(Verdict(Reason.PREFLIGHT, problem))
        if self._asked:
            return self._not_started(ending.stopped(self._asked, "before its processes were started"))
        return self._live(prepared)

    def _start_facts(self) -> dict[str, Any]:
        """For AttemptStarted."""
        return {}

    def _not_started(self, verdict: Verdict) -> Outcome:
        """Nothing of the job runs, but an environment that hangs while it is activated may."""
        outcome = Outcome(verdict, survivors=tuple(one.pid for one in self._sweep()))
        self._verify(outcome)
        return self._with_request(outcome)

    def _with_request(self, outcome: Outcome) -> Outcome:
        if self._asked:
            outcome.asked, outcome.restart = self._asked.why, self._asked.restart
        return outcome

    def _live(self, prepared: Prepared) -> Outcome:
        oom_before = failure.oom_kills()
        try:
            root = self._start(prepared)
        except OSError as error:
            return self._not_started(Verdict(Reason.CANNOT_START, f"{prepared.command[0]}: {error.strerror}"))
        told = Told(self.spec, self.dir, root)
        self._guards = Guards(self.dir, self.run, self.watch, self._aside, self._will_step())
        ended_well = self._watch_root(root[0], told)
        self._end_guards()
        self._leftovers(told, ended_well)
        survivors = self._sweep(root)
        self._others_end()
        self.watch.drain()
        self.beat()
        outcome = Outcome(exit_code=self._loop.exits.pop(root[0], None), survivors=tuple(one.pid for one in survivors))
        self._verify(outcome)
        self._measure()
        self._look()  # SLURM tells everybody at once: the program may have heard it before its supervisor
        outcome.verdict = self._verdict(outcome, failure.oom_kills() - oom_before)
        return self._with_request(outcome)

    def _had_its_turn(self, by: str) -> bool:
        """Whether it goes on after an attempt that had begun, and nobody asked for a new one."""
        if by in ("submit", "restart"):
            return False
        before, _ = read_journal(self.run.attempt(self.dir.number - 1).journal)
        return any(isinstance(event, Launched) for event in before)

    def _hold(self) -> Verdict | None:
        """Until the jobs it waits for have ended and its turn has come -> why it will never begin, or None."""
        waiting = Waiting(self.run, self.spec, self._aside)
        self._wait_out(waiting)
        return None if self._early else waiting.verdict

    def _wait_out(self, waiting: Waiting | Leasing) -> None:
        """Until it is over, or somebody ends the waiting."""
        with self._place.untimed():
            while not waiting.over and not self._early:
                waiting.step()
                if self._waits != waiting.text:
                    self._waits = waiting.text
                    self.beat()
                if not waiting.over:
                    self._wait(min(LOOK_S, waiting.pause_s))
        waiting.close()
        self._waits, self.begun_at = "", time.monotonic()

    def _lease_gpus(self) -> str:
        """Have the GPUs it asks for, whoever has them now -> why it never will. SLURM gives its own."""
        if self.spec.gpus and self.spec.slurm is None and self._place.lease is None:
            from cluster.node.lease import Claim  # a job without GPUs does without
            from cluster.node.leasing import Leasing
            leasing = Leasing(Claim.of(self.spec), self.spec.host(self.dir.node), self._aside)
            self._wait_out(leasing)
            self._place.lease = leasing.lease
            if leasing.problem:
                return leasing.problem
        if self._place.lease:
            self._gpus = self._place.lease.uuids
            self.beat()
        return ""

    def _prepare(self, code_digest: str | None) -> Prepared:
        self._look()  # it may have been killed while it waited for its turn
        problem = "" if self._early else self._lease_gpus()
        if self._early or problem:
            return self._unprepared(problem or None)
        aside = self._aside(prepare, str(self.run.path), self.dir.number, self.spec, code_digest, self.seat,
                            self._place.lease.gpus if self._place.lease else ())
        if not self._waited_for(aside, unless=lambda: self._early):
            return self._unprepared()
        try:
            return Prepared.from_json(aside.result())
        except AsideFailed as error:
            return self._unprepared(f"launch itself failed while it prepared the start: {error}")

    def _preflight(self, prepared: Prepared) -> str:
        """Look at its inputs as `launch check` does -> what is wrong with them; empty: it may start."""
        if self.spec.preflight is None or self.dir.node:
            return ""
        aside = self._aside(preflight.look, str(self.run.path), self.dir.number, self.spec, prepared.python,
                            prepared.cwd, prepared.env, prepared.gpus, prepared.resume or "")
        if not self._waited_for(aside, unless=lambda: self._asked):
            return ""
        try:
            problem, notes = preflight.said(aside.result()["found"])
        except AsideFailed as error:
            problem, notes = "", [f"its inputs could not be looked at: {error}"]
        for text in notes:
            self.says.note(text)
        return problem

    def _unprepared(self, problem: str | None = None) -> Prepared:
        """With the checkpoints there are: those that an attempt did not find at its start never count again."""
        found = counting_checkpoints(self.run, self.dir.number)
        return Prepared(problem, found=tuple(path.name for path in found))

    def _start(self, prepared: Prepared) -> Identity:
        self._gpus = prepared.gpus
        name = self.dir.agent if self.spec.kind == "torchrun" else str(self.dir.node * self.spec.ranks)
        pid = rank.start(name, str(self.dir.path), prepared.cwd, list(prepared.command), prepared.env or {})
        self._loop.adopt(pid)
        self.helpers.discard(pid)  # one that has ended may have had this pid
        born = read_process(pid)
        self._launched, self._launched_at = True, time.time()
        self.watch = Watch(self.dir, self.spec.progress)
        self.says.record(Launched(self._launched_at, prepared.program, prepared.gpus, pid))
        self.beat()
        self._next_beat = time.monotonic() + FIRST_BEAT_S
        self._describe(prepared)
        return pid, born.started if born else 0

    def _describe(self, prepared: Prepared) -> None:
        """env.json, by the job's own Python and beside the job."""
        if prepared.python is None:
            return
        facts = {"hostname": self.says.me["hostname"], "driver": prepared.driver, "gpus": list(prepared.gpus),
                 "cards": list(prepared.cards)}
        try:
            pid = described.start(self.dir.env, prepared.python, prepared.env or {}, facts)
        except OSError as error:
            self.says.note(f"env.json is missing: {prepared.python}: {error.strerror}")
            return
        self._loop.adopt(pid)
        self.helpers.add(pid)

    def _watch_root(self, pid: int, told: Told) -> bool:
        """Until the root process has ended or the grace is over. -> whether it ended with exit code 0."""
        while pid not in self._loop.exits:
            deadline = self._deadline
            self._wait(LOOK_S if deadline is None else min(LOOK_S, max(0.0, deadline - time.monotonic())))
            if (deadline := self._deadline) is not None and pid not in self._loop.exits:
                if told.not_begun() and self._asked:  # nothing to save, nobody to tell
                    self._asked.deadline = deadline = 0.0
                if time.monotonic() >= deadline:
                    return False
                for identity in told.while_it_runs(self._members() if self.spec.kind == "command" else ()):
                    send(identity, signal.SIGTERM)
        self._ended_first = self._asked is None
        return self._loop.exits[pid] == 0

    def _leftovers(self, told: Told, ended_well: bool) -> None:
        """The root has ended: what is left of the job is told once and may take its time."""
        patience = min(LEFTOVERS_S, self.grace_s) if ended_well else self.grace_s
        until, pause = time.monotonic() + patience, 0.02
        while left := self._members():
            until = until if self._deadline is None else min(until, self._deadline)
            if time.monotonic() >= until:
                return
            for identity in told.after_the_root(left):
                send(identity, signal.SIGTERM)
            self._wait(min(pause, max(0.0, until - time.monotonic())))
            pause = min(LOOK_S, pause * 1.5)

    def _others_end(self) -> None:
        """Our own part has ended, and nothing of it is left."""

    def _sweep(self, root: Identity | None = None) -> list[Proc]:
        """SIGKILL until nothing is left; torchrun first, or it starts its ranks again. -> what could not be ended."""
        until = time.monotonic() + SWEEP_S
        while left := self._members():
            if time.monotonic() > until:
                return left
            self._by_force = True
            if root:
                send(root, signal.SIGKILL)
            for one in left:
                send(one.identity, signal.SIGKILL)
            self._loop.wait(0.02)
        while dead_children(os.getpid(), self._spared) and time.monotonic() < until:
            self._loop.wait(0.01)
        return []

    # --- how it ended -------------------------------------------------------------------------------------------------

    def _verify(self, outcome: Outcome) -> None:
        """The newest checkpoint that verifies now; a hash takes its time."""
        if not self._ours or not self.run.checkpoints.is_dir():
            return
        found = self._in_time("the checkpoints could not be verified", VERIFY_S, ending.newest_checkpoint,
                              str(self.run.path), self.dir.number) or {"notes": ()}
        outcome.checkpoint, outcome.checkpoint_step = found.get("name"), found.get("step")
        for text in found["notes"]:
            self.says.note(text)

    def _measure(self) -> None:
        """What it took, for the estimates of others: reads all of the metrics."""
        if self.spec.cost is None or self.dir.node:
            return
        if problem := self._in_time("what it took was not measured", MEASURE_S, measured.record, str(self.run.path),
                                    self.dir.number, self._launched_at, self._gpus):
            self.says.note(problem)

    def _verdict(self, outcome: Outcome, oom_kills: int) -> Verdict:
        now, asked = self.watch.now, self._asked
        if asked is None or self._ended_first and asked.why != "restart":
            verdict = failure.judge(ending.facts(self.dir, self.spec, now, outcome.exit_code, oom_kills))
            if asked is None or asked.why != "scheduler" or verdict.reason is Reason.DONE:
                return verdict
        if self._ours and (now.done or outcome.exit_code == 0 and now.complete):
            asked.restart = None
            return Verdict(Reason.DONE, f"step {now.step}: it was complete when the stop came")
        return ending.stopped(asked, ending.how_it_stopped(now, outcome, self._ours, self._by_force))
