"""The protocols of face-voice matching on a checkpoint.

    python -m jobs.face_voice_eval CONFIG --resume CHECKPOINT [--run-dir DIR] [--allow-overlap]

On the test identities that its training kept apart, or on the data that the run file names: people that were trained on
are refused there, or allowed.
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.face_voice import Clips, Data, FaceVoiceEvalRun, Model
from jobs.face_voice import ALLOW_OVERLAP, keep, made_here, with_found_source
from jobs.runtime import Job, JobError, StopFlag, job_from_environment, run_job
from jobs.start import find_path, open_job, run_stage

if TYPE_CHECKING:
    from jobs.data.pairs import Parts
    from jobs.data.seen_heard import Clip
    from jobs.face_voice_stage import Matcher
    from jobs.metrics import Metrics
    from jobs.towers import Built
    from jobs.world import World

_STEPS = 2  # embeddings, protocols


def main() -> None:
    run_stage("face_voice_eval", "Evaluate face-voice matching.", FaceVoiceEvalRun, _evaluate,
              allow_overlap=ALLOW_OVERLAP)


def _evaluate(config: FaceVoiceEvalRun, given: argparse.Namespace, world: World, stop: StopFlag) -> None:
    from jobs.face_voice_stage import read_about, report
    from jobs.metrics import Metrics

    if world.size > 1:
        raise JobError(f"{world.size} ranks for one evaluation", "start it without torchrun")
    checkpoint = _checkpoint(config, given)
    about = read_about(checkpoint)
    built = _towers(about, world)
    metrics = Metrics(_STEPS)
    job = open_job("face-voice-eval", config, given, world)
    metrics.open(job.attempt.metrics)
    try:
        metrics.say(f"evaluating {checkpoint}")
        clip = _clip(about)
        parts = _parts(config, given, about, job, clip, world, metrics)
        matcher = _matcher(config, about, checkpoint, built, parts, clip, job, metrics, world, stop)
        if matcher is None:
            metrics.write(0, "stopped")
            metrics.say("stopped as asked; a restart begins anew")
            return
        metrics.write(1)
        metrics.say("\n" + report(matcher, parts, config.evaluation, job.run.artifacts))
        metrics.write(_STEPS, "done")
        metrics.say(f"done: artifacts in {job.run.artifacts}")
    finally:
        metrics.close()


def _checkpoint(config: FaceVoiceEvalRun, given: argparse.Namespace) -> Path:
    """Raises JobError."""
    job = job_from_environment(given.resume)
    named = find_path(config.checkpoint) or given.resume or (job.resume if job else None)
    if named is None:
        raise JobError("no checkpoint is named", "--resume JOB, or its folder: --set checkpoint=PATH")
    return Path(named).absolute()


def _clip(about: dict[str, Any]) -> Clip:
    from jobs.data.seen_heard import Clip

    clips = Clips(**about["clips"])
    return Clip(clips.eval_s, clips.min_s)


def _towers(about: dict[str, Any], world: World) -> tuple[Built, Built]:
    """Frozen ones from where the training had them, the same to the last bit. Raises JobError."""
    import msgspec

    from jobs.towers import build_face, build_voice, digest_of, freeze, rebuild

    model = msgspec.convert(about["model"], Model)
    digests = about["frozen towers"]
    if not digests:
        built = rebuild(about["face"]), rebuild(about["voice"])
    else:
        built = build_face(model.face, about["seed"]), build_voice(model.voice, about["seed"])
    for which, one in zip(("face", "voice"), built):
        freeze(one, model, f"model.{which}")
        one.tower.to(world.device).eval()
        if digests and digest_of(one.tower) != digests[f"{which} tower"]:
            raise JobError(f"the {which} tower in {getattr(model, which).path} is not the one that the heads were "
                           "trained on: its weights are others", "bring back the folder of that training")
    return built


def _parts(config: FaceVoiceEvalRun, given: argparse.Namespace, about: dict[str, Any], job: Job, clip: Clip,
           world: World, metrics: Metrics) -> Parts:
    """What is evaluated: `test`, and `seen` of the training's own data."""
    import msgspec

    from jobs.data.pairs import Parts, People, check_disjoint, check_enough, find_people, split
    from jobs.data.seen_heard import checked

    nobody, trained = People(()), set(about["trained"])
    if config.data is not None:
        people = checked(find_people(with_found_source(config.data)), clip, "error", world)
        check_enough(people, "data")
        note = check_disjoint(trained, people, "data", config.allow_overlap or given.allow_overlap)
        metrics.say(note or f"{len(people.persons)} identities, none of them trained on")
        return Parts(nobody, nobody, people, nobody)
    data = msgspec.convert(about["data"], Data)
    data = made_here(data, job, world) if data.procedural else data
    if data.test is not None:
        return Parts(nobody, nobody, checked(find_people(data.test), clip, data.on_bad, world), nobody)
    parts = split(checked(find_people(data), clip, data.on_bad, world), data.split)
    if parts.train.names != trained:
        raise JobError("the data are not those of the training: other identities would be trained on",
                       "bring them back, or name others: --set data.voxceleb=DIR (or data.pairs, data.faces)")
    return parts


def _matcher(config: FaceVoiceEvalRun, about: dict[str, Any], checkpoint: Path, built: tuple[Built, Built],
             parts: Parts, clip: Clip, job: Job, metrics: Metrics, world: World, stop: StopFlag) -> Matcher | None:
    """None when asked to stop while features were made."""
    from jobs.checkpoint import load_module
    from jobs.data.seen_heard import Faces, Voices
    from jobs.face_voice_stage import Matcher
    from models.face_voice import FaceVoice

    face, voice = built
    heads = FaceVoice(face.tower.width, voice.tower.width, about["model"]["width"], about["model"]["dropout"])
    load_module(checkpoint, "heads", heads)
    matcher = Matcher(face, voice, heads.to(world.device).eval(), Faces(face.form), Voices(voice.form, clip),
                      world.device, about["precision"] == "bf16")
    if not about["frozen towers"]:
        for name, one in (("face", face), ("voice", voice)):
            load_module(checkpoint, name, one.tower)
        return matcher
    people = [some.at_most(config.evaluation.media) for some in (parts.test, parts.seen)]
    kept = keep(config, matcher, people, job, metrics, world, lambda: stop.asked)
    return matcher.media(*kept) if kept else None


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
