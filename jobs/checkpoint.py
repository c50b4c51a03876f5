"""Checkpoints: one directory each, complete or not there at all.

    checkpoints/step-00000500-a000/   model.safetensors optimizer.safetensors … state.json manifest.json
    checkpoints/.tmp-…                being written; never counts
    checkpoints/best.json             {"checkpoint": name, "metric": …, "value": …}: never pruned

Everything is written aside, synced, the manifest with all hashes last, then one rename makes it a
checkpoint. Rank 0 copies the tensors into buffers that are kept, and a thread writes them while training goes
on.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.contract import (
    MANIFEST, MANIFEST_VERSION, BadCheckpoint, checkpoint_name, list_checkpoints,
    sha256_file, verify_checkpoint, write_atomically,
)
from jobs.made_with import model_in, other_model
from jobs.runtime import Job, JobError, WriteFailed
from jobs.tensorfile import read_into, read_shapes, write_tensors
from jobs.world import World

STATE = "state.json"
BEST = "best.json"
_ASIDE = ".tmp-"
Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # file name without ending -> tensor name -> tensor


@dataclass(frozen=True)
class Saved:
    """One finished checkpoint; `seconds` from the snapshot until it counted."""

    path: Path
    step: int
    seconds: float


class Writer:
    """Writes the checkpoints of this attempt; exists on rank 0 only."""

    def __init__(self, job: Job, keep_last: int, on_saved: Callable[[Saved], None],
                 attachments: Path | None = None) -> None:
        self._job, self._keep_last, self._on_saved = job, keep_last, on_saved
        self._attachments = attachments
        self._attached: dict[str, dict[str, int | str]] = {}  # their entries in a manifest; they do not change
        self._buffers: dict[str, dict[str, torch.Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._error: OSError | None = None
        self._last_step: int | None = None
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        if not job.superseded:
            for leftover in job.checkpoints.glob(f"{_ASIDE}*"):  # of an attempt that died while writing
                shutil.rmtree(leftover, ignore_errors=True)

    def start(self, step: int, tensors: Tensors, state: dict[str, Any]) -> None:
        """Snapshot now, write in the background. Waits for the one before, and raises WriteFailed if that
        failed."""
        self.wait()
        if step == self._last_step:
            return
        began = time.monotonic()
        self._snapshot(tensors)
        self._last_step = step
        self._thread = threading.Thread(target=self._write, args=(step, state, began), name="checkpoint",
                                        daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Report a finished write. Raises WriteFailed."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises WriteFailed."""
        if not self._thread:
            return
        self._thread.join()
        self._thread = None
        if self._saved:
            self._on_saved(self._saved)
        if self._error:
            raise WriteFailed(f"cannot write a checkpoint below {self._job.checkpoints}: "
                              f"{self._error.strerror or self._error}",
                              "free some disk space (`launch prune`), then `launch restart`") from self._error
        if not self._saved:
            raise RuntimeError("a checkpoint was not written: the traceback of its thread is above")

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Keep the checkpoint of this step, whatever comes, if its value is the highest so far."""
        name = checkpoint_name(step, self._job.attempt.number)
        best = read_best(self._job.checkpoints)
        if best is not None and best["value"] >= value or self._job.superseded:
            return
        self.wait()
        if (self._job.checkpoints / name).is_dir():
            content = {"checkpoint": name, "metric": metric, "value": value}
            write_atomically(self._job.checkpoints / BEST, json.dumps(content).encode())

    def _snapshot(self, tensors: Tensors) -> None:
        for file, named in tensors.items():
            buffers = self._buffers.setdefault(file, {})
            for name, tensor in named.items():
                if name not in buffers:
                    buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffers[name].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _write(self, step: int, state: dict[str, Any], began: float) -> None:
        self._saved = self._error = None
        try:
            path = self._write_aside(step, state)
            self._saved = Saved(path, step, time.monotonic() - began)
            if not self._job.superseded:
                prune(self._job.checkpoints, self._keep_last, path)
        except OSError as error:
            self._error = error

    def _attach(self, aside: Path) -> dict[str, dict[str, int | str]]:
        """Put the stage's attachments into a checkpoint; hashed once in this attempt. Their entries."""
        if self._attachments is None:
            return {}
        for name in link_tree(self._attachments, aside):
            if name not in self._attached:
                path = aside / name
                _sync(path, os.O_RDONLY)
                self._attached[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        return dict(self._attached)

    def _write_aside(self, step: int, state: dict[str, Any]) -> Path:
        final = self._job.checkpoints / checkpoint_name(step, self._job.attempt.number)
        aside = final.with_name(f"{_ASIDE}{final.name}-{os.getpid()}")
        aside.mkdir()
        files = self._attach(aside)
        for file, named in self._buffers.items():
            path = aside / f"{file}.safetensors"
            path.parent.mkdir(exist_ok=True)
            files[f"{file}.safetensors"] = write_tensors(path, named)
        write_atomically(aside / STATE, json.dumps(state, indent=1).encode())
        files[STATE] = {"size": (aside / STATE).stat().st_size, "sha256": sha256_file(aside / STATE)}
        resumed = str(self._job.resume) if self._job.resume else None
        manifest = {"version": MANIFEST_VERSION, "job": self._job.id, "attempt": self._job.attempt.number,
                    "step": step, "resumed_from": resumed, "files": files}
        write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1).encode())
        for directory in {(aside / name).parent for name in files}:
            _sync_directory(directory)
        os.rename(aside, final)
        _sync_directory(final.parent)
        return final


