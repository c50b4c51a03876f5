"""Face-voice matching: which face belongs to which voice.

    torchrun --nproc_per_node=2 -m jobs.face_voice CONFIG [--run-dir DIR] [--resume CHECKPOINT] [--allow-overlap]

    artifacts/evaluation.txt, .json               every protocol on people never met, beside its chance and interval
    artifacts/roc.png n_way.png similarities.png
"""
from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.face_voice import Data, FaceVoiceRun, Procedural, Source
from jobs.runtime import Job, JobError, StopFlag, run_job
from jobs.start import find_path, open_job, open_wandb, run_stage, with_found

if TYPE_CHECKING:  # torch takes a second: a mistake in the config is told before it is imported
    from collections.abc import Callable

    from jobs.data.pairs import Parts, People
    from jobs.face_voice_stage import Matcher, Setting
    from jobs.features import Kept
    from jobs.metrics import Metrics
    from jobs.schedule import Plan
    from jobs.towers import Built
    from jobs.world import World

PROCEDURAL = "identities"  # in the run directory
ALLOW_OVERLAP = "take a validation or test set with identities that are trained on"


def main() -> None:
    run_stage("face_voice", "Match faces and voices.", FaceVoiceRun, _train, allow_overlap=ALLOW_OVERLAP)


def _train(config: FaceVoiceRun, given: argparse.Namespace, world: World, stop: StopFlag) -> None:
    """Check everything, then make the run directory, then train: a bad input leaves nothing behind."""
    from jobs.face_voice_stage import FaceVoiceStage
    from jobs.metrics import Metrics
    from jobs.trainer import Trainer

    config = _with_found_paths(config, given)
    world.all_or_none(lambda: _check_batch(config, world))
    parts = None if config.data.procedural else _parts(config, config.data, world)
    built = _towers(config, world)
    metrics = Metrics(config.training.max_steps)
    job = open_job("face-voice", config, given, world)
    world.on_main(lambda: metrics.open(job.attempt.metrics, open_wandb(config.wandb, config, job)))
    try:
        if parts is None:
            parts = _parts(config, made_here(config.data, job, world), world)
        for note in [*_told(config, parts, world), *_told_of_towers(config, built)]:
            metrics.say(note)
        found = _setting(config, parts, built, job, metrics, world, stop)
        if found is None:
            metrics.write(0, "stopped")
            metrics.say("stopped as asked; the features that were made are kept")
            return
        stage = FaceVoiceStage(config, *found, metrics, world, job.attempt.path / "about")
        Trainer(stage, plan_of(config, world), world, job, metrics, stop).run()
    finally:
        metrics.close()


def _with_found_paths(config: FaceVoiceRun, given: argparse.Namespace) -> FaceVoiceRun:
    import msgspec

    model, data = config.model, with_found_source(config.data)
    model = msgspec.structs.replace(model, face=with_found(model.face, "path"), voice=with_found(model.voice, "path"))
    data = msgspec.structs.replace(
        data, allow_overlap=data.allow_overlap or given.allow_overlap,
        **{key: with_found_source(getattr(data, key)) for key in ("val", "test") if getattr(data, key)})
    return msgspec.structs.replace(config, model=model, data=data)


def with_found_source(source: Any) -> Any:
    """Absolute, so that the checkpoint can say where its data were."""
    import msgspec

    keys = ("faces", "voices", "pairs", "voxceleb", "genders")
    given = {key: os.path.abspath(str(find_path(getattr(source, key)))) for key in keys if getattr(source, key)}
    return msgspec.structs.replace(source, **given)


def _check_batch(config: FaceVoiceRun, world: World) -> None:
    batch = config.training.batch
    if batch % world.size:
        raise JobError(f"training.batch: {batch} pairs cannot be divided over {world.size} ranks",
                       "name a multiple of the ranks; the batch is never changed by itself")


