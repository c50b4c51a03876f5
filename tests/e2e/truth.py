"""Whether what `launch status` said of a job can have been true when it was heard, by what its journals say afterwards."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.contract import RunDir
from cluster.events import AttemptEnded, AttemptStarted, Event, Launched, Reason, StopAsked
from cluster.journal import read_journal
from cluster.states import ENDED_WORDS, ENDING, WORDS

AT_NODE_S = 5.0  # from the look at a run directory to the client's clock: a status waits 3 s, a lossy link too
CLOCK_S = 1.0


@dataclass(frozen=True)
class Answer:
    """One object of `launch status --json`, and the time of the question (unix seconds)."""

    asked: float
    answered: float
    view: dict

    @property
    def heard(self) -> tuple[float, float]:
        """When the node looked: not before, not after. A look that brought the job back took longer than its age says."""
        at = self.answered - self.view["last_seen_s"]
        return at - AT_NODE_S - CLOCK_S, (self.answered if at >= self.asked else at) + CLOCK_S


class Death(NamedTuple):
    """A supervisor that was ended without a word, and since when."""

    job: str
    attempt: int
    at: float


class Blur(NamedTuple):
    """A time in which a node could not write down what it did: what it said later is older than it looks."""

    node: str | None  # None: all of them
    begin: float
    end: float


def untrue(answer: Answer, events: dict[int, list[Event]], deaths: Sequence[Death], blurs: Sequence[Blur]) -> str:
    """What is wrong with an answer about a job with these events of its attempts; empty: nothing."""
    view = answer.view
    low, high = answer.heard
    state, attempt = view["state"], view["attempt"]
    clear = low
    for blur in blurs:
        if blur.node in (None, view["node"]) and blur.begin <= high and blur.end >= low - AT_NODE_S:
            clear = min(clear, blur.begin - CLOCK_S)
    if view["stale"] and view["last_seen_s"] + CLOCK_S < answer.answered - answer.asked - AT_NODE_S:
        return "older than its age says"
    if attempt is None:
        return "" if state == "PENDING" and not _before(events.get(0, ()), clear, Launched) else f"{state} of no attempt"
    own, next_one = events.get(attempt, []), events.get(attempt + 1, ())
    if _before(next_one, clear, AttemptStarted):
        return f"attempt {attempt}, when {attempt + 1} had begun"
    dead = any((death.job, death.attempt) == (view["id"], attempt) and death.at < clear for death in deaths)
    if state not in ENDED_WORDS and dead:
        return f"{state}, when its supervisor was dead"
    return _of_attempt(state, view["reason"], own, clear, high)


def _of_attempt(state: str, reason: str | None, own: Sequence[Event], low: float, high: float) -> str:
    ended = [event for event in own if isinstance(event, AttemptEnded)]
    over = bool(_before(own, low, AttemptEnded))
    if state == "PENDING":
        return "PENDING, when it ran" if _before(own, low, Launched) else ""
    if state in ("RUNNING", "STOPPING"):
        kind = Launched if state == "RUNNING" else StopAsked
        return f"{state}, when it was not" if over or not _before(own, high, kind) else ""
    if state == "RESTARTING":
        fits = any(event.next != "end" and event.t <= high for event in ended)
        return "" if fits else "RESTARTING, when its attempt had not ended"
    if reason in (Reason.SUPERVISOR_LOST.value, Reason.NODE_LOST.value):
        later = [event for event in own if event.t > high]
        return f"{reason}, but it went on with {later[0]}" if later else ""
    fits = any(event.next == "end" and event.t <= high and WORDS[ENDING[event.reason]] == state for event in ended)
    return "" if fits else f"{state} ({reason}), which it was not"


def _before(events: Sequence[Event], t: float, kind: type) -> list[Event]:
    return [event for event in events if isinstance(event, kind) and event.t < t]


def told(run: RunDir) -> dict[int, list[Event]]:
    """The events of each attempt."""
    return {attempt.number: read_journal(attempt.journal)[0] for attempt in run.attempts()}
