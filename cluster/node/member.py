"""The supervisor of one of the other nodes of a job on several: the root of what runs there, led by node 0's.

It does what it is told over one connection and writes files of its own (`node-K.…`). Without node 0 its part of the
job ends, and it looks for node 0 until the job has ended: the link may come back, or a new supervisor there.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.contract import RunDir, write_atomically
from cluster.events import TERMINATED, AttemptEnded, Reason
from cluster.journal import read_journal
from cluster.node.attempt import Attempt
from cluster.node.control import Restart, Stop
from cluster.node.ending import Outcome
from cluster.node.failure import Verdict
from cluster.node.lease import Lease
from cluster.node.link import Link, Message, NotOurs, greet_leader
from cluster.node.loop import Loop
from cluster.node.place import Place
from cluster.node.prepare import Prepared
from cluster.node.process import boot_id, hostname, start_time
from cluster.node.recall import Recall
from cluster.node.supervisor import forget_outer_job
from cluster.node.torchrun import Seat
from cluster.node.vigil import LOOK_S
from cluster.spec import BadSpec, JobSpec

LOST_GRACE_S = 8.0  # for a part whose leader is lost: no collective can end any more
DIAL_S = 3.0  # for one address of node 0
AGAIN_S = 2.0  # from one search for node 0 to the next
ALONE_S = 30.0  # when the job may have ended, a new supervisor of node 0 has this long to be found
ALONE_MAX_S = 7 * 86400.0


def main(run_dir: Path, node: int, allocation: str = "") -> int:
    """Supervise the part of node `node` until the job has ended -> 0 when it completed. `allocation`: the scheduler's,
    which tells node 0's supervisor what it tells this one; where a node comes back late, two may live."""
    forget_outer_job()
    run = RunDir(run_dir)
    lock = os.open(run.path / f".member-{node}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not allocation:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Member(run, node, allocation).run()
    except BlockingIOError:
        sys.stderr.write(f"{run.path}: the supervisor of node {node} is at work\n")
        return 1
    except BadSpec as error:
        sys.stderr.write(f"{run.spec}: {error}\n")
        return 2
    finally:
        os.close(lock)


class Member:
    def __init__(self, run: RunDir, node: int, allocation: str) -> None:
        self._run, self._node, self._allocated = run, node, bool(allocation)
        self._loop = Loop()
        self._spec = JobSpec.from_json(run.spec.read_bytes())
        self._me = {"node": node, "hostname": hostname(), "boot_id": boot_id(), "pid": os.getpid(),
                    "pid_started": start_time(os.getpid()), "allocation": allocation}
        self._over: int | None = None  # exit code, once the job has ended
        self._closed = False  # node 0's supervisor ended, and its host lives
        self._lease: Lease | None = None  # from one attempt to the next
        write_atomically(run.member(node), json.dumps(self._me).encode(), mode=0o600)

    def run(self) -> int:
        while self._over is None and (link := self._find_leader()):
            self._loop.watch(link.descriptor)
            self._serve(link)
            self._closed = link.lost == "the connection was closed"
            self._loop.forget(link.descriptor)
            link.close()
        with contextlib.suppress(OSError):
            self._run.member(self._node).unlink()
        return 1 if self._over is None else self._over

    def _find_leader(self) -> Link | None:
        """None: the job has ended, or nobody will ever come."""
        alone_since, recall = time.monotonic(), Recall(self._run, self._spec, self._loop)
        search = Search(self._run, self._spec.token, self._me)
        while (link := search.found()) is None:
            alone_s = time.monotonic() - alone_since
            if self._terminated() or alone_s > ALONE_S and self._nobody_comes() or alone_s > ALONE_MAX_S:
                break
            if self._lease and alone_s > ALONE_S:
                self._lease.close()
                self._lease = None
            if not self._closed:
                recall.tend([0])
            self._loop.wait(0.1 if alone_s < AGAIN_S else LOOK_S)
        recall.cancel()
        return link

    def _terminated(self) -> bool:
        return self._loop.terminated and not self._allocated

    def _nobody_comes(self) -> bool:
        if self._closed or not self._run.team.exists() or (self._run.control / "stop").exists():
            return True
        attempts = self._run.attempts()
        events = read_journal(attempts[-1].journal)[0] if attempts else []
        return any(isinstance(event, AttemptEnded) and event.next == "end" for event in events)

    def _serve(self, link: Link) -> None:
        """Until the link is lost or the job has ended."""
        while True:
            lost = link.lost  # before the messages are read: the last ones count
            for message in link.received():
                if message.get("do") == "lease":
                    self._take_part(link, message)
                elif message.get("do") == "over":
                    self._over = message["code"]
            if lost or self._over is not None or self._terminated():
                return
            self._loop.wait(LOOK_S)

    def _take_part(self, link: Link, order: Message) -> None:
        number = order["attempt"]
        spec = JobSpec.from_json(self._run.attempt(number).spec.read_bytes())
        orders = Orders(self._run, self._loop, link, self._allocated)
        orders.lease = self._lease
        orders.begin(spec, None)
        part = PartHere(self._run, number, spec, self._loop, orders, None, link=link, seat=Seat(**order["seat"]))
        outcome = part.live("policy", None)
        self._lease = orders.lease
        verdict = outcome.verdict
        part.says.record(AttemptEnded(time.time(), verdict.reason, verdict.detail, outcome.exit_code, None, None, None,
                                      "end", None, outcome.survivors))
        said = {**asdict(verdict), "reason": verdict.reason.value, "retry": verdict.retry.value}
        link.send({"is": "ended", "attempt": number, "exit_code": outcome.exit_code, "verdict": said,
                   "problem": part.problem, "survivors": outcome.survivors})
        part.says.close()


class Search:
    """Looks for node 0 in a thread: names that do not resolve and hosts that do not answer take their time."""

    def __init__(self, run: RunDir, token: str, me: Message) -> None:
        self._run, self._token, self._me = run, token, me
        self._links: list[Link] = []
        self._thread: threading.Thread | None = None
        self._next = 0.0

    def found(self) -> Link | None:
        """Never blocks; to be asked again and again."""
        if self._thread is not None and self._thread.is_alive():
            return None
        if self._links:
            return self._links.pop()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + AGAIN_S
            self._thread = threading.Thread(target=self._search, name="search", daemon=True)
            self._thread.start()
        return None

    def _search(self) -> None:
        try:
            where = json.loads(self._run.team.read_bytes())
        except (OSError, ValueError):  # not written yet, or not yet seen here
            return
        if where.get("allocation") != self._me["allocation"]:
            return
        for address in where["addresses"]:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address, where["port"]), DIAL_S)
                try:
                    self._links.append(greet_leader(connection, self._token, {**self._me, "t": time.time()}))
                    return
                except (OSError, NotOurs):  # somebody else has this address here
                    connection.close()


