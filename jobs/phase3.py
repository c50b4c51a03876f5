"""Phase 3, GS-LRM: six posed views to 3D Gaussians.

    torchrun --nproc_per_node=2 -m jobs.phase3 CONFIG [--run-dir DIR] [--resume CHECKPOINT]
"""
from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.load import read_run
from configs.phase3 import Phase3Run
from jobs.runtime import Job, JobError, StopFlag, job_by_hand, job_from_environment, run_job

if TYPE_CHECKING:  # torch takes a second: a mistake in the config is told before it is imported
    from jobs.data.multiview import Found, MultiView
    from jobs.metrics import Wandb
    from jobs.schedule import Plan
    from jobs.world import World


def main() -> None:
    given = _arguments()
    config = read_run(given.config, Phase3Run)
    from jobs.world import open_world

    with open_world() as world:
        # Not before: a rank that waits for one that failed to join must end by torchrun's SIGTERM.
        _train(config, given, world, StopFlag().install())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.phase3", description="Train GS-LRM on posed views.")
    parser.add_argument("config", type=Path, help="a run file (configs/runs/phase3/*.yaml)")
    parser.add_argument("--run-dir", help="where to write; default: runs/phase3-by-hand-<time>")
    parser.add_argument("--resume", help="a checkpoint directory to go on from")
    return parser.parse_args()


def _train(config: Phase3Run, given: argparse.Namespace, world: World, stop: StopFlag) -> None:
    """Check everything, then make the run directory, then train: a bad input leaves nothing behind."""
    from jobs.gslrm_stage import GSLRMStage, check_renderer
    from jobs.heldout import Heldout
    from jobs.metrics import Metrics
    from jobs.trainer import Trainer

    config = _with_found_paths(config)
    data = _data(config, world)
    world.one_first(lambda: check_renderer(config, world.device))
    heldout = Heldout(data.val, data.train, config.training.input_views, config.training.dataset.background,
                      world)
    metrics = Metrics(config.training.max_steps)
    stage = world.all_or_none(
        lambda: GSLRMStage(config, data.train, heldout, metrics, world, data.identity, data.provenance))
    job = _job(config, given, world)
    world.on_main(lambda: metrics.open(job.attempt.metrics, _wandb(config, job)))
    for note in data.notes:
        metrics.say(note)
    try:
        Trainer(stage, _plan(config), world, job, metrics, stop).run()
    finally:
        metrics.close()


def _job(config: Phase3Run, given: argparse.Namespace, world: World) -> Job:
    """The run directory: the supervisor's, or one made by rank 0 for all."""
    import msgspec

    def by_hand() -> Job:
        job = job_by_hand("phase3", given.run_dir, given.resume)
        for place in (job.run.config, job.attempt.config):
            place.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=1))
        return job

    job = None if given.run_dir else job_from_environment(given.resume)
    return job or world.on_main(by_hand)


def _with_found_paths(config: Phase3Run) -> Phase3Run:
    """Relative paths below the current directory, else below its data/ (launch has made them absolute
    already)."""
    import msgspec

    training, weights = config.training, config.training.losses
    keys = ("lpips_weights", "lpips_heads", "perceptual_weights")
    found = {key: _find(getattr(weights, key)) for key in keys}
    training = msgspec.structs.replace(
        training, dataset=msgspec.structs.replace(training.dataset, path=_find(training.dataset.path)),
        validation=msgspec.structs.replace(training.validation, path=_find(training.validation.path)),
        losses=msgspec.structs.replace(weights, **found))
    return msgspec.structs.replace(config, training=training, init_from=_find(config.init_from))


def _find(path: str | None) -> str | None:
    if path is None or path.startswith("random:") or os.path.exists(path) or os.path.isabs(path):
        return path
    below = os.path.join("data", path)
    return below if os.path.exists(below) else path


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
    from jobs.data.samples import data_fingerprint

    training, size = config.training, config.model.image_size
    choice = ViewChoice(training.input_views, training.targets, training.maximize_view_overlap)
    on_bad = training.dataset.on_bad
    found = find_samples(Path(training.dataset.path), on_bad, world)
    views = len(found.samples[0].frames)
    found_val = find_samples(Path(training.validation.path), on_bad, world, views)
    found_val = replace(found_val, samples=found_val.samples[:training.validation.max_samples])
    world.all_or_none(lambda: choice.check(views))
    world.all_or_none(lambda: _check_validation(views, found_val))
    rig = world.all_or_none(lambda: _common_rig(found, found_val))
    background = training.dataset.background
    train, val = (MultiView(part.samples, size, background, choice, training.seed, world.size)
                  for part in (found, found_val))
    provenance = {"training data": data_fingerprint(found.samples),
                  "validation data": data_fingerprint(found_val.samples)}
    notes = [*_told("training", training.dataset.path, found),
             *_told("validation", training.validation.path, found_val)]
    return Data(train, val, {"rig": rig}, provenance, notes)


def _check_validation(views: int, found: Found) -> None:
    if views < 2:
        raise JobError("the samples have one view each: there is no view to hold out",
                       "training and validation need samples of several views")
    if not found.samples:
        raise JobError("no validation sample is left", "raise training.validation.max_samples")


def _common_rig(train: Found, val: Found) -> str:
    """The fingerprint of the rig, or of all rigs together; validation must use no other ones."""
    from jobs.data.samples import rigs_digest, rigs_of

    rigs, of_val = rigs_of(train.samples), rigs_of(val.samples)
    for fingerprint, rig in of_val.items():
        if fingerprint not in rigs:
            first = next(iter(rigs.values()))
            raise JobError("the validation samples were taken with another rig than the training samples: "
                           f"{first.difference(rig) or 'cameras differ slightly'}",
                           "cameras, view order and views must be the same in both lists")
    return next(iter(rigs)) if len(rigs) == 1 else f"{len(rigs)} rigs {rigs_digest(rigs)}"


def _told(what: str, path: str, found: Found) -> list[str]:
    notes = [f"{what} data: {len(found.samples)} samples of {len(found.samples[0].frames)} views; {path}, "
             f"its lines: {found.paths}"]
    if found.skipped:
        notes.append(f"{what} data: {len(found.skipped)} bad samples left out (on_bad: skip):")
        notes += [f"  {defect.sample}: {defect.file}: {defect.defect}" for defect in found.skipped]
    return notes


def _wandb(config: Phase3Run, job: Job) -> Wandb | None:
    if config.wandb.mode == "off":
        return None
    import msgspec

    from jobs.metrics import Wandb

    return Wandb(config.wandb.mode, config.wandb.project, job.id, job.run.path, msgspec.to_builtins(config))


def _plan(config: Phase3Run) -> Plan:
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
        log_every=training.log_every_steps, loader_workers=training.loader_workers)


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
