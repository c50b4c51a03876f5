"""A program that does everything to outlive its launcher: argv[1] is where it writes the pids of its processes."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import setproctitle
import torch
from torch.utils.data import DataLoader, Dataset

PIDS = Path(sys.argv[1])
STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(9999)"
FOR_EVER = [sys.executable, "-c", STUBBORN]


def note(kind: str, pid: int) -> None:
    with open(PIDS, "a") as file:
        file.write(f"{kind} {pid}\n")


class Slow(Dataset):
    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> torch.Tensor:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(0.2)
        return torch.zeros(1)


def double_fork() -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        note("double-forked", os.getpid())
        os.execv(FOR_EVER[0], FOR_EVER)


def renamed() -> None:
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        setproctitle.setproctitle("kworker/0:1")
        os.setsid()
        note("renamed", os.getpid())
        time.sleep(9999)


signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("main", os.getpid())
double_fork()
renamed()
note("empty environment", subprocess.Popen(["env", "-i", *FOR_EVER], start_new_session=True).pid)
note("own session", subprocess.Popen(FOR_EVER, start_new_session=True).pid)
loader = DataLoader(Slow(), num_workers=2)
batches = iter(loader)
next(batches)
for worker in batches._workers:
    note("loader", worker.pid)
note("all", 0)
for _ in batches:
    pass
