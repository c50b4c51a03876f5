"""What was heard of SLURM last, in <workdir>/.launch/slurm/queue.json: shared by everybody who asks, so that the
controller hears one question where many clients look at their jobs.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.contract import write_atomically

_VERSION = 1
_BACK_OFF_S, BACK_OFF_MAX_S = 2.0, 60.0
_NO_ACCOUNTING_S = 600.0  # a cluster without accounting is asked for it again after this time
_ABSENT_S = 5.0  # so long is believed that accounting does not know a job: it is a second behind
_ENDED_MAX = 10_000  # endings that are remembered
_LOCK_POLL_S = 0.02


@dataclass
class Source:
    """How one of SLURM's programs answered."""

    answered_at: float = 0.0  # unix seconds of the question it last answered
    failed_at: float = 0.0
    failures: int = 0  # in a row
    why: str = ""  # the last question was not answered: for a person

    def due(self, max_age_s: float, pause_max_s: float = BACK_OFF_MAX_S) -> bool:
        """Whether it should be asked now: its answer is older than that, and it did not fail just before."""
        now = time.time()
        if self.failed_at <= now < self.next_at(pause_max_s):
            return False
        return not 0 <= now - self.answered_at < max_age_s

    def next_at(self, pause_max_s: float = BACK_OFF_MAX_S) -> float:
        """When it may be asked again after failures, each of which doubles the pause; 0: at once."""
        pause_s = min(pause_max_s, _BACK_OFF_S * 2 ** min(self.failures - 1, 10))
        return self.failed_at + pause_s if self.failures else 0.0

    def answered(self, asked: float) -> None:
        self.answered_at, self.failures, self.why = asked, 0, ""

    def failed(self, asked: float, why: str) -> None:
        self.failed_at, self.failures, self.why = time.time(), self.failures + 1, why


@dataclass
class Memory:
    """Everything that was heard; rows are those of `queue.Entry`."""

    version: int = _VERSION
    squeue: Source = field(default_factory=Source)
    sacct: Source = field(default_factory=Source)
    entries: list[list[Any]] = field(default_factory=list)  # what squeue showed last
    ended: dict[str, list[Any]] = field(default_factory=dict)  # id -> what accounting says for good
    absent: dict[str, float] = field(default_factory=dict)  # id -> when accounting did not know it
    no_accounting_at: float = 0.0

    @property
    def no_accounting(self) -> bool:
        return 0 <= time.time() - self.no_accounting_at < _NO_ACCOUNTING_S

    def forgo_accounting(self, asked: float) -> None:
        self.no_accounting_at = asked
        self.sacct = Source()

    def lately_absent(self, id: str) -> bool:
        return 0 <= time.time() - self.absent.get(id, 0.0) < _ABSENT_S

    def to_json(self) -> bytes:
        now = time.time()
        self.absent = {id: t for id, t in self.absent.items() if 0 <= now - t < _ABSENT_S}
        self.ended = dict(list(self.ended.items())[-_ENDED_MAX:])
        return json.dumps(asdict(self), separators=(",", ":")).encode()


@contextmanager
def alone(workdir: Path, patience_s: float) -> Iterator[bool]:
    """Whether this is the only one that asks now: others wait for its answer instead. False: somebody else still
    asks when the patience ends. Where no lock can be had (a full disk, another person's workdir) everybody may ask.
    """
    try:
        _directory(workdir).mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(_directory(workdir) / "queue.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield True
        return
    try:
        yield _locked(lock, time.monotonic() + patience_s)
    finally:
        os.close(lock)


def _locked(lock: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_POLL_S)
        except OSError:  # a file system without locks
            return True


def read(workdir: Path) -> Memory:
    """Empty when there is none, or one that another version wrote."""
    try:
        raw = json.loads((_directory(workdir) / "queue.json").read_bytes())
        if raw["version"] != _VERSION:
            return Memory()
        return Memory(**{**raw, "squeue": Source(**raw["squeue"]), "sacct": Source(**raw["sacct"])})
    except (OSError, ValueError, KeyError, TypeError):
        return Memory()


def write(workdir: Path, memory: Memory) -> None:
    with contextlib.suppress(OSError):  # a full disk: the next one asks again
        write_atomically(_directory(workdir) / "queue.json", memory.to_json(), 0o600)


def _directory(workdir: Path) -> Path:
    return workdir / ".launch" / "slurm"
