"""CLAP2Diffusion at its smallest, and its imports done once for all forked ranks."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jobs.clap_made  # noqa: F401
import jobs.clap_pictures  # noqa: F401
import jobs.clap_stage  # noqa: F401
import jobs.trainer  # noqa: F401
from jobs import clap1, clap2, clap3, clap_evaluate, clap_generate

_STAGES = {"clap1": clap1, "clap2": clap2, "clap3": clap3, "clap_evaluate": clap_evaluate, "clap_generate": clap_generate}


def main() -> None:
    """STAGE CONFIG …; FAULT=KILL:step kills the rank in that pass."""
    stage = sys.argv.pop(1)
    if os.environ.get("FAULT", "").startswith("KILL:"):
        _die_at(int(os.environ["FAULT"].removeprefix("KILL:")))
    _STAGES[stage].main()


def _die_at(step: int) -> None:
    import signal

    from jobs.clap_stage import ClapStage

    whole = ClapStage.loss

    def loss(self: ClapStage, batch: Any, now: int) -> Any:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, batch, now)

    ClapStage.loss = loss


def training(**changes: Any) -> dict[str, Any]:
    return {"max_steps": 8, "batch_per_rank": 4, "accumulation": 1, "precision": "fp32", "loader_workers": 0,
            "optimizer": {"lr": 1e-3}, "schedule": {"warmup": 2},
            "validation": {"every_steps": 4, "max_items": 8, "timesteps": 2, "resamples": 50}, **changes}


def config_of(stage: str, data: Path, before: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A run of 8 steps: a second or two."""
    config: dict[str, Any] = {"data": str(data), "training": training(**changes.pop("training", {})),
                              "checkpoint": {"every_steps": 4}}
    if stage == "clap1":
        config |= {"base_model": "random:0", "model": {
            "image_size": 8, "tokens": 2, "hidden": 16, "tiny": {
                "base": {"channels": [16, 16], "cross_attention_dim": 16, "steps": 6, "batch": 4},
                "clap": {"width": 8, "projection": 16}}}}
    else:
        config |= {"init_from": str(before), "force": True}
    if stage == "clap2":
        config |= {"lora": {"rank": 2, "alpha": 8}}
    return {**config, **changes}
