"""CLAP2Diffusion, stage 2: a LoRA too, from a checkpoint of stage 1.

    torchrun --nproc_per_node=2 -m jobs.clap2 CONFIG [--run-dir DIR] [--resume CHECKPOINT]
"""
from __future__ import annotations

import os

from configs.clap import Clap2Run
from jobs.clap_train import main as train
from jobs.runtime import run_job


def main() -> None:
    train("clap2", Clap2Run, "Train stage 2 of CLAP2Diffusion.")


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
