"""Executables that stand for SLURM's on the PATH of a unit test, and note each call."""
from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from .recorded import Answer, answer

TOOLS = ("squeue", "sacct", "sbatch", "scancel", "scontrol", "sinfo")
TOOL = Path(__file__).with_name("tool.py")


class FakeSlurm:
    """A SLURM that says what it is told to.

    squeue and sacct print the columns that they are asked for (`-O Field:SEPARATOR`, `-P -o Field`) of the jobs in
    `jobs()` and `past()`; sbatch counts ids up from 101; scancel and scontrol succeed in silence; sinfo shows the nodes
    of the test bed. `say()` puts other words in their mouths.
    """

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self._state_file, self._calls_file = folder / "state.json", folder / "calls"
        self.bin.mkdir(parents=True)
        self._calls_file.touch()
        for tool in TOOLS:
            script = self.bin / tool
            script.write_text(f"#!/bin/sh\nexec '{sys.executable}' -SE '{TOOL}' '{folder}' {tool} \"$@\"\n")
            script.chmod(0o755)
        self._state: dict[str, dict[str, object]] = {"rows": {"squeue": [], "sacct": []}, "say": {}, "from": {}}
        self._state["defaults"] = {
            name: asdict(answer(name)) for name in ("test-only.possible", "squeue.unknown-id", "sinfo.nodes")
        }
        self._save()

    def jobs(self, *rows: dict[str, str]) -> None:
        """The jobs that squeue knows: recorded.queued("running", JobID="7")."""
        self._state["rows"]["squeue"] = list(rows)
        self._save()

    def past(self, *rows: dict[str, str]) -> None:
        """The jobs that sacct knows: recorded.accounted("timeout", JobID="7", JobIDRaw="7")."""
        self._state["rows"]["sacct"] = list(rows)
        self._save()

    def say(self, tool: str, *answers: Answer | str) -> None:
        """The tool's next answers (or names of recorded ones), in order; the last one stays. None: as at the start."""
        told = [asdict(answer(one) if isinstance(one, str) else one) for one in answers]
        self._state["say"][tool] = told
        self._state["from"][tool] = self.count()[tool]
        self._save()

    def calls(self) -> list[list[str]]:
        """Every call so far, oldest first: ["squeue", "-h", …]."""
        return [json.loads(line) for line in self._calls_file.read_text().splitlines()]

    def count(self) -> Counter[str]:
        """How often each tool was called."""
        return Counter(call[0] for call in self.calls())

    def forget_calls(self) -> None:
        self._calls_file.write_text("")
        self._state["from"] = {}
        self._save()

    def _save(self) -> None:
        self._state_file.write_text(json.dumps(self._state))
