"""The ranks of one job: who am I, on which device, and the few collectives that are needed."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from jobs.runtime import AgreedError, JobError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """`size` ranks; a world of one needs no process group."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0  # on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` in place with rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def value_from_main(self, value: T) -> T:
        """Rank 0's picklable value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The picklable value of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def agree(self, error: JobError | None) -> None:
        """Raises AgreedError with the first rank's error when any rank brings one."""
        for found in self.gather(error):
            if found is not None:
                raise AgreedError(found)

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank. Raises AgreedError on every rank when it raised JobError on any."""
        try:
            result = work()
        except JobError as error:
            self.agree(error)
            raise
        self.agree(None)
        return result

    def one_first(self, work: Callable[[], object]) -> None:
        """Run `work` on one rank of each machine, then on the others: for what is built once and cached
        there.

        Raises AgreedError on every rank when it raised JobError on any.
        """
        for first in (True, False):
            self.all_or_none(lambda: work() if (self.local_rank == 0) is first else None)

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and give its picklable result to all; its JobError is everyone's
        AgreedError."""
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except JobError as raised:
                error = raised
        result, error = self.value_from_main((result, error))
        if error is not None:
            raise AgreedError(error)
        return result


@contextmanager
def open_world() -> Iterator[World]:
    """Join the ranks that torchrun started (gloo on CPU, nccl on CUDA); alone without it."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = _device(local)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(0, 1, device, local)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield World(dist.get_rank(), size, device, local)
    # Not on the way out of an exception: a peer may be gone, and the exit of this process closes everything.
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise JobError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible",
                       "start as many ranks per node as there are GPUs")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def mixed_seed(*parts: int | str) -> int:
    """A seed that is a function of `parts` alone, so that no random choice depends on what was drawn
    before."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
