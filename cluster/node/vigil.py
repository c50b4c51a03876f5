"""What never stops while an attempt lives: whatever it waits for, it looks at requests, progress and the clock.

`_wait` is how every part of an attempt waits. It blocks no longer than it was told, and does what has become due.
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from cluster.contract import RunDir
from cluster.events import Reason, StopAsked
from cluster.node.aside import Aside, AsideFailed
from cluster.node.chronicle import Chronicle
from cluster.node.control import Restart, Stop
from cluster.node.ending import Asked
from cluster.node.guarding import Guards, restarted
from cluster.node.loop import Loop
from cluster.node.place import Place
from cluster.node.process import Proc, descendants, members
from cluster.node.progress import Watch
from cluster.node.torchrun import Seat
from cluster.spec import JobSpec

LOOK_S = 0.5  # requests and progress
BEAT_S = 10.0  # heartbeat and memory
FIRST_BEAT_S = 1.0  # after the start, so that a short job has a figure for its memory too
SAMPLE_SHARE = 200  # looking at the memory takes at most this part of the time, however many processes there are
GRACE_MIN_S = 60.0
GRACE_SAVES = 3.0  # times the last measured save


class Vigil:
    """Over one attempt: what is known of it now, what it says about itself, and what it was asked to do."""

    seat: Seat | None = None  # among several nodes

    def __init__(self, run: RunDir, number: int, spec: JobSpec, loop: Loop, place: Place,
                 save_s: float | None) -> None:
        node = self.seat.node if self.seat else 0
        self.run, self.dir, self.spec = run, run.attempt(number, node), spec
        self.says = Chronicle(self.dir, spec.submitted_at)
        self.watch = Watch(self.dir, {})
        self.helpers: set[int] = set()  # children of the supervisor that are not the job
        self._loop, self._place, self._save_s = loop, place, save_s
        self._early: list[Stop | Restart] = []  # asked before the journal was begun
        self._asked: Asked | None = None
        self._launched = False
        self._guards: Guards | None = None  # while its program runs by itself
        self._gpus: tuple[str, ...] = ()
        self._peak_rss_mb = 0.0
        self._waits = ""  # for what, in words for a person
        self._next_look = self._next_beat = self._next_sample = 0.0
        self.beat()

    @property
    def grace_s(self) -> float:
        """How long a stop may take: the spec's word, else what the saves seen so far suggest."""
        if self.spec.grace_s is not None:
            return self.spec.grace_s
        return max(GRACE_MIN_S, GRACE_SAVES * (self.watch.now.save_s or self._save_s or 0.0))

    @property
    def _deadline(self) -> float | None:
        """By when (time.monotonic) all of it must be gone; None: nobody wants it to end."""
        return self._asked.deadline if self._asked else None

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

    # --- its processes ------------------------------------------------------------------------------------------------

    def _members(self) -> list[Proc]:
        return members(os.getpid(), self.spec.token_on(self.dir.node), self._spared)

    def _family(self) -> list[Proc]:
        """Its processes as they are found at once: what was started by them and by nobody else."""
        return descendants(os.getpid(), self._spared)

    @property
    def _spared(self) -> set[int]:
        """Helpers that live: the pid of one that has ended may be a process of the job by now."""
        return (self.helpers | self._place.helpers) - self._loop.exits.keys()

    # --- waiting ------------------------------------------------------------------------------------------------------

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

    def _sample_memory(self) -> None:
        begun = time.monotonic()
        if self._launched and begun >= self._next_sample:
            self._peak_rss_mb = max(self._peak_rss_mb, sum(one.rss_mb for one in self._family()))
            self._next_sample = begun + SAMPLE_SHARE * (time.monotonic() - begun)

    def _aside(self, function: Callable[..., Any], *args: Any) -> Aside:
        aside = Aside(self._loop, function, *args)
        self.helpers.add(aside.pid)
        return aside

    def _waited_for(self, aside: Aside, unless: Callable[[], object]) -> bool:
        """Whether it was done before `unless` held. Otherwise it is ended, and what it has started like the job."""
        while not aside.done() and not unless():
            self._wait(LOOK_S)
        if aside.done():
            return True
        aside.kill()
        self.helpers.discard(aside.pid)
        return False

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

    # --- what its guards find -----------------------------------------------------------------------------------------

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

    # --- what is asked of it ------------------------------------------------------------------------------------------

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
