"""Which samples a rank sees in which pass, and the processes that read them.

There is no sampler state: pass `s` of rank `r` is a function of (seed, s, r), so a resumed run sees exactly
what an uninterrupted one would have seen, whatever the loader processes had fetched ahead when it stopped.
"""
from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from jobs.runtime import JobError
from jobs.world import World, mixed_seed

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Draw:
    """Sample `index` of the data set, for pass `step`. Augmentations and view choices are functions of it."""

    step: int
    index: int


class Source(Protocol):
    """A data set: its length, and a collated batch for a list of draws. Raises JobError for a bad sample."""

    def __len__(self) -> int: ...

    def batch(self, draws: list[Draw]) -> Any: ...


class Order:
    """The draws of every pass: a fresh permutation per epoch, and batches that run on across epochs."""

    def __init__(self, samples: int, batch_per_rank: int, world: World, seed: int) -> None:
        self._samples, self._batch, self._seed = samples, batch_per_rank, seed
        self._rank, self._ranks = world.rank, world.size
        self._known: dict[int, torch.Tensor] = {}

    def draws(self, step: int) -> list[Draw]:
        first = (step * self._ranks + self._rank) * self._batch
        return [Draw(step, self._index(position)) for position in range(first, first + self._batch)]

    def epoch(self, step: int) -> float:
        """Epochs that are done after `step` passes."""
        return step * self._ranks * self._batch / self._samples

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self._samples)
        if epoch not in self._known:
            generator = torch.Generator().manual_seed(mixed_seed("order", self._seed, epoch))
            self._known = {epoch: torch.randperm(self._samples, generator=generator)}
        return int(self._known[epoch][place])


def batches(source: Source, order: Order, start: int, stop: int, workers: int, pin: bool) -> Iterator[Any]:
    """The batches of passes `start`..`stop`-1, read by `workers` processes (0: in this one).

    A bad sample comes as a JobError in place of its batch: raised in a loader process it would arrive as a
    traceback.
    """
    loader = DataLoader(
        _Fetch(source), batch_size=None, sampler=_Plan(order, range(start, stop)), num_workers=workers,
        collate_fn=_as_is, pin_memory=pin, multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(_become_worker, os.getpid()) if workers else None,
    )
    return iter(loader)


class Waits:
    """The seconds of an update in which the device had nothing to do because the next batch was not there.

    A CPU does nothing while it waits. A GPU works on after a pass of several, while the next one's batch is fetched:
    then that part of the wait counts in which it was idle by its own clock.
    """

    def __init__(self, device: torch.device, passes: int) -> None:
        self._overlaps = device.type == "cuda" and passes > 1
        self._seconds = 0.0
        self._done: torch.cuda.Event | None = None  # the device's work of the pass before, in this update
        self._gaps: list[tuple[float, torch.cuda.Event, torch.cuda.Event]] = []

    def next(self, source: Iterator[Any]) -> Any:
        """The next batch of `source`."""
        began = time.monotonic()
        batch = next(source)
        waited = time.monotonic() - began
        if self._done is None:
            self._seconds += waited
        else:
            self._gaps.append((waited, self._done, _mark()))
        return batch

    def passed(self) -> None:
        """After a pass was handed to the device."""
        if self._overlaps:
            self._done = _mark()

    def taken(self) -> float:
        """Of this update; the device has done all of its passes."""
        seconds = self._seconds + sum(min(waited, done.elapsed_time(begun) / 1000)
                                      for waited, done, begun in self._gaps)
        self._seconds, self._done = 0.0, None
        self._gaps.clear()
        return seconds


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _Plan:
    def __init__(self, order: Order, steps: range) -> None:
        self._order, self._steps = order, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        return map(self._order.draws, self._steps)


class _Fetch(Dataset):
    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, draws: list[Draw]) -> Any:
        try:
            return self._source.batch(draws)
        except JobError as error:
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _become_worker(parent: int, _worker: int) -> None:
    """A loader process leaves when its rank asks it to or dies, and for nobody else's TERM or INT: torchrun
    signals whole sessions, and a rank without its loader cannot reach the step it agreed to stop at."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl
        os._exit(1)
