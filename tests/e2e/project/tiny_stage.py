"""The small stage of the trainer's own tests as a stage of launch, at a pace at which it can be stopped."""
from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import small_stage
from jobs import checkpoint
from jobs.metrics import Metrics
from jobs.runtime import StopFlag, job_from_environment, run_job
from jobs.trainer import Trainer
from jobs.world import open_world
from torch import Tensor


def settings(path: str) -> dict[str, float]:
    lines = (line.split("#")[0].split(":") for line in Path(path).read_text().splitlines() if ":" in line)
    return {key.strip(): float(value) for key, value in lines}


def slow_saves(seconds: float, dies_in: int) -> None:
    """Make every save last, and end this process in the middle of the save number `dies_in`."""
    whole, count = checkpoint.write_tensors, 0

    def write(path: Path, tensors: dict[str, Tensor]) -> Any:
        nonlocal count
        if path.name == "model.safetensors":
            count += 1
            time.sleep(seconds)
            if count == dies_in and os.environ["LAUNCH_ATTEMPT"] == "0":
                path.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, tensors)

    checkpoint.write_tensors = write


def main() -> None:
    how = settings(sys.argv[1])
    slow_saves(how["save_s"], int(how["die_in_save"]))
    stop = StopFlag().install()
    with open_world() as world:
        job = job_from_environment(None)
        plan = small_stage.small_plan(total=int(how["steps"]), loader_workers=2)
        metrics = Metrics(plan.total)
        if world.is_main:
            metrics.open(job.attempt.metrics)

        def pace(step: int) -> float:
            time.sleep(how["pace_s"])
            return 1.0

        Trainer(small_stage.SmallStage(pace), plan, world, job, metrics, stop).run()


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
