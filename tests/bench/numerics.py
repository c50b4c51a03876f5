"""The parts of a training that are not the network: the CPU rasteriser and the checkpoints.

Each measurement is a process of its own (`python -m tests.bench.in_torch …`), and so is its peak memory.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from tests.bench.measure import PYTHON, ms, spend
from tests.bench.places import Places
from tests.bench.table import Row

_ROOT = Path(__file__).resolve().parents[2]
_GAUSSIANS = 2 + 6 * 64 * 64
_CHECKPOINT_MB = 256


def rasterizer(places: Places) -> Iterator[Row]:
    """Six 64x64 views, forward and backward, on two cores."""
    first = _measured("rasterize", _GAUSSIANS, "initial")
    trained = _measured("rasterize", _GAUSSIANS, "trained")
    many = _measured("rasterize", 4 * _GAUSSIANS, "initial")
    for name, found in (("as initialised", first), ("as trained", trained)):
        yield Row(f"{_GAUSSIANS:,} Gaussians {name}", f"{ms(found['seconds'])} (cpu {ms(found['cpu'])})",
                  goal="< 1 s", met=found["seconds"] < 1)
    small, big = first["peak_mb"], many["peak_mb"]
    yield Row(f"  memory for {4 * _GAUSSIANS:,}", f"{big:.0f} MB above torch's",
              f"{_GAUSSIANS:,}: {small:.0f} MB", big / small, "linear (<= 4.4x)", big <= 4.4 * small)
    yield Row(f"  time for {4 * _GAUSSIANS:,}", ms(many["seconds"]),
              f"{_GAUSSIANS:,}: {ms(first['seconds'])}", many["seconds"] / first["seconds"])


def checkpoint(places: Places) -> Iterator[Row]:
    """Saving (hashed, synced, in the background) and loading (verified) beside torch.save and torch.load."""
    found = _measured("checkpoint", _CHECKPOINT_MB, str(places.folder))
    pairs = (("training stands still for a save of", "stall", "one copy of the tensors", "copy"),
             ("saved after", "save", "torch.save + fsync", "torch_save"),
             ("verified and loaded after", "load", "torch.load + copy", "torch_load"))
    for what, ours, beside, theirs in pairs:
        yield Row(f"{_CHECKPOINT_MB} MB, {what}", _speed(found[ours]), f"{beside}: {_speed(found[theirs])}",
                  found[ours] / found[theirs])


def _speed(seconds: float) -> str:
    return f"{ms(seconds)}, {_CHECKPOINT_MB / seconds:.0f} MB/s"


def _measured(what: str, size: int, *words: str) -> dict[str, float]:
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    argv = [PYTHON, "-m", "tests.bench.in_torch", what, str(size), *words]
    return json.loads(spend(argv, cwd=_ROOT, env=env).stdout)
