"""What SLURM knows about the jobs of a workdir: one squeue for all of them, and one sacct for those it has
forgotten.

The answer is remembered in <workdir>/.launch/slurm/queue.json, so that many clients ask the controller as often as
one would; after failures it is left alone for longer and longer.
"""
from __future__ import annotations

import bisect
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.node import queue_memory
from cluster.node.queue_memory import Memory
from cluster.node.slurm_tools import SlurmFailed, run
from cluster.node.slurm_words import Phase, in_line, phase_of

ASK_S = 2.5  # a question may take so long
FRESH_S = 2.0  # so old an answer is not asked for again
CHUNK = 1000  # ids on one command line of sacct
_LEAST_S = 0.2  # a program gets no less

_SQUEUE_FIELDS = ("JobArrayID", "JobID", "State", "Reason", "Partition", "PriorityLong", "StartTime", "EndTime",
                  "UserID", "NodeList", "RestartCnt", "Comment", "Name")
_SACCT_FIELDS = ("JobID", "JobIDRaw", "State", "Start", "End", "NodeList", "Partition", "Reason")
_SQUEUE = ["squeue", "-h", "-a", "-r", "-t", "all", "-O", ",".join(f"{name}:|" for name in _SQUEUE_FIELDS)]
_SACCT = ["sacct", "-n", "-X", "-P", "-o", ",".join(_SACCT_FIELDS), "-j"]
_NO_ACCOUNTING = "accounting storage is disabled"  # sacct's words
_NO_VALUE = ("", "(null)", "N/A", "n/a", "None", "NONE", "None assigned", "Unknown")


@dataclass(frozen=True)
class Entry:
    """One job as SLURM sees it. Times are unix seconds."""

    id: str  # 123, or 123_4 of an array
    raw_id: str  # what SLURM_JOB_ID says inside
    state: str  # SLURM's word
    reason: str
    partition: str
    priority: int
    starts_at: float | None  # waiting: the scheduler's estimate
    ended_at: float | None
    nodes: str  # gpu[01-02]; empty while it waits
    restarts: int | None  # None: sacct does not say
    comment: str
    name: str
    own: bool  # of the user who asks
    canceller: str = ""  # uid of who cancelled it, where sacct says so
    position: int | None = None  # among those that wait for the same partition
    of: int | None = None

    @property
    def phase(self) -> Phase:
        return phase_of(self.state)


@dataclass(frozen=True)
class Answer:
    """What is known about one job."""

    entry: Entry | None
    gone: bool  # SLURM said that it does not know it: squeue, and accounting where there is any
    asked_at: float  # unix seconds; 0: never
    unasked: str  # why it could not be asked just now, for a person; empty: it could


UNASKED = Answer(None, False, 0.0, "")  # there was nothing to ask