def link_tree(source: Path, target: Path) -> list[str]:
    """Link every file below `source` to the same place below `target`; copy where links are refused. Their names."""
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.copyfile(source / name, target / name)
    return names


def _sync_directory(path: Path) -> None:
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_best(directory: Path) -> dict[str, Any] | None:
    """What best.json says, or None without one that can be read."""
    try:
        best = json.loads((directory / BEST).read_bytes())
    except (OSError, ValueError):
        return None
    return best if isinstance(best, dict) and {"checkpoint", "value"} <= best.keys() else None


def prune(directory: Path, keep_last: int, newest: Path) -> list[Path]:
    """Delete all but the last `keep_last` checkpoints, the best one and `newest`, which was just verified.

    A directory is renamed before it is emptied, so that one half deleted is never taken for a checkpoint.
    What cannot be deleted (NFS keeps files that somebody reads) goes with the leftovers of the next attempt.
    """
    best = read_best(directory)
    keep = {newest.name, best["checkpoint"] if best else newest.name}
    gone = [path for path in list_checkpoints(directory)[keep_last:] if path.name not in keep]
    for path in gone:
        aside = path.with_name(f"{_ASIDE}gone-{path.name}")
        with contextlib.suppress(FileNotFoundError):  # somebody else deleted it
            os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
    return gone


def read_state(path: Path) -> dict[str, Any]:
    """Verify the checkpoint at `path` and return its state. Raises JobError."""
    hint = "name another one with --resume; finished checkpoints are named step-NNNNNNNN-aNNN"
    if not path.is_dir():
        raise JobError(f"there is no checkpoint at {path}", hint)
    try:
        verify_checkpoint(path)
        return json.loads((path / STATE).read_bytes())
    except (BadCheckpoint, OSError, ValueError) as error:
        raise JobError(f"the checkpoint does not verify: {error}", hint) from None


def load_tensors(path: Path, tensors: Tensors, world: World, config: Path | None = None) -> None:
    """Fill `tensors` in place from a verified checkpoint: rank 0 reads, all others receive. `config`: of this attempt.

    Raises AgreedError, with the names and shapes, when they are not exactly those of the checkpoint.
    """
    world.on_main(lambda: check_fit(path, tensors, model=model_in(config) if config else {}))
    for file, named in tensors.items():
        if world.is_main:
            read_into(path / f"{file}.safetensors", named)
        with torch.no_grad():
            for tensor in named.values():
                _receive(tensor, world)


def load_module(path: Path, module: str, into: nn.Module) -> None:
    """The weights alone of `module` of a checkpoint, strictly. Raises JobError."""
    read_state(path)
    read_into(path / "model.safetensors", check_module(path, module, into))


def check_module(path: Path, module: str, into: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `into` by their names in the checkpoint; its file has them in these shapes, and no others of
    `module`. Only its header is read. Raises JobError."""
    state = {f"{module}.{name}": tensor for name, tensor in into.state_dict().items()}
    check_fit(path, {"model": state}, only=f"{module}.")
    return state


def check_identity(path: Path, state: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Raises JobError unless the `state` of the checkpoint says the same as `identity`."""
    for key, value in identity.items():
        there = state["identity"].get(key)
        if there != value:
            raise JobError(f"{path}: its {key} is {there}, this run's is {value}",
                           "what it learned does not carry over; train with the same one, or start anew")


def weights_of(modules: Mapping[str, nn.Module], files: Mapping[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    """By file of a checkpoint: `model`, where names begin with their module's, and the modules' own files."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for module, owner in modules.items():
        prefix = "" if module in files else f"{module}."
        found.setdefault(files.get(module, "model"), {}).update(
            {f"{prefix}{name}": tensor for name, tensor in owner.state_dict().items()})
    return found


def _receive(tensor: torch.Tensor, world: World) -> None:
    """Broadcast in place; nccl needs it on the device, where Adam's step counters are not."""
    moved = tensor.detach().to(world.device)
    world.from_main(moved)
    if moved.data_ptr() != tensor.data_ptr():
        tensor.copy_(moved)


def check_fit(path: Path, tensors: Tensors, only: str = "", model: Mapping[str, Any] | None = None) -> None:
    """Raises JobError unless names and shapes (of those that begin with `only`) are the same. Headers are read. With
    `model`, what the config says of it by dotted key, the error begins with what is another value there."""
    problems: list[str] = []
    for file, named in tensors.items():
        try:
            there = {name: shape for name, shape in read_shapes(path / f"{file}.safetensors").items()
                     if name.startswith(only)}
        except ValueError as error:
            raise JobError(f"the checkpoint cannot be read: {error}") from None
        here = {name: list(tensor.shape) for name, tensor in named.items()}
        problems += _some(file, "not in the checkpoint", sorted(here.keys() - there.keys()))
        problems += _some(file, "only in the checkpoint", sorted(there.keys() - here.keys()))
        problems += _some(file, "of another shape", [
            f"{name} {there[name]} there, {here[name]} here"
            for name in sorted(here.keys() & there.keys()) if here[name] != there[name]])
    if problems:
        said = f"the checkpoint {path} does not fit this model"
        other = other_model(path, model) if model else None
        fix = other.fix if other else "take the `model:` of the config it was made with"
        first = [f"{other.what}: {fix}", said] if other else [f"{said}: {fix}"]
        raise JobError("\n  ".join([*first, *problems]), fix)


def _some(file: str, what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{file}: {len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"]
