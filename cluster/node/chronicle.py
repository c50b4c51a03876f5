"""What an attempt says about itself: its journal, its heartbeat and the supervisor's log, through one function."""
from __future__ import annotations

import json
import os
import time
from typing import Any

from cluster.contract import AttemptDir
from cluster.events import Event, Note, encode
from cluster.journal import Journal
from cluster.node.process import boot_id, hostname, start_time
from cluster.node.scribe import Scribe
from cluster.states import Pending, Status, apply


class Chronicle:
    """`record` is the only thing that changes the status, and it writes the event. Nothing here blocks."""

    def __init__(self, attempt: AttemptDir, submitted_at: float) -> None:
        self.status: Status = Pending(submitted_at, None, "submitted")
        self.me = {"hostname": hostname(), "boot_id": boot_id(), "pid": os.getpid(),
                   "pid_started": start_time(os.getpid()), "attempt": attempt.number}
        self._attempt = attempt
        self._journal: Journal | None = None
        self._scribe = Scribe(attempt)
        self._last: dict[str, Any] = {}

    @property
    def begun(self) -> bool:
        return self._journal is not None

    def record(self, event: Event) -> None:
        self.status = apply(self.status, event)
        if self._journal is None:
            self._journal = Journal(self._attempt.journal)
        self._journal.append(event)
        self.log(json.dumps(encode(event)))
        self.beat(self._last)

    def note(self, text: str) -> None:
        self.record(Note(time.time(), text))

    def log(self, text: str) -> None:
        self._scribe.log(text)

    def beat(self, facts: dict[str, Any]) -> None:
        """Replace the heartbeat: that the supervisor lives, and `facts`."""
        self._last = facts
        self._scribe.beat({"t": time.time(), **self.me, **facts})

    def close(self) -> None:
        self.beat(self._last)
        self._scribe.close()
        if self._journal is not None:
            self._journal.close()
