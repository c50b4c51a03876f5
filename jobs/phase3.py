"""Phase 3, GS-LRM: six posed views to 3D Gaussians.

    torchrun --nproc_per_node=2 -m jobs.phase3 CONFIG [--run-dir DIR] [--resume CHECKPOINT]
"""
from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.phase3 import Phase3Run
from jobs.runtime import JobError, StopFlag, run_job
from jobs.start import open_job, open_wandb, plan_of, run_stage, told, with_found

if TYPE_CHECKING:  # torch takes a second: a mistake in the config is told before it is imported
    from jobs.data.multiview import Found, MultiView
    from jobs.world import World


def main() -> None:
    run_stage("phase3", "Train GS-LRM on posed views.", Phase3Run, _train)


def _train(config: Phase3Run, given: argparse.Namespace, world: World, stop: StopFlag) -> None:
    """Check everything, then make the run directory, then train: a bad input leaves nothing behind."""
    from jobs.gslrm_stage import GSLRMStage, check_renderer
    from jobs.heldout import Heldout
    from jobs.metrics import Metrics
    from jobs.trainer import Trainer

    config = _with_found_paths(config)
    data = _data(config, world)
    world.one_first(lambda: check_renderer(config, world.device))
    training = config.training
    heldout = Heldout(data.val, data.train, training.input_views, training.dataset.background, world,
                      bf16=training.precision == "bf16" and world.device.type == "cuda")
    metrics = Metrics(config.training.max_steps)
    stage = world.all_or_none(
        lambda: GSLRMStage(config, data.train, heldout, metrics, world, data.identity, data.provenance))
    job = open_job("phase3", config, given, world)
    world.on_main(lambda: metrics.open(job.attempt.metrics, open_wandb(config.wandb, config, job)))
    own = job.attempt.path
    for note in [*data.notes, stage.prepare(world, own / "about", own / "validation")]:
        metrics.say(note)
    try:
        Trainer(stage, plan_of(config), world, job, metrics, stop).run()
    finally:
        metrics.close()


def _with_found_paths(config: Phase3Run) -> Phase3Run:
    import msgspec

    training = config.training
    training = msgspec.structs.replace(
        training, dataset=with_found(training.dataset, "path"), validation=with_found(training.validation, "path"),
        losses=with_found(training.losses, "lpips_weights", "lpips_heads", "perceptual_weights"))
    return with_found(msgspec.structs.replace(config, training=training), "init_from")


@dataclass(frozen=True)
class Data:
    """Checked samples, what a resume must share, where they came from, and what to tell about them."""

    train: MultiView
    val: MultiView
    identity: dict[str, str]
    provenance: dict[str, str]
    notes: list[str]


def _data(config: Phase3Run, world: World) -> Data:
    """Find and check all samples. Raises AgreedError."""
    from jobs.data.multiview import MultiView, ViewChoice, find_samples
    from jobs.data.rigs import rig_identity
    from jobs.data.samples import data_fingerprint

    training, size = config.training, config.model.image_size
    choice = ViewChoice(training.input_views, training.targets, training.maximize_view_overlap)
    on_bad = training.dataset.on_bad
    found = find_samples(Path(training.dataset.path), on_bad, world).at_most(training.dataset.max_samples)
    views = len(found.samples[0].frames)
    found_val = find_samples(Path(training.validation.path), on_bad, world, views)
    found_val = replace(found_val, samples=found_val.samples[:training.validation.max_samples])
    world.all_or_none(lambda: choice.check(views))
    world.all_or_none(lambda: _check_validation(views, found_val))
    identity = world.all_or_none(lambda: rig_identity(found.samples, found_val.samples))
    background = training.dataset.background
    train, val = (MultiView(part.samples, size, background, choice, training.seed, world.size)
                  for part in (found, found_val))
    provenance = {"training data": data_fingerprint(found.samples),
                  "validation data": data_fingerprint(found_val.samples)}
    notes = [*told("training", training.dataset.path, found),
             *told("validation", training.validation.path, found_val), f"rig: {identity['rig in words']}"]
    return Data(train, val, identity, provenance, notes)


def _check_validation(views: int, found: Found) -> None:
    if views < 2:
        raise JobError("the samples have one view each: there is no view to hold out",
                       "training and validation need samples of several views")
    if not found.samples:
        raise JobError("no validation sample is left", "raise training.validation.max_samples")


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
