"""The first attempt of a job whose program was started without launch: watched, not started.

Its supervisor is no parent of it. It knows the processes by pid and start time, looks often enough to see what they
start, and is never told an exit code.
"""
from __future__ import annotations

import contextlib
import json
import os
import time
from signal import SIGTERM
from typing import Any

from cluster.contract import RunDir
from cluster.events import AttemptStarted, Launched, Reason
from cluster.node import ending, failure
from cluster.node.attempt import Attempt
from cluster.node.ending import Outcome
from cluster.node.failure import Facts, Verdict
from cluster.node.loop import Loop
from cluster.node.place import Place
from cluster.node.prepare import Prepared
from cluster.node.process import Proc, alive, send
from cluster.node.progress import Progress, Watch
from cluster.node.stopping import Identity, Told
from cluster.node.tail import last_bytes
from cluster.node.trees import Tree
from cluster.node.vigil import FIRST_BEAT_S, LOOK_S
from cluster.spec import JobSpec

TREE_S = 2.0  # between two looks at what the program has started
_LAST_BYTES = 8 << 10  # of its output: where the reason of an ending stands


class AdoptedAttempt(Attempt):
    def __init__(self, run: RunDir, number: int, spec: JobSpec, loop: Loop, place: Place,
                 save_s: float | None) -> None:
        taken = json.loads(run.adopted.read_bytes())
        self._root: Identity = (taken["pid"], taken["started"])
        self._log: str | None = taken["log"]
        self._uuids = tuple(taken["gpus"])
        self._tree = Tree(self._root)
        self._next_tree = 0.0
        super().__init__(run, number, spec, loop, place, save_s)

    def live(self, by: str, code_digest: str | None) -> Outcome:
        self._members()
        me = self.says.me
        self.says.record(AttemptStarted(time.time(), self.dir.number, "adopt", me["hostname"], me["boot_id"], me["pid"],
                                        me["pid_started"], (), None, None))
        for request in self._early:
            self._ask(request)
        return self._live(Prepared(command=self.spec.argv, program=self.spec.argv, gpus=self._uuids))

    def _more_facts(self) -> dict[str, Any]:
        """`adopted`: whoever ends the job without its supervisor finds its processes by it, the first one first."""
        return {"adopted": [self._root, *(self._tree.known - {self._root})]}

    def _start(self, prepared: Prepared) -> Identity:
        """Nothing is started: its log becomes that of rank 0, where everybody looks for it."""
        self._gpus = prepared.gpus
        if self._log:
            with contextlib.suppress(FileExistsError):
                self.dir.rank_log(0).symlink_to(self._log)
        self._launched = True
        self.watch = Watch(self.dir, self.spec.progress)
        self.says.record(Launched(time.time(), prepared.program, prepared.gpus, self._root[0]))
        self.watch.update()  # the end of what it has written so far
        self._sample_memory()
        self.beat()
        self._next_beat = time.monotonic() + FIRST_BEAT_S
        return self._root

    def _watch_root(self, pid: int, told: Told) -> bool:
        """Until all of its processes have ended or the grace is over; the first one may end before the others."""
        ends = self._wake_at_the_end()
        try:
            while alive(*self._root) or self._members():
                deadline = self._deadline
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                if deadline is not None:
                    self._tell(told)
                self._wait(LOOK_S if deadline is None else min(LOOK_S, max(0.0, deadline - time.monotonic())))
                if time.monotonic() >= self._next_tree:
                    self._members()
                if not alive(*self._root):
                    ends = self._let_go(ends)
        finally:
            self._let_go(ends)
        self._ended_first = self._asked is None
        return True

    def _wake_at_the_end(self) -> int | None:
        """A pidfd that wakes the loop when the first process ends: there is no SIGCHLD for it here."""
        try:
            descriptor = os.pidfd_open(self._root[0])
        except OSError:  # it is gone, or this kernel is older than 5.3: the next look sees it
            return None
        self._loop.watch(descriptor)
        return descriptor

    def _let_go(self, descriptor: int | None) -> None:
        if descriptor is not None:
            self._loop.forget(descriptor)
            os.close(descriptor)

    def _tell(self, told: Told) -> None:
        living = self._members()
        for identity in told.while_it_runs(living) if alive(*self._root) else told.after_the_root(living):
            send(identity, SIGTERM)

    def _members(self) -> list[Proc]:
        before = self._tree.known
        living = self._tree.living()
        self._next_tree = time.monotonic() + TREE_S
        if self._tree.known != before and self.says.begun:
            self.beat()
        return living

    def _family(self) -> list[Proc]:
        return self._tree.living()

    def _verdict(self, outcome: Outcome, oom_kills: int) -> Verdict:
        if self._asked is not None and (not self._ended_first or self._asked.why == "restart"):
            return ending.stopped(self._asked, self._how_it_stopped())
        return verdict(self.watch.now, last_bytes(self.dir.rank_log(0), _LAST_BYTES), oom_kills)

    def _how_it_stopped(self) -> str:
        step = self.watch.now.step
        at = "" if step is None else f" at step {step}"
        return f"ended by {'SIGKILL' if self._by_force else 'SIGTERM'}{at}"


def verdict(now: Progress, log: str, oom_kills: int) -> Verdict:
    """What the output says about an ending whose exit code nobody knows."""
    if now.complete:
        return Verdict(Reason.DONE, f"step {now.step}; its exit code is not known")
    if failure.last_words(log, ours=False):
        found = failure.judge(Facts(1, False, {0: log}, progress=now, oom_kills=oom_kills))
        return Verdict(found.reason, found.detail)
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return Verdict(Reason.EXIT_UNKNOWN, lines[-1][:200] if lines else "")
