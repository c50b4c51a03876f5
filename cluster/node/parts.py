"""One attempt of a job on several nodes, as the supervisor of node 0 leads it.

Node 0's own part is what `Attempt` does on one node; this adds the parts of the others: they are prepared, compared,
started and told to stop together, and the attempt has ended when every part has, or its node is lost.
"""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.events import Reason
from cluster.node import alike, environment
from cluster.node.attempt import Attempt
from cluster.node.control import Restart, Stop
from cluster.node.ending import Outcome, stopped
from cluster.node.failure import Retry, Verdict
from cluster.node.link import Link, Message
from cluster.node.prepare import Prepared
from cluster.node.recall import Recall
from cluster.node.stopping import Identity, Told
from cluster.node.team import CLOCKS_S, Team
from cluster.node.torchrun import Seat
from cluster.node.vigil import LOOK_S

BROKEN_GRACE_S = 8.0  # for the rest once a part has failed: no collective can end any more
ABSENT_S = 60.0  # a node of an allocation that was lost and stays away so long is one for the scheduler
OVERDUE_S = 30.0  # a part that has not reported so long after it had to be gone


@dataclass
class Part:
    """What is known of the part of another node."""

    link: Link | None  # to the supervisor that has it; a later one of the same node knows nothing of it
    facts: dict[str, Any] | None = None  # once it is prepared
    gpus: tuple[str, ...] = ()  # UUIDs
    notes: tuple[str, ...] = ()
    problem: str = ""  # why it cannot be started
    lost: str = ""  # why nothing more will be heard of it
    ended: bool = False
    told: bool = False  # it was stopped before it ended
    leased: bool = False  # it has its GPUs
    waits: str = ""  # for whose
    exit_code: int | None = None
    verdict: Verdict | None = None
    survivors: tuple[int, ...] = ()

    @property
    def working(self) -> bool:
        return not (self.ended or self.lost)

    @property
    def failed(self) -> bool:
        return bool(self.lost) or self.ended and self.exit_code != 0


