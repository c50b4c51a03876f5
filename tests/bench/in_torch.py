"""What is measured inside a process of its own, with torch: prints one JSON object of seconds and MB."""
from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.contract import RunDir
from jobs.checkpoint import Writer, load_tensors, read_state
from jobs.runtime import Job
from jobs.world import World
from models.cameras import mv6, rays
from models.gaussians import Gaussians, render
from tests.bench.measure import median

_CORES = 2
_SIZE = 64  # px
_ROUNDS = 5


def rasterize(count: int, phase: str) -> dict[str, float]:
    """Six views forward and backward: seconds, CPU seconds, and the peak above what torch itself takes."""
    torch.set_num_threads(_CORES)
    gaussians = _scene(count, phase)
    rig = mv6(_SIZE)
    before = _peak_mb()
    cameras = rig.c2w[None], rig.fxfycxcy[None]
    wall, cpu = zip(*[_timed(lambda: _forward_backward(gaussians, *cameras)) for _ in range(_ROUNDS)])
    return {"seconds": median(wall), "cpu": median(cpu), "peak_mb": _peak_mb() - before}


def _scene(count: int, phase: str) -> Gaussians:
    """As GS-LRM gives them: around the rays of six views, large and faint at first, small and dense later."""
    torch.manual_seed(0)
    initial = phase == "initial"
    rig = mv6(_SIZE)
    origins, directions = rays(rig.c2w[None], rig.fxfycxcy[None], _SIZE, _SIZE)
    surface = (origins + directions * (2.7 if initial else 2.2)).movedim(2, -1).reshape(-1, 3)
    means = surface[torch.randint(len(surface), (count,))] + 0.05 * torch.randn(count, 3)
    fields = {"means": means, "sh": torch.randn(count, 1, 3), "quats": torch.randn(count, 4),
              "log_scales": (-2.3 if initial else -3.9) + 0.1 * torch.randn(count, 3),
              "opacity_logits": (-2.0 if initial else 1.0) + 0.1 * torch.randn(count, 1)}
    return Gaussians(**{name: field[None].requires_grad_() for name, field in fields.items()})


def _forward_backward(gaussians: Gaussians, c2w: torch.Tensor, fxfycxcy: torch.Tensor) -> None:
    render(gaussians, c2w, fxfycxcy, _SIZE, _SIZE).image.square().mean().backward()


def checkpoint(megabytes: int, folder: str) -> dict[str, float]:
    """Seconds of each way to save and load so many MB of tensors."""
    torch.set_num_threads(_CORES)
    count = 16
    tensors = {f"layer{number}": torch.randn(megabytes * 250_000 // count) for number in range(count)}
    run = RunDir(Path(folder) / "checkpoint")
    job = Job("bench", run, run.attempt(0), run.checkpoints, None)
    saved: list[float] = []
    writer = Writer(job, keep_last=1, on_saved=lambda done: saved.append(done.seconds))
    stalls, theirs = [], []
    for step in range(1, _ROUNDS + 1):
        stalls.append(_timed(lambda: writer.start(step, {"model": tensors}, {}))[0])
        writer.wait()
        theirs.append(_timed(lambda: _torch_save(tensors, run.path / "plain.pt"))[0])
    path = next(run.checkpoints.glob("step-*"))
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    return {"stall": median(stalls[1:]), "save": median(saved[1:]), "torch_save": median(theirs[1:]),
            "copy": _repeated(lambda: _copy(tensors, into)), "load": _repeated(lambda: _load(path, into)),
            "torch_load": _repeated(lambda: _copy(torch.load(run.path / "plain.pt"), into))}


def _torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def _load(path: Path, into: dict[str, torch.Tensor]) -> None:
    read_state(path)
    load_tensors(path, {"model": into}, World(0, 1, torch.device("cpu")))


def _copy(tensors: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        into[name].copy_(tensor)


def _timed(action: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def _repeated(action: Callable[[], None]) -> float:
    return median([_timed(action)[0] for _ in range(3)])


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    what, size, word = sys.argv[1:]
    print(json.dumps({"rasterize": rasterize, "checkpoint": checkpoint}[what](int(size), word)))