class Queue:
    """One answer for many jobs."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._entries = {entry.id: entry for entry in map(_from_row, memory.entries)}
        self._by_raw = {entry.raw_id: entry for entry in self._entries.values()
                        if entry.phase is not Phase.WAITING}

    @classmethod
    def ask(cls, workdir: Path, ids: Iterable[str] = (), max_age_s: float = FRESH_S,
            limit_s: float | None = None, pause_max_s: float = queue_memory.BACK_OFF_MAX_S) -> Queue:
        """What is known about `ids` (and every other job of this user's that squeue shows). Never raises: what
        could not be asked, `unasked` says. After failures it is left alone for up to `pause_max_s`.
        """
        limit_s = ASK_S if limit_s is None else limit_s
        ids, deadline = list(dict.fromkeys(ids)), time.monotonic() + limit_s
        memory = queue_memory.read(workdir)
        if not memory.squeue.due(max_age_s, pause_max_s) and not _to_ask_sacct(memory, ids):
            return cls(memory)
        with queue_memory.alone(workdir, limit_s) as alone:
            memory = queue_memory.read(workdir)  # somebody may just have asked
            if not alone:
                memory.squeue.why = memory.squeue.why or "another question to squeue is not answered yet"
                return cls(memory)
            if memory.squeue.due(max_age_s, pause_max_s):
                _ask_squeue(memory, deadline)
            if wanted := _to_ask_sacct(memory, ids):
                _ask_sacct(memory, wanted, deadline)
            queue_memory.write(workdir, memory)
        return cls(memory)

    @property
    def asked_at(self) -> float:
        """When squeue last answered, unix seconds; 0: it never did."""
        return self._memory.squeue.answered_at

    @property
    def unasked(self) -> str:
        """Why squeue could not be asked just now, for a person; empty: it could."""
        squeue, now = self._memory.squeue, time.time()
        if not squeue.why:
            return ""
        said = f"; what is shown it said {now - self.asked_at:.0f} s ago" if self.asked_at else ""
        wait_s = squeue.next_at() - now
        return f"{squeue.why}{said}" + (f"; it is asked again in {wait_s:.0f} s" if wait_s >= 1 else "")

    def current(self, id: str) -> Entry | None:
        """The job as squeue shows it, also for some minutes after its end; None: not there any more."""
        return self._entries.get(id) or (self._by_raw.get(id) if "_" not in id else None)

    def commented(self, comment: str) -> list[Entry]:
        """The jobs that squeue shows whose comment begins with this word."""
        return [entry for entry in self._entries.values() if entry.comment.split(" ")[0] == comment]

    def entry(self, id: str) -> Entry | None:
        """The job as squeue shows it, or as accounting remembers it."""
        if found := self.current(id):
            return found
        if row := self._memory.ended.get(id):
            return _from_row(row)
        rest = self._entries.get(id.partition("_")[0]) if "_" in id else None
        # Points of an array that were cancelled before they began are shown as one, without their numbers.
        return replace(rest, id=id) if rest and rest.phase is Phase.ENDED else None

    def about(self, id: str | None) -> Answer:
        """Everything SLURM said about one job. None: a job that has no id yet."""
        entry = self.entry(id) if id else None
        absent = self._memory.no_accounting or id in self._memory.absent
        gone = entry is None and not self.unasked and absent
        return Answer(entry, gone, self.asked_at, self.unasked or ("" if entry or gone else self._memory.sacct.why))


# --- squeue -------------------------------------------------------------------------------------------------

def _ask_squeue(memory: Memory, deadline: float) -> None:
    asked = time.time()
    try:
        entries = list(_squeue_entries(run(_SQUEUE, max(_LEAST_S, deadline - time.monotonic()))))
    except SlurmFailed as error:
        memory.squeue.failed(asked, str(error))
        return
    memory.squeue.answered(asked)
    memory.entries = [_to_row(entry) for entry in _ranked(entries)
                      if entry.own or entry.comment.startswith("launch:")]


def _squeue_entries(text: str) -> Iterator[Entry]:
    """One per line that has all fields; SLURM_CLUSTERS puts titles between them."""
    uid = str(os.getuid())
    for line in text.splitlines():
        values = line.split("|", len(_SQUEUE_FIELDS) - 1)
        if len(values) == len(_SQUEUE_FIELDS):
            (id, raw, state, reason, partition, priority, start, end, user, nodes, restarts, comment,
             name) = map(str.strip, values)
            yield Entry(id, raw, _state(state)[0], "" if reason in _NO_VALUE else reason, partition,
                        _number(priority), _time(start), _time(end), "" if nodes in _NO_VALUE else nodes,
                        _number(restarts), "" if comment in _NO_VALUE else comment, name.rstrip("|"), user == uid)


def _ranked(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, those that compete for nodes with their place among those of their partition."""
    lines: dict[str, list[tuple[int, int, str]]] = {}
    for entry in entries:
        if _competes(entry):
            for partition in entry.partition.split(","):
                lines.setdefault(partition, []).append(_rank(entry))
    for line in lines.values():
        line.sort()
    return [_placed(entry, lines) if entry.own and _competes(entry) else entry for entry in entries]


def _competes(entry: Entry) -> bool:
    return entry.state == "PENDING" and in_line(entry.reason, entry.priority)


def _rank(entry: Entry) -> tuple[int, int, str]:
    return -entry.priority, _number(entry.id.partition("_")[0]), entry.id


def _placed(entry: Entry, lines: dict[str, list[tuple[int, int, str]]]) -> Entry:
    """Where it stands best, of the partitions it may run in."""
    places = [(bisect.bisect_left(line, _rank(entry)) + 1, len(line))
              for line in (lines[partition] for partition in entry.partition.split(","))]
    position, of = min(places)
    return replace(entry, position=position, of=of)


# --- sacct --------------------------------------------------------------------------------------------------

def _to_ask_sacct(memory: Memory, ids: Sequence[str]) -> list[str]:
    """Those of `ids` that squeue does not show any more and that accounting may know."""
    if memory.no_accounting or memory.squeue.why or not memory.sacct.due(0.0):
        return []
    queue = Queue(memory)
    return [id for id in ids
            if id not in memory.ended and not memory.lately_absent(id) and queue.current(id) is None]


def _ask_sacct(memory: Memory, ids: Sequence[str], deadline: float) -> None:
    """Arrays are asked for as a whole: sacct does not find a point that was cancelled before it began by its
    number.
    """
    numbers = list(dict.fromkeys(id.partition("_")[0] for id in ids))
    asked = time.time()
    for start in range(0, len(numbers), CHUNK):
        chunk = dict.fromkeys(numbers[start:start + CHUNK])
        left_s = deadline - time.monotonic()
        if left_s < _LEAST_S:
            memory.sacct.why = f"sacct was not asked about {len(numbers) - start} jobs: there was no time left"
            return
        try:
            found = {entry.id: entry for entry in _sacct_entries(run([*_SACCT, ",".join(chunk)], left_s))}
        except SlurmFailed as error:
            if _NO_ACCOUNTING in error.words:
                memory.forgo_accounting(asked)
            else:
                memory.sacct.failed(asked, str(error))
            return
        _remember(memory, [id for id in ids if id.partition("_")[0] in chunk], found, asked)
    memory.sacct.answered(asked)


def _sacct_entries(text: str) -> Iterator[Entry]:
    for line in text.splitlines():
        values = line.split("|", len(_SACCT_FIELDS) - 1)
        if len(values) == len(_SACCT_FIELDS):
            id, raw, state, start, end, nodes, partition, reason = map(str.strip, values)
            word, canceller = _state(state)
            yield Entry(id.partition("_[")[0], raw, word, "" if reason in _NO_VALUE else reason, partition, 0,
                        _time(start), _time(end), "" if nodes in _NO_VALUE else nodes, None, "", "", True, canceller)


def _remember(memory: Memory, ids: Iterable[str], found: dict[str, Entry], asked: float) -> None:
    """Endings stay as they are; anything else is asked for again."""
    for id in ids:
        entry = found.get(id) or found.get(id.partition("_")[0])
        if entry and entry.phase is Phase.ENDED:
            memory.ended[id] = _to_row(replace(entry, id=id))
        else:
            memory.absent[id] = asked


# --- values -------------------------------------------------------------------------------------------------

def _state(text: str) -> tuple[str, str]:
    """`CANCELLED by 1000` -> the word and the uid; `CANCELLED+` and the like lose what is not a letter."""
    word, _, rest = text.partition(" ")
    return word.rstrip("+").upper(), rest.removeprefix("by ").strip() if rest.startswith("by ") else ""


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _time(text: str) -> float | None:
    return float(text) if text.isdecimal() and text != "0" else None


def _to_row(entry: Entry) -> list[object]:
    return list(vars(entry).values())


def _from_row(row: Sequence[object]) -> Entry:
    return Entry(*row)  # type: ignore[arg-type]