class LedAttempt(Attempt):
    """Node 0's part, and the lead of the others."""

    def __init__(self, *how: Any, team: Team) -> None:
        self._team = team
        self._parts: dict[int, Part] = {}
        self._broken_by: float | None = None  # time.monotonic: a part has failed, the rest must be gone by then
        self._broken_first = False  # that was before our own part had ended
        self._missing: tuple[str, ...] = ()
        self._nodes: tuple[str, ...] = ()  # hostnames
        super().__init__(*how)
        self._recall = Recall(self.run, self.spec, self._loop)

    def _more_facts(self) -> dict[str, Any]:
        return {"missing": list(self._missing)}

    def _start_facts(self) -> dict[str, Any]:
        return {"nodes": self._nodes}

    # --- together -----------------------------------------------------------------------------------------------------

    def _prepare(self, code_digest: str | None) -> Prepared:
        if not self._gather():
            return self._unprepared()
        self._nodes = (self.says.me["hostname"], *(self._team.hostnames[node] for node, _ in self._links()))
        address = self._links()[0][1].address
        self.seat = Seat(0, self.spec.nodes, address, environment.free_port(), f"{self.spec.id}-{self.dir.number}")
        self._parts = {}
        prepared = super()._prepare(code_digest)
        if prepared.problem or self._early:
            return prepared
        return self._prepare_others(prepared)

    def _lease_gpus(self) -> str:
        """On one node after the other, in an order that all jobs keep: no two can wait for each other."""
        for node in sorted(range(self.spec.nodes), key=lambda node: (self._nodes[node], node)):
            problem = self._lease_on(node) if node else super()._lease_gpus()
            if problem or self._early:
                return problem
        return ""

    def _lease_on(self, node: int) -> str:
        assert self.seat is not None
        part = self._parts[node] = Part(self._team.links.get(node))
        self._find_lost()
        self._tell(part, {"do": "lease", "seat": asdict(replace(self.seat, node=node))})
        with self._place.untimed():
            while part.working and not part.leased and not self._early:
                if self._waits != part.waits:
                    self._waits = part.waits
                    self.beat()
                self._wait(LOOK_S)
        self._waits, self.begun_at = "", time.monotonic()
        return self._lost_words() or (f"{self._team.name(node)}: {part.problem}" if part.problem else "")

    def _gather(self) -> bool:
        """Wait until every node is here; False when somebody ended the waiting."""
        until = time.monotonic() + ABSENT_S
        with self._place.untimed():
            while (missing := self._team.missing()) and not self._early:
                names = tuple(map(self._team.name, missing))
                if names != self._missing:
                    self._missing, self._waits = names, f"waits for {self._team.names(missing)}"
                    self.beat()
                self.helpers |= self._recall.tend(missing)
                self._wait(LOOK_S)
                if time.monotonic() > until and self._place.allocation and self._team.gone:
                    self._early.append(Stop(f"launch: {self._team.names(missing)} did not come back", "scheduler", 0.0,
                                            reason=Reason.NODE_LOST))
        self._recall.cancel()
        self._missing, self._waits, self.begun_at = (), "", time.monotonic()
        return not self._early

    def _prepare_others(self, prepared: Prepared) -> Prepared:
        assert self.seat is not None
        self._find_lost()
        for node, part in self._parts.items():
            seat = replace(self.seat, node=node, resume=prepared.resume, resume_step=prepared.resume_step,
                           resume_args=prepared.resume_args)
            self._tell(part, {"do": "prepare", "seat": asdict(seat)})
        parts = self._parts.values()
        while any(part.working and part.facts is None for part in parts) and not self._early:
            if any(not part.working for part in parts):
                break
            self._wait(LOOK_S)
        told = [f"{self._team.name(node)}: {note}" for node, part in self._parts.items() for note in part.notes]
        return replace(prepared, problem=self._problem(prepared), notes=(*prepared.notes, *told, *self._clocks()))

    def _problem(self, prepared: Prepared) -> str | None:
        for node, part in self._parts.items():
            if part.lost or part.problem:
                return f"{self._team.name(node)}: {part.problem}" if part.problem else self._lost_words()
        facts = {self._team.name(0): prepared.alike}
        facts |= {self._team.name(node): part.facts for node, part in self._parts.items() if part.facts is not None}
        return None if self._early else alike.differences(facts)

    def _clocks(self) -> list[str]:
        far = [(node, ahead) for node, ahead in self._team.clocks.items() if abs(ahead) > CLOCKS_S]
        return [f"the clock of {self._team.name(node)} is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
                for node, ahead in far]

    def _start(self, prepared: Prepared) -> Identity:
        gpus = (*prepared.gpus, *(gpu for part in self._parts.values() for gpu in part.gpus))
        root = super()._start(replace(prepared, gpus=gpus))
        self._tell_all({"do": "start"})
        return root

    def _not_started(self, verdict: Verdict) -> Outcome:
        lost = self._lost_words()
        self._stop_others("launch", 0.0, Reason.CANNOT_START)
        self._others_end()
        if lost and not self._asked:
            verdict = Verdict(Reason.NODE_LOST, lost, Retry.ALWAYS)
        return super()._not_started(verdict)

    # --- while it runs ------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        super()._look()
        for node, message in self._team.look():
            if message.get("attempt") == self.dir.number and (part := self._parts.get(node)):
                _take(part, message)
        self._find_lost()
        failed = [node for node, part in self._parts.items() if part.lost or part.failed and not part.told]
        if self._launched and failed:
            self._break_off(self._lost_words() or f"the part of {self._team.name(failed[0])} has ended")

    def _find_lost(self) -> None:
        for node, part in self._parts.items():
            if part.working and (part.link is None or self._team.links.get(node) is not part.link):
                part.lost = self._team.why_gone(node)

    def _ask(self, request: Stop | Restart) -> None:
        super()._ask(request)
        assert self._asked is not None
        reason = None if self._asked.why == "kill" else stopped(self._asked, "").reason
        self._stop_others(self._asked.by, max(0.0, self._asked.deadline - time.monotonic()), reason)

    def _break_off(self, why: str) -> None:
        if self._broken_by is None:
            self._broken_by = time.monotonic() + BROKEN_GRACE_S
            self.says.note(f"{why}: the rest is stopped")
            self._stop_others("launch", BROKEN_GRACE_S, Reason.COMMUNICATION)

    def _stop_others(self, by: str, grace_s: float, reason: Reason | None) -> None:
        """`reason` None: a person wants it."""
        self._tell_all({"do": "stop", "by": by, "grace_s": grace_s, "reason": reason and reason.value})
        for part in self._parts.values():
            part.told = part.told or part.working

    @property
    def _deadline(self) -> float | None:
        asked = super()._deadline
        both = [moment for moment in (asked, self._broken_by) if moment is not None]
        return min(both) if both else None

    def _watch_root(self, pid: int, told: Told) -> bool:
        ended_well = super()._watch_root(pid, told)
        self._broken_first = self._broken_by is not None
        if not ended_well and self._asked is None:
            self._break_off(f"the part of {self._team.name(0)} has ended")
        return ended_well

    def _others_end(self) -> None:
        """Every part has reported, or is lost."""
        while any(part.working for part in self._parts.values()):
            self._wait(LOOK_S)
            if self._deadline is not None and time.monotonic() > self._deadline + OVERDUE_S:
                for part in self._parts.values():
                    if part.working:
                        part.lost = "it does not say that its part has ended"

    # --- how it ended -------------------------------------------------------------------------------------------------

    def _verdict(self, outcome: Outcome, oom_kills: int) -> Verdict:
        own = super()._verdict(outcome, oom_kills)
        verdict = self._shared_verdict(own, outcome)
        left = [f"{self._team.name(node)}: {', '.join(map(str, part.survivors))}"
                for node, part in self._parts.items() if part.survivors]
        if left:
            return replace(verdict, detail=f"{verdict.detail}; could not be ended: {'; '.join(left)}")
        return verdict

    def _shared_verdict(self, own: Verdict, outcome: Outcome) -> Verdict:
        lost = self._lost_words()
        if self._asked and not self._ended_first:
            return replace(own, detail=f"{own.detail}; {lost}") if lost else own
        complete = self._ours and own.reason is Reason.DONE  # whatever its processes did on their way out
        if lost and not complete:
            return Verdict(Reason.NODE_LOST, lost, Retry.ALWAYS)
        failed = [(self._broken_first, own)] if outcome.exit_code != 0 else []
        failed += [(part.told, _on(part.verdict, self._team.name(node)))
                   for node, part in self._parts.items() if part.exit_code != 0 and part.verdict]
        return min(failed, key=_consequence)[1] if failed and not complete else own

    def _lost_words(self) -> str:
        """Empty: none was lost."""
        lost = [f"{self._team.name(node)} was lost ({part.lost})" for node, part in self._parts.items() if part.lost]
        return "; ".join(lost)

    def _links(self) -> list[tuple[int, Any]]:
        return sorted(self._team.links.items())

    def _tell_all(self, message: Message) -> None:
        for part in self._parts.values():
            self._tell(part, message)

    def _tell(self, part: Part, message: Message) -> None:
        if part.working and part.link is not None:
            part.link.send({**message, "attempt": self.dir.number})


def _take(part: Part, message: Message) -> None:
    match message.get("is"):
        case "waits":
            part.waits = message["text"]
        case "leased":
            part.leased = True
        case "ready":
            part.facts, part.gpus, part.notes = message["facts"], tuple(message["gpus"]), tuple(message["notes"])
        case "ended":
            said = message["verdict"]
            part.ended, part.exit_code = True, message["exit_code"]
            part.problem = message["problem"] or ""
            part.verdict = Verdict(Reason(said["reason"]), said["detail"], Retry(said["retry"]))
            part.survivors = tuple(message["survivors"])


def _on(verdict: Verdict, name: str) -> Verdict:
    return replace(verdict, detail=f"{name}: {verdict.detail}")


def _consequence(one: tuple[bool, Verdict]) -> int:
    """0: a cause of its own; more: what follows from another part's end."""
    told, verdict = one
    return 2 * (verdict.reason in (Reason.COMMUNICATION, Reason.SIGNAL)) + told