def made_here(data: Data, job: Job, world: World) -> Data:
    """The procedural identities as data in the run directory."""
    import msgspec

    from jobs.data.identities import GENDERS, make

    how, out = data.procedural or Procedural(), job.run.path / PROCEDURAL
    world.on_main(lambda: make(out, how.identities, how.media, how.size, how.rate, how.seed))
    return msgspec.structs.replace(data, procedural=None, voxceleb=str(out), genders=str(out / GENDERS))


def _parts(config: FaceVoiceRun, data: Data, world: World) -> Parts:
    """Everybody, checked and divided. Raises AgreedError."""
    from jobs.data.pairs import Parts, People, check_disjoint, check_enough, find_people, split
    from jobs.data.seen_heard import checked

    clip = eval_clip(config)

    def people_of(source: Source) -> People:
        return checked(world.on_main(lambda: find_people(source)), clip, data.on_bad, world)

    everyone = people_of(data)
    if data.val is None or data.test is None:
        parts = world.all_or_none(lambda: split(everyone, data.split))
    else:
        val, test = people_of(data.val), people_of(data.test)
        notes = []
        for what, people in (("data.val", val), ("data.test", test)):
            world.all_or_none(lambda people=people, what=what: check_enough(people, what))
            notes.append(world.all_or_none(lambda people=people, what=what: check_disjoint(
                everyone.names, people, what, data.allow_overlap)))
        parts = Parts(People(everyone.persons, (*everyone.notes, *filter(None, notes))), val, test, People(()))
    world.all_or_none(lambda: check_filled(config.training.batch, parts.train))
    return parts


def check_filled(batch: int, train: People) -> None:
    """Raises JobError: a batch would hold a pair twice."""
    samples = sum(person.samples for person in train.persons)
    if samples < batch:
        raise JobError(f"training.batch: {batch} pairs, but there are only {samples} to train on: every batch would "
                       "hold some of them twice",
                       f"--set training.batch={1 << samples.bit_length() - 1}; it is never changed by itself")


def eval_clip(config: FaceVoiceRun) -> Any:
    from jobs.data.seen_heard import Clip

    return Clip(config.training.clips.eval_s, config.training.clips.min_s)


def _towers(config: FaceVoiceRun, world: World) -> tuple[Built, Built]:
    from jobs.towers import build_face, build_voice, freeze

    model, seed = config.model, config.training.seed
    built = world.all_or_none(lambda: (build_face(model.face, seed), build_voice(model.voice, seed)))
    for which, one in zip(("model.face", "model.voice"), built):
        world.all_or_none(lambda one=one, which=which: freeze(one, model, which))
        one.tower.to(world.device)
    return built


def _told(config: FaceVoiceRun, parts: Parts, world: World) -> list[str]:
    batch = config.training.batch
    sizes = [(name, people) for name, people in (("train", parts.train), ("validation", parts.val),
                                                 ("test", parts.test), ("seen-heard", parts.seen))]
    return [*parts.train.notes, *parts.val.notes, *parts.test.notes,
            "identities: " + ", ".join(f"{name} {len(people.persons)}" for name, people in sizes),
            f"batch: {batch} pairs, {batch // world.size} on each of {world.size} ranks; "
            f"guessing has the loss ln({batch}) = {math.log(batch):.4f}"]


def _told_of_towers(config: FaceVoiceRun, built: tuple[Built, Built]) -> list[str]:
    notes = [f"{which}: {one.about['kind']}, {one.form}, freeze: {config.model.freeze}"
             for which, one in zip(("face", "voice"), built)]
    if config.model.freeze != "none" and not all(one.pretrained for one in built):
        notes.append("note: a tower is random and frozen: it has learned nothing and will not")
    return notes


