"""CLAP2Diffusion, stage 1: projector, audio attention and gates, from a text-to-image model and CLAP.

    torchrun --nproc_per_node=2 -m jobs.clap1 CONFIG [--run-dir DIR] [--resume CHECKPOINT]
"""
from __future__ import annotations

import os

from configs.clap import Clap1Run
from jobs.clap_train import main as train
from jobs.runtime import run_job


def main() -> None:
    train("clap1", Clap1Run, "Train stage 1 of CLAP2Diffusion.")


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
