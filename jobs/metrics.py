"""metrics.jsonl (the truth), lines for people, and wandb when it is asked for. Only rank 0 writes.

The only file that imports wandb.
"""
from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.runtime import JobError, WriteFailed

if TYPE_CHECKING:
    import numpy as np

WandbMode = Literal["off", "offline", "online"]


class Metrics:
    """One attempt's metrics file. Until it is opened (and on every rank but 0) nothing is written, nothing
    said."""

    def __init__(self, total: int) -> None:
        self.path: Path | None = None
        self.total = total
        self._wandb: Wandb | None = None

    def open(self, path: Path, wandb: Wandb | None = None) -> None:
        self.path, self._wandb = path, wandb

    def write(self, step: int, event: str | None = None, **values: float | int | str) -> None:
        """One line: `step` attempted passes are done. Raises WriteFailed."""
        if self.path is None:
            return
        line = {"t": round(time.time(), 3), "step": step, "total": self.total}
        if event:
            line["event"] = event
        append_line(self.path, line | values, durable=event == "done")
        if self._wandb:
            self._wandb.scalars(step, values)

    def say(self, text: str) -> None:
        if self.path is not None:
            print(text, flush=True)

    @property
    def takes_images(self) -> bool:
        return self._wandb is not None

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """`picture` [H, W, 3] uint8, to wandb only."""
        if self._wandb:
            self._wandb.image(step, name, picture)

    def close(self) -> None:
        if self._wandb:
            self._wandb.close()


def append_line(path: Path, values: Mapping[str, Any], durable: bool = False) -> None:
    """Append one JSON line with a single write, so that a reader never sees two writers mixed; `durable`: it is there
    after a power cut too. Raises WriteFailed."""
    line = json.dumps({key: _plain(value) for key, value in values.items()}, allow_nan=False).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(28, "No space left on device")
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        hint = "free some disk space, then restart"
        raise WriteFailed(f"cannot write {path}: {error.strerror}", hint) from None


def _plain(value: Any) -> Any:
    """JSON has no nan and inf: they are written as the words "nan", "inf", "-inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Pace:
    """Passes per second and time left, from the time that passes took (not evaluations and saves)."""

    _MEMORY = 0.9  # weight of what was known before

    def __init__(self, total: int) -> None:
        self._total = total
        self._seconds: float | None = None  # per pass
        self._waited: float | None = None  # of these

    def add(self, passes: int, seconds: float, waited: float | None = None) -> None:
        """`waited`: how many of these seconds went by for want of data."""
        self._seconds = self._smooth(self._seconds, seconds / passes)
        if waited is not None:
            self._waited = self._smooth(self._waited, waited / passes)

    def _smooth(self, before: float | None, now: float) -> float:
        return now if before is None else self._MEMORY * before + (1 - self._MEMORY) * now

    def values(self, step: int) -> dict[str, float]:
        if not self._seconds:
            return {}
        wait = {} if self._waited is None else {"data_wait": round(self._waited / self._seconds, 4)}
        return {"it_s": round(1 / self._seconds, 4), "eta_s": round((self._total - step) * self._seconds, 1), **wait}


def duration(seconds: float) -> str:
    """`75` -> `1m15s`, `4000` -> `1h07m`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Wandb:
    """A wandb run that keeps its id (the job's) over all attempts. Raises JobError when it does not start.

    Everything goes through a thread: one 512x3072 picture costs the caller 190 ms otherwise.
    """

    def __init__(self, mode: WandbMode, project: str, job_id: str, directory: Path, config: dict) -> None:
        try:
            import wandb  # .4 CPU-seconds, and only who asked for it needs it installed
        except ImportError:
            raise JobError("wandb is not installed", "pip install wandb, or set wandb.mode: off") from None

        self._wandb = wandb
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            print("wandb: no WANDB_API_KEY, so this run is recorded offline; send it later with `wandb sync`",
                  file=sys.stderr, flush=True)
            mode = "offline"
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        try:
            self._run = wandb.init(mode=mode, project=project, id=job_id, name=job_id, resume="allow",
                                   config=config, dir=str(directory), settings=settings)
        except wandb.Error as error:
            hint = "set wandb.mode: offline, and send it later"
            raise JobError(f"wandb did not start: {error}", hint) from None
        self._run.define_metric("*", step_metric="step")
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float | int | str]) -> None:
        self._queue.put({"step": step, **{k: v for k, v in values.items() if not isinstance(v, str)}})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._queue.put({"step": step, name: self._wandb.Image(picture)})

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(60.0)
        self._run.finish()

    def _send(self) -> None:
        while (values := self._queue.get()) is not None:
            self._run.log(values)
