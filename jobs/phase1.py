"""Phase 1, MVDiffusion: one picture of an object to its six views.

    torchrun --nproc_per_node=2 -m jobs.phase1 CONFIG [--run-dir DIR] [--resume CHECKPOINT]
"""
from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.phase1 import Phase1Run
from jobs.runtime import Job, JobError, StopFlag, job_from_environment, run_job
from jobs.start import open_job, open_wandb, plan_of, run_stage, told, with_found

if TYPE_CHECKING:  # torch takes a second: a mistake in the config is told before it is imported
    from jobs.data.multiview import MultiView
    from jobs.metrics import Metrics
    from jobs.mv_components import Components
    from jobs.mv_stage import MVStage
    from jobs.world import World
    from models.cameras import Rig

_STAGED = ".components-"  # beside the checkpoints, per attempt


def main() -> None:
    run_stage("phase1", "Train MVDiffusion: one view to all views of a rig.", Phase1Run, _train)


def _train(config: Phase1Run, given: argparse.Namespace, world: World, stop: StopFlag) -> None:
    """Check everything, then make the run directory, then train: a bad input leaves nothing behind."""
    from jobs.metrics import Metrics
    from jobs.mv_components import load_components
    from jobs.trainer import Trainer

    config = _with_found_paths(config)
    data = _data(config, world)
    components = world.all_or_none(lambda: load_components(config, _resumed(given), data.first_rig))
    metrics = Metrics(config.training.max_steps)
    job = open_job("phase1", config, given, world)
    world.on_main(lambda: metrics.open(job.attempt.metrics, open_wandb(config.wandb, config, job)))
    for note in [*data.notes, *_alike(components, data.first_rig)]:
        metrics.say(note)
    try:
        if components.source is None and not _make_vae(config, components, data, world, stop, metrics):
            return
        stage = _stage(config, components, data, world, metrics, job)
        Trainer(stage, plan_of(config, lr_decay=config.training.schedule.decay), world, job, metrics, stop).run()
    finally:
        metrics.close()


