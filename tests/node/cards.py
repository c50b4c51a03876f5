"""GPUs that are not there: an nvidia-smi that says what the test last told it, in the words of a real one."""
from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster.node import lease

SMI = """#!/bin/sh
case $1 in
--query-gpu=*) cat {dir}/gpus ;;
--query-compute-apps=*) cat {dir}/apps ;;
esac
"""


@dataclass(frozen=True)
class Cards:
    directory: Path
    uuids: tuple[str, ...]

    @classmethod
    def put(cls, directory: Path, count: int) -> Cards:
        """UUIDs that no other test has: leases are the whole machine's."""
        stem = f"GPU-{os.getpid()}-{directory.parent.name}"
        cards = cls(directory, tuple(f"{stem}-{index}" for index in range(count)))
        directory.mkdir()
        smi = directory / "nvidia-smi"
        smi.write_text(SMI.format(dir=shlex.quote(str(directory))))
        smi.chmod(0o755)
        cards.use()
        return cards

    def use(self, *apps: tuple[int, int, int], pinned: tuple[int, ...] = ()) -> None:
        """(index of the GPU, pid, MB) each; `pinned`: GPUs with memory in use by nobody who is shown."""
        used = [sum(mb for index, _, mb in apps if index == number) + 30_000 * (number in pinned)
                for number in range(len(self.uuids))]
        self._write("apps", "".join(f"{self.uuids[index]}, {pid}, {mb}, python\n" for index, pid, mb in apps))
        self._write("gpus", "".join(f"{index}, {uuid}, 81559, {used[index]}, 550.54, NVIDIA H100\n"
                                    for index, uuid in enumerate(self.uuids)))

    def _write(self, name: str, text: str) -> None:
        aside = self.directory / f".{name}"
        aside.write_text(text)
        aside.replace(self.directory / name)

    @property
    def path(self) -> str:
        return f"{self.directory}:{os.environ['PATH']}"

    def numbers(self, said: str) -> list[int]:
        """Of what CUDA_VISIBLE_DEVICES was."""
        return [self.uuids.index(uuid) for uuid in said.strip().split(",") if uuid]

    def take_out(self) -> None:
        for uuid in self.uuids:
            for path in lease.DIRECTORY.glob(f"launch-gpu-{uuid}.*"):
                path.unlink()
