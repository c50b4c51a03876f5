"""Face-voice matching at its smallest, and its imports done once for all forked ranks."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs.data.seen_heard  # noqa: F401
import jobs.face_voice_stage  # noqa: F401
import jobs.features  # noqa: F401
import jobs.trainer  # noqa: F401
from jobs.face_voice import main

__all__ = ["config_of", "main"]


def config_of(data: Path, freeze: str = "none", dropout: float = 0.1, **training: Any) -> dict[str, Any]:
    """A run of 8 steps on the procedural people in `data`: seconds."""
    return {
        "data": {"voxceleb": str(data), "genders": str(data / "genders.tsv"),
                 "split": {"val": 0.2, "test": 0.2, "seen": 0.3}},
        "model": {"face": {"kind": "tiny", "size": 16, "width": 16}, "voice": {"kind": "tiny", "width": 16},
                  "freeze": freeze, "width": 16, "dropout": dropout},
        "training": {
            "max_steps": 8, "batch": 8, "precision": "fp32", "loader_workers": 0,
            "clips": {"train_s": 0.3, "eval_s": 0.6, "min_s": 0.1}, "optimizer": {"towers_lr": 1e-3},
            "schedule": {"warmup": 2}, "validation": {"every_steps": 4, "trials": 100}, **training},
        "evaluation": {"trials": 300, "bootstrap": 20},
        "checkpoint": {"every_steps": 4, "keep_last": 4}}