def _setting(config: FaceVoiceRun, parts: Parts, built: tuple[Built, Built], job: Job, metrics: Metrics, world: World,
             stop: StopFlag) -> tuple[Matcher, Setting] | None:
    """None when asked to stop while features were made."""
    import msgspec
    import torch

    from jobs.data.seen_heard import Clip, Faces, Pairs, Voices
    from jobs.face_voice_stage import Matcher, Setting, write_about
    from jobs.towers import digest_of
    from jobs.world import mixed_seed
    from models.face_voice import FaceVoice

    model, training = config.model, config.training
    face, voice = built
    torch.manual_seed(mixed_seed("heads", training.seed))
    heads = FaceVoice(face.tower.width, voice.tower.width, model.width, model.dropout, model.first_scale)
    still = Faces(face.form), Voices(voice.form, eval_clip(config))  # the same each time
    matcher = Matcher(face, voice, heads.to(world.device), *still, world.device, training.precision == "bf16")
    digests: dict[str, str] = {}
    if model.freeze == "all":
        digests = {"face tower": digest_of(face.tower), "voice tower": digest_of(voice.tower)}
        kept = keep(config, matcher, [parts.train, parts.val, parts.test, parts.seen], job, metrics, world,
                    lambda: stop.asked)
        if kept is None:
            return None
        matcher = matcher.media(*kept)
        source = Pairs(parts.train, *kept, training.seed)
    else:
        drawn = Voices(voice.form, Clip(training.clips.train_s, training.clips.min_s))
        source = Pairs(parts.train, Faces(face.form, training.flip), drawn, training.seed)
    if world.is_main:
        write_about(config, matcher, parts.train, msgspec.to_builtins(config.data), digests,
                    job.attempt.path / "about")
    return matcher, Setting(parts, source, matcher, digests,
                            world.on_main(lambda: _provenance(parts)) | {"batch": str(training.batch)})


def _provenance(parts: Parts) -> dict[str, str]:
    return {f"{name} data": people.fingerprint() for name, people in
            (("training", parts.train), ("validation", parts.val), ("test", parts.test))}


def keep(config: Any, matcher: Matcher, everyone: list[People], job: Job, metrics: Metrics, world: World,
         stop_asked: Callable[[], bool]) -> tuple[Kept, Kept] | None:
    """The features of all faces and of all voices; None when asked to stop meanwhile."""
    from jobs.features import kept_features
    from jobs.towers import digest_of

    directory = Path(config.features.directory or job.run.path / "features")
    found = []
    for built, medium, side in ((matcher.face, matcher.faces, "faces"), (matcher.voice, matcher.voices, "voices")):
        paths = [path for people in everyone for person in people.persons for path in getattr(person, side)]
        tower = f"{digest_of(built.tower)} {medium} {'bf16' if matcher.bf16 else 'fp32'}"
        kept = kept_features(paths, lambda some, side=side: matcher.encode(some, side == "faces"), tower, directory,
                             config.features.batch, world, stop_asked, metrics.say)
        if kept is None:
            return None
        found.append(kept)
    return found[0], found[1]


def plan_of(config: FaceVoiceRun, world: World) -> Plan:
    """What the trainer does."""
    from jobs.schedule import Plan

    training, optimizer, schedule = config.training, config.training.optimizer, config.training.schedule
    return Plan(
        total=training.max_steps, accumulation=training.accumulation, batch_per_rank=training.batch // world.size,
        seed=training.seed, precision=training.precision, lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2),
        weight_decay=optimizer.weight_decay, warmup=schedule.warmup, grad_clip=optimizer.grad_clip,
        allowed_gradnorm_factor=optimizer.allowed_gradnorm_factor,
        max_consecutive_skips=training.max_consecutive_skips, max_skip_ratio=training.max_skip_ratio,
        checkpoint_every=config.checkpoint.every_steps, keep_last=config.checkpoint.keep_last,
        evaluate_every=training.validation.every_steps, log_every=training.log_every_steps,
        loader_workers=training.loader_workers, lr_decay=schedule.decay, patience=schedule.stop_patience,
        plateau_patience=schedule.plateau_patience, plateau_factor=schedule.plateau_factor)


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
