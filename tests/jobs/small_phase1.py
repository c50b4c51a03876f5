"""Phase 1 at its smallest, and its imports done once for all forked ranks."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs.mv_stage  # noqa: F401
import jobs.mv_validation  # noqa: F401
import jobs.trainer  # noqa: F401
from jobs.phase1 import main

__all__ = ["config_of", "main"]


def config_of(data: Path, **training: Any) -> dict[str, Any]:
    """A run of 8 steps on the toy mice in `data`: seconds."""
    return {
        "pretrained": "random:0",
        "model": {"image_size": 16, "tiny": {
            "unet": {"channels": [16, 32], "cross_attention_dim": 16}, "clip": {"width": 16, "layers": 1, "image_size": 16},
            "vae": {"channels": [8, 16], "train_steps": 4, "batch": 2, "min_psnr": 0}}},
        "training": {
            "dataset": {"path": str(data / "data_train.txt")},
            "validation": {"path": str(data / "data_val.txt"), "every_steps": 4, "steps": 2, "guidance": 1.5},
            "max_steps": 8, "batch_per_rank": 2, "accumulation": 1, "precision": "fp32", "loader_workers": 0,
            "gradient_checkpointing": False, "condition_dropout": 0.2, "optimizer": {"lr": 1e-3}, "schedule": {"warmup": 2},
            **training},
        "checkpoint": {"every_steps": 4}}
