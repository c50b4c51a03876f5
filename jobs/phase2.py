"""Phase 2: real samples through the generator of phase 1 to a synthetic data set for phase 3.

    torchrun --nproc_per_node=2 -m jobs.phase2 CONFIG [--run-dir DIR]

Started again in the same run directory it goes on where it was, whatever ended it.
"""
from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.phase2 import Phase2Run
from jobs.runtime import Job, JobError, StopFlag, run_job
from jobs.start import find_list, open_job, run_stage, told, with_found

if TYPE_CHECKING:  # torch takes a second: a mistake in the config is told before it is imported
    from jobs.data.samples import Sample
    from jobs.mv_generator import ViewGenerator
    from jobs.synthesis import Work
    from jobs.synthetic import Item
    from jobs.world import World

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def main() -> None:
    run_stage("phase2", "Make a synthetic six-view data set with the generator of phase 1.", Phase2Run, _generate)


def _generate(config: Phase2Run, given: argparse.Namespace, world: World, stop: StopFlag) -> None:
    """Check everything, then make the run directory, then work: a bad input leaves nothing behind."""
    from jobs.metrics import Metrics
    from jobs.mv_generator import load_generator
    from jobs.synthesis import Synthesis

    config = _with_found_paths(config)
    work = _work(config, world)
    generator = load_generator(config.generator, world)
    metrics = Metrics(len(work.items))
    job = open_job("phase2", config, given, world)
    world.on_main(lambda: _check_resume(job))
    world.on_main(lambda: metrics.open(job.attempt.metrics))
    for note in [*work.notes, *_about(config, generator)]:
        metrics.say(note)
    try:
        Synthesis(config, work, generator, _recipe(config, work, generator), world, job, metrics, stop).run()
    finally:
        metrics.close()


def _with_found_paths(config: Phase2Run) -> Phase2Run:
    import msgspec

    generator = with_found(config.generator, "checkpoint", "rig_of", "prompt_embeds")
    sources = msgspec.structs.replace(config.sources, path=find_list(config.sources.path, "data_train.txt"))
    return msgspec.structs.replace(config, generator=generator, sources=sources)


def _check_resume(job: Job) -> None:
    """Raises JobError for the checkpoint of another job: the samples are not in it."""
    if job.resume is not None and job.resume.parent.resolve() != job.checkpoints.resolve():
        raise JobError(f"{job.resume} is of another run: phase 2 goes on from the samples in its own artifacts",
                       "`launch restart` that job; a new one begins anew")


def _work(config: Phase2Run, world: World) -> Work:
    """Find and check the real samples, and name what is to be made of them. Raises AgreedError."""
    from jobs.data.multiview import find_samples
    from jobs.data.rigs import rig_of
    from jobs.synthesis import Work
    from models import rigs

    sources = config.sources
    found = find_samples(Path(sources.path), sources.on_bad, world)
    items = world.all_or_none(lambda: _items(config, found.samples))
    notes = [*told("real", sources.path, found),
             f"their rig: {rigs.describe(rig_of(found.samples[0]))}; it is not copied"]
    return Work(items, found.samples, _fingerprint(items, found.samples),
                [f"{bad.sample}: {bad.file}: {bad.defect}" for bad in found.skipped], notes)


def _items(config: Phase2Run, samples: list[Sample]) -> list[Item]:
    """In the order of the list; a seed is a function of (sample, view). Raises JobError."""
    from jobs.data.lists import Entry, source_of
    from jobs.data.samples import read_list
    from jobs.synthetic import Item
    from jobs.world import mixed_seed

    sources, views = config.sources, len(samples[0].frames)
    if sources.view != "all" and sources.view >= views:
        raise JobError(f"sources.view = {sources.view}: the samples have {views} views, 0 to {views - 1}",
                       "name one of them, or all")
    folders = dict(read_list(Path(sources.path))[0])
    items = []
    for index, sample in enumerate(samples):
        entry = Entry(sample.name, folders[sample.name])
        folder = Path(entry.directory or sample.name).resolve().name
        for view in range(views) if sources.view == "all" else (sources.view,):
            name = f"{_UNSAFE.sub('_', folder)}-v{view:02d}"
            items.append(Item(name, folder, source_of(entry, sources.frame), index, view,
                              mixed_seed("phase2", config.generator.seed, folder, view)))
    _check_names(items, Path(sources.path))
    if sources.limit is not None and sources.limit < len(items):
        items = [items[index * len(items) // sources.limit] for index in range(sources.limit)]
    if len({item.frame for item in items}) < 2:
        raise JobError(f"all samples come from one source frame ({items[0].frame}): no frame could be held out",
                       "two lists, to train and to validate on, need two frames; is sources.frame right?")
    return items


def _check_names(items: list[Item], listing: Path) -> None:
    twice = [name for name, count in Counter(item.name for item in items).items() if count > 1]
    if twice:
        raise JobError(f"{listing}: {len(twice)} samples would be made twice, the first is {twice[0]}: a sample stands "
                       "there twice, or two folders have one name", "remove the repeated lines, or rename one folder")


def _fingerprint(items: list[Item], samples: list[Sample]) -> str:
    """Of what is made from what, wherever it lies."""
    import hashlib

    lines = [f"{item.name}\n{item.frame}\n{item.view}\n{item.seed}\n{samples[item.sample].digest}\n" for item in items]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _recipe(config: Phase2Run, work: Work, generator: ViewGenerator) -> dict[str, Any]:
    """Everything that a sample is a function of, besides its own name."""
    import msgspec

    from jobs.mv_generator import prompts_digest

    how = config.generator
    return {"made_by": "jobs.phase2", "version": 1, "checkpoint": generator.fingerprint, "weights": how.weights,
            "rig": generator.rig.fingerprint, "prompts": prompts_digest(generator.prompts), "size": generator.size,
            "background": list(generator.background), "steps": how.steps, "guidance": how.guidance, "eta": how.eta,
            "seed": how.seed, "precision": how.precision, "sources": work.fingerprint,
            "device": generator.pipeline.device.type, "val_share": config.val_share,
            "matte": msgspec.to_builtins(config.matte), "quality": msgspec.to_builtins(config.quality)}


def _about(config: Phase2Run, generator: ViewGenerator) -> list[str]:
    from models import rigs

    how = config.generator
    return [f"generator: {how.checkpoint} ({generator.fingerprint[:12]}), weights {how.weights}, {how.steps} steps, "
            f"guidance {how.guidance:g}, eta {how.eta:g}",
            f"rig: {rigs.describe(generator.rig)}"]


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
