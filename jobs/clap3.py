"""CLAP2Diffusion, stage 3: the gates alone, from a checkpoint of stage 2 with its LoRA.

    torchrun --nproc_per_node=2 -m jobs.clap3 CONFIG [--run-dir DIR] [--resume CHECKPOINT]
"""
from __future__ import annotations

import os

from configs.clap import Clap3Run
from jobs.clap_train import main as train
from jobs.runtime import run_job


def main() -> None:
    train("clap3", Clap3Run, "Train stage 3 of CLAP2Diffusion.")


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