def _resumed(given: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from: what is frozen is taken from there too."""
    job = None if given.run_dir else job_from_environment(given.resume)
    return job.resume if job else Path(given.resume).absolute() if given.resume else None


def _with_found_paths(config: Phase1Run) -> Phase1Run:
    import msgspec

    training = config.training
    training = msgspec.structs.replace(
        training, dataset=with_found(training.dataset, "path"),
        validation=with_found(training.validation, "path", "lpips_weights", "lpips_heads"))
    return with_found(msgspec.structs.replace(config, training=training), "pretrained", "prompt_embeds")


@dataclass(frozen=True)
class Data:
    """Checked samples, their rig, what a resume must share, where it came from, what to tell."""

    train: MultiView
    val: MultiView
    first_rig: Rig  # of the first sample
    one_rig: bool  # it is that of all samples
    identity: dict[str, str]
    provenance: dict[str, str]
    notes: list[str]

    @property
    def views(self) -> int:
        return len(self.first_rig.names)


def _data(config: Phase1Run, world: World) -> Data:
    """Find and check all samples. Raises AgreedError."""
    from jobs.data.multiview import MultiView, ViewChoice, find_samples
    from jobs.data.rigs import rig_identity, rig_of, rigs_of
    from jobs.data.samples import data_fingerprint
    from jobs.mv_data import reference_views

    training, size = config.training, config.model.image_size
    found = find_samples(Path(training.dataset.path), training.dataset.on_bad, world)
    found = found.at_most(training.dataset.max_samples)
    views = len(found.samples[0].frames)
    found_val = find_samples(Path(training.validation.path), training.dataset.on_bad, world, views)
    found_val = replace(found_val, samples=found_val.samples[:training.validation.max_samples])
    world.all_or_none(lambda: _check(views, len(found_val.samples), config))
    world.all_or_none(lambda: reference_views(training.reference_view_idx, views))
    identity = world.all_or_none(lambda: rig_identity(found.samples, found_val.samples))
    one = len(rigs_of(found.samples)) == 1
    first = rig_of(found.samples[0])
    notes = [*told("training", training.dataset.path, found), *told("validation", training.validation.path, found_val),
             f"rig: {identity['rig in words']}"]
    if not one:
        notes.append("note: the training samples do not share one rig: checkpoints carry no cameras, and later stages "
                     "must be given them")
    choice = ViewChoice(views, "all", False)
    train, val = (MultiView(part.samples, size, training.dataset.background, choice, training.seed, world.size)
                  for part in (found, found_val))
    provenance = {"training data": data_fingerprint(found.samples),
                  "validation data": data_fingerprint(found_val.samples)}
    return Data(train, val, first.resized(size, size), one, identity, provenance, notes)


def _check(views: int, validation: int, config: Phase1Run) -> None:
    if views < 2:
        raise JobError("the samples have one view each: there is nothing to generate", "samples need several views")
    if validation < 2:
        raise JobError("validation needs two objects: a model is held against itself fed another object's picture",
                       "name two or more samples in training.validation.path, and raise max_samples")
    if config.pretrained.startswith("random:"):
        tiny = config.model.tiny
        shrink = 2 ** (len(tiny.vae.channels) - 1 + len(tiny.unet.channels) - 1)
        if config.model.image_size % shrink:
            raise JobError(f"model.image_size = {config.model.image_size} is no multiple of {shrink}, by which "
                           "the tiny autoencoder and UNet shrink it", f"set it to a multiple of {shrink}")


def _alike(components: Components, rig: Rig) -> list[str]:
    from jobs.data.prompts import alike_pairs

    return [f"note: the prompts of {rig.names[a]} and {rig.names[b]} have cosine {cosine:.3f}: the UNet can hardly "
            "tell these views apart by them" for a, b, cosine in alike_pairs(components.prompts)]


def _make_vae(config: Phase1Run, components: Components, data: Data, world: World, stop: StopFlag,
              metrics: Metrics) -> bool:
    """Train the tiny autoencoder; False when asked to stop meanwhile: there is nothing to save yet."""
    from jobs.mv_vae import train_vae

    metrics.say(f"no pretrained components ({config.pretrained}): a tiny autoencoder is trained first")
    done = train_vae(components.vae.to(world.device), config.model.tiny.vae, data.train, data.val,
                     config.training.seed, world, stop, metrics.say)
    if not done:
        metrics.write(0, "stopped")
        metrics.say("stopped as asked while the autoencoder was trained; a restart begins anew")
        world.barrier()
    return done


def _stage(config: Phase1Run, components: Components, data: Data, world: World, metrics: Metrics,
           job: Job) -> MVStage:
    from jobs.mv_components import write_folder
    from jobs.mv_data import Objects, reference_views
    from jobs.mv_stage import MVStage
    from jobs.mv_validation import FixedViews

    training = config.training
    staged = job.checkpoints / f"{_STAGED}a{job.attempt.number:03d}"

    def stage_folder() -> None:
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        for old in job.checkpoints.glob(f"{_STAGED}*"):
            shutil.rmtree(old, ignore_errors=True)
        write_folder(staged, components, job.checkpoints, _about(config, components, data),
                     data.first_rig if data.one_rig else None)

    world.on_main(stage_folder)
    identity = {**data.identity, "attention": components.unet.attention}
    provenance = {**data.provenance, "frozen components": components.fingerprint,
                  "pretrained": config.pretrained, "snr_weighting": training.snr_weighting}
    train = Objects(data.train, training.reference_view_idx, training.seed)
    stage = MVStage(config, components, train, metrics, world, identity, provenance, staged,
                    job.run.artifacts / "validation")
    reference = reference_views(training.reference_view_idx, data.views)[0]
    stage.prepare_validation(world.all_or_none(lambda: FixedViews(
        stage.sampler, data.val, data.train, training.validation, components.prompts, reference, world)))
    return stage


def _about(config: Phase1Run, components: Components, data: Data) -> dict[str, Any]:
    """mvdiffusion.json of a checkpoint."""
    training = config.training
    return {"version": 1, "attention": components.unet.attention, "num_views": components.unet.num_views,
            "views": data.first_rig.names, "rig": data.identity["rig"], "image_size": config.model.image_size,
            "background": training.dataset.background, "reference_view_idx": training.reference_view_idx,
            "prediction_type": components.frozen["scheduler"].config.prediction_type,
            "snr_weighting": training.snr_weighting, "snr_gamma": training.snr_gamma,
            "frozen_components": components.fingerprint, "pretrained": config.pretrained}


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