class Orders(Place):
    """What node 0 wants, as requests to a part; that it is lost is one too. The time limit is node 0's."""

    def __init__(self, run: RunDir, loop: Loop, link: Link, allocated: bool) -> None:
        super().__init__(run, loop)
        self.start = False
        self.seat: Seat | None = None  # once it is to prepare
        self._link, self._allocated = link, allocated
        self._alone = False

    def requests(self, number: int) -> list[Stop | Restart]:
        found: list[Stop | Restart] = []
        for message in self._link.received():
            if message.get("attempt") == number and message.get("do") == "start":
                self.start = True
            elif message.get("attempt") == number and message.get("do") == "prepare":
                self.seat = Seat(**message["seat"])
            elif message.get("attempt") == number and message.get("do") == "stop":
                found.append(_stop(message))
        if self._link.lost and not self._alone:
            self._alone = True
            found.append(Stop(f"launch: node 0 was lost ({self._link.lost})", "scheduler", LOST_GRACE_S,
                              reason=Reason.NODE_LOST))
        if self._loop.terminated and not self._allocated:
            found.append(Stop(TERMINATED))
        return found


def _stop(message: Message) -> Stop:
    """A person's, or one that follows from something else: then its reason is said."""
    reason = Reason(message["reason"]) if message["reason"] else None
    return Stop(message["by"], "scheduler" if reason else "kill", message["grace_s"], message["grace_s"] <= 0.0,
                reason=reason)


class PartHere(Attempt):
    """This node's part of one attempt."""

    def __init__(self, *how: Any, link: Link, seat: Seat) -> None:
        self._link, self._told = link, ""
        self.seat = seat
        self.problem: str | None = None  # why it could not be started
        super().__init__(*how)

    def _hold(self) -> None:
        """What it had to wait for, node 0 has waited for."""

    def beat(self) -> None:
        super().beat()
        if self._waits != self._told:
            self._told = self._waits
            self._link.send({"is": "waits", "attempt": self.dir.number, "text": self._waits})

    def _lease_gpus(self) -> str:
        """And then wait for what to prepare."""
        assert isinstance(self._place, Orders)
        if problem := super()._lease_gpus():
            return problem
        self._link.send({"is": "leased", "attempt": self.dir.number})
        while self._place.seat is None and not self._early:
            self._wait(LOOK_S)
        self.seat = self._place.seat or self.seat
        return ""

    def _prepare(self, code_digest: str | None) -> Prepared:
        prepared = super()._prepare(code_digest)
        self.problem = prepared.problem
        if prepared.problem or self._early:
            return prepared
        self._link.send({"is": "ready", "attempt": self.dir.number, "facts": prepared.alike,
                         "gpus": prepared.gpus, "notes": prepared.notes})
        assert isinstance(self._place, Orders)
        while not self._place.start and not self._early:
            self._wait(LOOK_S)
        return prepared

    def _verify(self, outcome: Outcome) -> None:
        """Node 0 does."""

    def _verdict(self, outcome: Outcome, oom_kills: int) -> Verdict:
        if outcome.exit_code == 0 and self._asked is None:  # whether the job is complete node 0 says
            return Verdict(Reason.DONE, "")
        return super()._verdict(outcome, oom_kills)
