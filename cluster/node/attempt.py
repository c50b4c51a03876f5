"""One attempt of a job: prepare, start, watch, stop, and the certainty that nothing of it is left.

Straight code over `Loop.wait`: whatever it waits for, `_wait` keeps looking at requests, progress and the clock.
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.contract import RunDir
from cluster.events import AttemptStarted, Launched, Reason, StopAsked
from cluster.journal import read_journal
from cluster.node import ending, failure, measured, rank
from cluster.node.aside import Aside, AsideFailed
from cluster.node.chronicle import Chronicle
from cluster.node.control import Restart, Stop
from cluster.node.ending import Asked, Outcome
from cluster.node.failure import Facts, Verdict
from cluster.node.guarding import Guards, restarted
from cluster.node.history import resumed_from
from cluster.node.loop import Loop
from cluster.node.place import Place
from cluster.node.prepare import Prepared, prepare
from cluster.node.process import SWEEP_S, Proc, dead_children, descendants, members, read_process, send
from cluster.node.progress import Watch
from cluster.node.resume import counting_checkpoints
from cluster.node.stopping import Identity, Told
from cluster.node.tail import last_bytes
from cluster.node.torchrun import Seat
from cluster.node.waiting import Waiting
from cluster.spec import JobSpec

if TYPE_CHECKING:
    from cluster.node.leasing import Leasing

LOOK_S = 0.5  # requests and progress
BEAT_S = 10.0  # heartbeat and memory
FIRST_BEAT_S = 1.0  # after the start, so that a short job has a figure for its memory too
SAMPLE_SHARE = 200  # looking at the memory takes at most this part of the time, however many processes there are
GRACE_MIN_S = 60.0
GRACE_SAVES = 3.0  # times the last measured save
LEFTOVERS_S = 10.0  # what is left of a program that has ended well may end by itself for this long
VERIFY_S = 300.0
MEASURE_S = 30.0


class Attempt:
    """`live` runs it to its end. The supervisor then decides what follows, records that and calls `close`.

    What is different with several nodes is in `parts` (node 0's side) and `member` (the others').
    """

    seat: Seat | None = None  # among several nodes

    def __init__(self, run: RunDir, number: int, spec: JobSpec, loop: Loop, place: Place,
                 save_s: float | None) -> None:
        node = self.seat.node if self.seat else 0
        self.run, self.dir, self.spec = run, run.attempt(number, node), spec
        self.says = Chronicle(self.dir, spec.submitted_at)
        self.watch = Watch(self.dir, {})
        self.resumed: int | str | None = None  # step; path where no step is known
        self.begun_at = time.monotonic()
        self.helpers: set[int] = set()  # children of the supervisor that are not the job
        self._loop, self._place, self._save_s = loop, place, save_s
        self._early: list[Stop | Restart] = []  # asked before the journal was begun
        self._asked: Asked | None = None
        self._launched = False
        self._guards: Guards | None = None  # while its program runs by itself
        self._launched_at = 0.0  # unix s
        self._gpus: tuple[str, ...] = ()
        self._peak_rss_mb = 0.0
        self._waits = ""  # for what, in words for a person
        self._ended_first = False  # the program had ended by itself when the stop came
        self._by_force = False
        self._next_look = self._next_beat = self._next_sample = 0.0
        self.beat()

    @property
    def grace_s(self) -> float:
        """How long a stop may take: the spec's word, else what the saves seen so far suggest."""
        if self.spec.grace_s is not None:
            return self.spec.grace_s
        return max(GRACE_MIN_S, GRACE_SAVES * (self.watch.now.save_s or self._save_s or 0.0))

    @property
    def _ours(self) -> bool:
        """Whether the program writes our metrics and checkpoints."""
        return self.spec.resume_rule.kind == "launch"

    def beat(self) -> None:
        now = self.watch.now
        self._next_beat = time.monotonic() + BEAT_S
        self.says.beat({
            "step": now.step, "total": now.total, "loss": now.loss, "it_s": now.it_s, "eta_s": now.eta_s,
            "applied": now.applied, "peak_rss_mb": round(self._peak_rss_mb, 1), "gpus": list(self._gpus),
            "save_s": now.save_s or self._save_s, "waits": self._waits, **self._more_facts()})

    def _more_facts(self) -> dict[str, Any]:
        """For the heartbeat."""
        return {}

    def beat_if_due(self) -> None:
        if time.monotonic() >= self._next_beat:
            self.beat()

    # --- its life -----------------------------------------------------------------------------------------------------

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
        self._guards = Guards(self.dir, self.run, self.watch, self._aside)
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
        while not aside.done() and not self._early:
            self._wait(LOOK_S)
        if not aside.done():
            aside.kill()
            self.helpers.discard(aside.pid)  # what it has started is ended like the job
            return self._unprepared()
        try:
            return Prepared.from_json(aside.result())
        except AsideFailed as error:
            return self._unprepared(f"launch itself failed while it prepared the start: {error}")

    def _preflight(self, prepared: Prepared) -> str:
        """Look at its inputs as `launch check` does -> what is wrong with them; empty: it may start."""
        if self.spec.preflight is None or self.dir.node:
            return ""
        aside = self._aside(_look_before, str(self.run.path), self.dir.number, self.spec, prepared.python, prepared.cwd,
                            prepared.env, prepared.gpus, prepared.resume or "")
        while not aside.done() and not self._asked:
            self._wait(LOOK_S)
        if not aside.done():
            aside.kill()
            self.helpers.discard(aside.pid)  # what it has started is ended like the job
            return ""
        try:
            found = aside.result()["found"]
        except AsideFailed as error:
            self.says.note(f"its inputs could not be looked at: {error}")
            return ""
        errors = [one for one in found if one["severity"] == "error"]
        for one in found:
            if not errors and one["severity"] == "warning":
                self.says.note(f"preflight: {one['where']}: {one['what']}")
        return "\n  ".join(f"{one['where']}: {one['what']}; {one['fix']}" for one in errors)

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
        facts = {"hostname": self.says.me["hostname"], "driver": prepared.driver, "gpus": list(prepared.gpus)}
        source = __loader__.get_data(os.path.join(os.path.dirname(__file__), "describe.py")).decode()
        env = {name: value for name, value in (prepared.env or {}).items() if not name.startswith("LAUNCH_")}
        try:
            pid = _spawn([prepared.python, "-c", source, str(self.dir.env), json.dumps(facts)], env)
        except OSError as error:
            self.says.note(f"env.json is missing: {prepared.python}: {error.strerror}")
            return
        self._loop.adopt(pid)
        self.helpers.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, pid, 10)  # the job itself is being started now

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

    @property
    def _deadline(self) -> float | None:
        """By when (time.monotonic) all of it must be gone; None: nobody wants it to end."""
        return self._asked.deadline if self._asked else None

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

    def _members(self) -> list[Proc]:
        return members(os.getpid(), self.spec.token_on(self.dir.node), self._spared)

    @property
    def _spared(self) -> set[int]:
        """Helpers that live: the pid of one that has ended may be a process of the job by now."""
        return (self.helpers | self._place.helpers) - self._loop.exits.keys()

    # --- what it looks at while it waits ------------------------------------------------------------------------------

    def _wait(self, longest_s: float) -> None:
        woken = self._loop.wait(longest_s)
        now = time.monotonic()
        if woken or now >= self._next_look:
            self._look()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self.watch.update()
            woken = True
        if woken:  # also by a helper that has something to say: until it was heard the loop would not sleep
            self._guard()
            if self._place.teller:
                self._place.teller.step()
        if now >= self._next_beat:
            self._sample_memory()
            for text in self._place.keep_lease() if self.says.begun else ():
                self.says.note(text)
            self.beat()

    def _guard(self) -> None:
        """Say what its guards have found, and do what its stage file wants done then."""
        if self._asked is not None:
            self._end_guards()
        if self._guards is None:
            return
        found, config = self._guards.look(self._members, self._gpus)
        for text in self._guards.news:
            self.says.note(text)
        self._guards.news.clear()
        for one in found:
            self.says.record(one)
            self._place.tell(one.t)
            if one.policy == "checkpoint-and-stop" and self._asked is None:
                self._ask(Stop(f"guard {one.rule}", "guard"))
            elif one.policy == "restart-with" and self._asked is None:
                spec = restarted(self.spec, config) if config else None
                self._ask(Restart(f"guard {one.rule}", spec=spec, config=config or None, reason=Reason.GUARD))

    def _end_guards(self) -> None:
        if self._guards is not None:
            self._guards.close()
        self._guards = None

    def _sample_memory(self) -> None:
        begun = time.monotonic()
        if self._launched and begun >= self._next_sample:
            rss_mb = sum(one.rss_mb for one in descendants(os.getpid(), self._spared))
            self._peak_rss_mb = max(self._peak_rss_mb, rss_mb)
            self._next_sample = begun + SAMPLE_SHARE * (time.monotonic() - begun)

    def _look(self) -> None:
        for request in self._place.requests(self.dir.number):
            if self.says.begun:
                self._ask(request)
            else:
                self._early.append(request)

    def _ask(self, request: Stop | Restart) -> None:
        """Begin a stop, or shorten the one under way. A kill overrules a restart, never the other way round."""
        now = isinstance(request, Stop) and request.now
        grace_s = 0.0 if now else self.grace_s if request.grace_s is None else request.grace_s
        deadline = time.monotonic() + grace_s
        if isinstance(request, Restart):
            if self._asked is not None:
                return self._too_late(request, self._asked)
            self._asked = Asked("restart", request.by, deadline, request, request.reason)
        elif self._asked is None:
            self._asked = Asked(request.why, request.by, deadline, reason=request.reason)
        else:
            if request.why == "scheduler" and self._asked.restart:
                self._place.control.keep("restart")  # for the next allocation
            self._asked.deadline = min(self._asked.deadline, deadline)
            self._asked.overrule(request)
        self.says.record(StopAsked(time.time(), request.by, self._asked.why, grace_s))

    def _too_late(self, request: Restart, asked: Asked) -> None:
        if asked.why == "scheduler":
            self._place.control.keep("restart")
            self.says.note(f"{request.by} asked for a restart while SLURM ended the allocation: it is done in the next")
        else:
            self.says.note(f"{request.by} asked for a restart while the job was being stopped: not done")

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

    def _in_time(self, otherwise: str, limit_s: float, function: Callable[..., Any], *args: Any) -> Any:
        """The result of slow work, done aside; None, with a note, when it fails or takes too long."""
        aside = self._aside(function, *args)
        until = time.monotonic() + min(limit_s, self._place.ending_s)
        while not aside.done() and time.monotonic() < until:
            self._wait(LOOK_S)
        try:
            if aside.done():
                return aside.result()
            self.says.note(f"{otherwise} in time")
        except AsideFailed as error:
            self.says.note(f"{otherwise}: {error}")
        finally:
            aside.kill()
        return None

    def _verdict(self, outcome: Outcome, oom_kills: int) -> Verdict:
        now, asked = self.watch.now, self._asked
        if asked is None or self._ended_first and asked.why != "restart":
            verdict = failure.judge(self._facts(outcome.exit_code, oom_kills))
            if asked is None or asked.why != "scheduler" or verdict.reason is Reason.DONE:
                return verdict
        if self._ours and (now.done or outcome.exit_code == 0 and now.complete):
            asked.restart = None
            return Verdict(Reason.DONE, f"step {now.step}: it was complete when the stop came")
        return ending.stopped(asked, ending.how_it_stopped(now, outcome, self._ours, self._by_force))

    def _facts(self, exit_code: int | None, oom_kills: int) -> Facts:
        from cluster.node import room  # a start does without

        first = self.dir.node * self.spec.ranks
        logs = {rank: last_bytes(self.dir.rank_log(rank)) for rank in range(first, first + self.spec.ranks)}
        inside = logs[first] if "torch" in logs[first] else None  # a torchrun that a command started
        agent = last_bytes(self.dir.agent_log) if self.spec.kind == "torchrun" else inside
        code = -signal.SIGKILL if exit_code is None else exit_code
        return Facts(code, self._ours, logs, agent, self.watch.now, oom_kills, room.is_full(self.dir.path))

    def _aside(self, function: Callable[..., Any], *args: Any) -> Aside:
        aside = Aside(self._loop, function, *args)
        self.helpers.add(aside.pid)
        return aside


def _look_before(*args: Any) -> dict[str, Any]:
    from cluster.node import check_deep  # loads what the supervisor does without

    return check_deep.before(*args)


def _spawn(command: list[str], env: dict[str, str]) -> int:
    """Deaf to the signals of a scheduler, which sends them to all below the supervisor."""
    null = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    deaf = (signal.SIGUSR1, signal.SIGUSR2)
    return os.posix_spawn(command[0], command, env, file_actions=[null], setsigmask=deaf)
