"""pytest plugin: a SLURM for unit tests."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from .fake import FakeSlurm


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """squeue, sacct, sbatch, … that are first on PATH, with an empty queue."""
    fake = FakeSlurm(tmp_path / "fake-slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    return fake
