"""Small files written beside the event loop: the heartbeat and the supervisor's own log.

A full or hanging disk must not keep the loop from reaping and killing, so a thread writes, in order.
"""
from __future__ import annotations

import json
import os
import queue
import threading
import time
from typing import Any

from cluster.contract import AttemptDir, write_atomically

_WAITING_MAX = 100  # with a hanging disk, older news is worth nothing


class Scribe:
    def __init__(self, attempt: AttemptDir) -> None:
        self._attempt = attempt
        self._queue: queue.SimpleQueue[dict[str, Any] | str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="scribe", daemon=True)
        self._thread.start()

    def beat(self, heartbeat: dict[str, Any]) -> None:
        if self._queue.qsize() < _WAITING_MAX:
            self._queue.put(heartbeat)

    def log(self, text: str) -> None:
        if self._queue.qsize() < _WAITING_MAX:
            self._queue.put(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self, timeout_s: float = 5.0) -> None:
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while (news := self._queue.get()) is not None:
            try:
                if isinstance(news, str):
                    _append(self._attempt, news)
                else:
                    write_atomically(self._attempt.heartbeat, json.dumps(news).encode())
            except OSError:  # nowhere to say it; the next heartbeat tries again
                continue


def _append(attempt: AttemptDir, text: str) -> None:
    descriptor = os.open(attempt.supervisor_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, text.encode(errors="replace"))
    finally:
        os.close(descriptor)
