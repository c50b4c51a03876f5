"""What the stages that train have in common before the first step: arguments, paths, the run directory, and what is
said about the data. Imports no torch: a mistake in the config is told before it is loaded.
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from configs.fields import Strict
from configs.load import read_run
from jobs.runtime import Job, StopFlag, job_by_hand, job_from_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from configs.phase1 import Phase1Run
    from configs.phase3 import Phase3Run
    from configs.training import Wandb as WandbConfig
    from jobs.data.multiview import Found
    from jobs.metrics import Wandb
    from jobs.schedule import Plan
    from jobs.world import World

S = TypeVar("S", bound=Strict)


def run_stage(stage: str, about: str, schema: type[S],
              work: Callable[[S, argparse.Namespace, World, StopFlag], None], **flags: str) -> None:
    """The `main` of a stage: its command line (see `arguments`), its run file, then `work` on every rank."""
    given = arguments(stage, about, **flags)
    config = read_run(given.config, schema)
    os.environ["HF_HUB_OFFLINE"] = "1"  # every weight comes from a folder that the config names
    from jobs.world import open_world

    with open_world() as world:
        # Not before: a rank that waits for one that failed to join must end by torchrun's SIGTERM.
        work(config, given, world, StopFlag().install())


def arguments(stage: str, about: str, **flags: str) -> argparse.Namespace:
    """config, run_dir and resume of the command line of `jobs.<stage>`, and its own flags, each with its help."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{stage}", description=about)
    parser.add_argument("config", type=Path, help=f"a run file (configs/runs/{stage}/*.yaml)")
    parser.add_argument("--run-dir", help=f"where to write; default: runs/{stage}-by-hand-<time>")
    parser.add_argument("--resume", help="a checkpoint directory to go on from")
    for flag, words in flags.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=words)
    return parser.parse_args()


def open_job(stage: str, config: Strict, given: argparse.Namespace, world: World) -> Job:
    """The run directory: the supervisor's, or one made by rank 0 for all."""
    import msgspec

    def by_hand() -> Job:
        job = job_by_hand(stage, given.run_dir, given.resume)
        for place in (job.run.config, job.attempt.config):
            place.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=1))
        return job

    job = None if given.run_dir else job_from_environment(given.resume)
    return job or world.on_main(by_hand)


def find_path(path: str | None) -> str | None:
    """A relative path below the current directory, else below its data/ (launch has made it absolute already)."""
    if path is None or path.startswith("random:") or os.path.exists(path) or os.path.isabs(path):
        return path
    below = os.path.join("data", path)
    return below if os.path.exists(below) else path


def find_list(path: str, name: str) -> str:
    """`find_path` of a list file, or of the list `name` in a data set's folder, as an artifact of phase 2 is."""
    found = str(find_path(path))
    return os.path.join(found, name) if os.path.isdir(found) else found


def plan_of(config: Phase1Run | Phase3Run, lr_decay: Literal["constant", "cosine"] = "cosine") -> Plan:
    """What the trainer does, from `training:` and `checkpoint:` of a run file."""
    from jobs.schedule import Plan

    training, optimizer = config.training, config.training.optimizer
    return Plan(
        total=training.max_steps, accumulation=training.accumulation, batch_per_rank=training.batch_per_rank,
        seed=training.seed, precision=training.precision, lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2), weight_decay=optimizer.weight_decay,
        warmup=training.schedule.warmup, grad_clip=optimizer.grad_clip,
        allowed_gradnorm_factor=optimizer.allowed_gradnorm_factor,
        max_consecutive_skips=training.max_consecutive_skips, checkpoint_every=config.checkpoint.every_steps,
        keep_last=config.checkpoint.keep_last, evaluate_every=training.validation.every_steps,
        log_every=training.log_every_steps, loader_workers=training.loader_workers, lr_decay=lr_decay)


def with_found(config: Any, *keys: str) -> Any:
    """The config with `find_path` of the given keys."""
    import msgspec

    return msgspec.structs.replace(config, **{key: find_path(getattr(config, key)) for key in keys})


def told(what: str, path: str, found: Found) -> list[str]:
    """Lines for people about one list of samples."""
    notes = [f"{what} data: {len(found.samples)} samples of {len(found.samples[0].frames)} views; {path}, "
             f"its lines: {found.paths}"]
    if found.skipped:
        notes.append(f"{what} data: {len(found.skipped)} bad samples left out (on_bad: skip):")
        notes += [f"  {defect.sample}: {defect.file}: {defect.defect}" for defect in found.skipped]
    return notes


def open_wandb(wandb: WandbConfig, config: Strict, job: Job) -> Wandb | None:
    """None when it is off."""
    if wandb.mode == "off":
        return None
    import msgspec

    from jobs.metrics import Wandb

    return Wandb(wandb.mode, wandb.project, job.id, job.run.path, msgspec.to_builtins(config))
