"""Is a run what it is taken for? Asked before its ranks start, in the environment and the code that they will have.

    python -m jobs.preflight SCHEMA CONFIG [--gpus N] [--ranks N] [--resume CHECKPOINT] [--imports] [--json]

Looks at the packages, at the first, the last and a few other samples, at what the config leads to and at the checkpoint
to go on from. `--imports` loads torch and the stage itself, and then reads the samples as training does; without it
nothing heavy is loaded and pictures are only decoded. Exit code 0: no error; 1: at least one.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.load import read_run
from configs.schema import SCHEMAS
from jobs.preflight_data import LATER, Defect, look_at_clips, look_at_pairs, look_at_people, look_at_samples
from jobs.preflight_env import Found, cuda, load, missing_packages, torchvision
from jobs.runtime import JobError
from jobs.start import find_list, find_path

_ALWAYS = ("torch", "numpy", "PIL", "psutil", "safetensors")
_DIFFUSION = ("transformers", "diffusers")
_SOUND = ("soundfile", "soxr")
# schema -> packages it cannot do without, and the modules that its ranks load
_NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "phase1": (_DIFFUSION, ("jobs.mv_stage", "jobs.mv_components", "jobs.trainer")),
    "phase2": (_DIFFUSION, ("jobs.synthesis", "jobs.mv_generator")),
    "phase3": ((), ("jobs.gslrm_stage", "jobs.heldout", "jobs.trainer")),
    "reconstruct": (_DIFFUSION, ("jobs.mv_generator", "jobs.reconstructor")),
    "face-voice": (_SOUND, ("jobs.face_voice_stage", "jobs.towers", "jobs.trainer")),
    "face-voice-eval": (_SOUND, ("jobs.towers", "jobs.protocols")),
    **{name: ((*_DIFFUSION, *_SOUND), ("jobs.clap_stage", "jobs.clap_components", "jobs.trainer"))
       for name in ("clap1", "clap2", "clap3", "clap-evaluate", "clap-generate")},
}


@dataclass
class Report:
    found: list[Found] = field(default_factory=list)
    imports: dict[str, float] = field(default_factory=dict)  # s of each module
    seconds: float = 0.0  # of everything else
    least_gpu_mb: float = 0.0  # of one GPU; 0: nobody can say
    counted: str = ""  # what that is made of
    checkpoint_bytes: float = 0.0  # of one


def main() -> int:
    given = _arguments()
    report = look(given.schema, given.config, given.gpus, given.ranks, given.resume, given.imports)
    print(json.dumps(asdict(report)) if given.json else _text(report))
    return int(any(one.severity == "error" for one in report.found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.preflight", description="Look at a run before it is started.")
    parser.add_argument("schema", choices=sorted(SCHEMAS), help="which stage's run file it is")
    parser.add_argument("config", type=Path, help="a run file")
    parser.add_argument("--gpus", type=int, default=0, help="that it will have on this node")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="the checkpoint it will go on from")
    parser.add_argument("--imports", action="store_true", help="load torch and the stage, and say how long it took")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def look(schema: str, config: Path, gpus: int = 0, ranks: int = 1, resume: Path | None = None,
         imports: bool = False) -> Report:
    """Everything. What cannot be read is a finding."""
    report, began = Report(), time.monotonic()
    try:
        run = read_run(config, SCHEMAS[schema])
    except ConfigError as error:
        report.found.append(Found("config", "error", error.what, str(config), "the job could not read it",
                                  error.hint or "correct it"))
        return report
    packages, modules = _NEEDS.get(schema, ((), ()))
    report.found += missing_packages((*_ALWAYS, *packages))
    report.found += torchvision(imports)
    if imports and not report.found:
        report.found += load(("torch", "torch._dynamo", *packages, *modules, *_of_towers(run)), report.imports)
    report.found += cuda(gpus, imports and not report.found) if gpus else []
    loaded = imports and not report.found
    report.found += [*updates(run, ranks), *_data(run, loaded), *past_the_end(run, resume), *_writable(run)]
    if loaded and schema == "face-voice" and not any(one.check == "samples" for one in report.found):
        report.found += _filled(run)
    if loaded and (resume is None or (resume / "state.json").is_file()):  # else that is told, and all there is to say
        _look_at_weights(report, schema, run, resume)
    report.seconds = round(time.monotonic() - began - sum(report.imports.values()), 3)
    return report


def _of_towers(run: Any) -> list[str]:
    """transformers loads a network's module when it is asked for."""
    kinds = {_value(run, f"model.{side}.kind") for side in ("face", "voice")} - {None, "tiny"}
    return [f"transformers.models.{kind}.modeling_{kind}" for kind in sorted(kinds)]


def _text(report: Report) -> str:
    lines = [f"{one.severity}: {one.check}: {one.where}: {one.what}\n  {one.why}\n  {one.fix}" for one in report.found]
    lines += [f"import {name}: {seconds:.1f} s" for name, seconds in report.imports.items()]
    return "\n".join([*lines, f"{len(report.found)} findings; {report.seconds:.2f} s beside the imports"])


# --- the config ---------------------------------------------------------------------------------------------

def updates(run: Any, ranks: int) -> Iterator[Found]:
    """Whether there will be updates, and whether the learning rate gets where the config says."""
    training = getattr(run, "training", None)
    total = getattr(training, "max_steps", None)
    if total is None:
        return
    count = math.ceil(total / getattr(training, "accumulation", 1))
    warmup = getattr(getattr(training, "schedule", None), "warmup", 0)
    if training.optimizer.lr <= 0 or count < 1:
        yield Found("updates", "error", f"{count} updates with learning rate {training.optimizer.lr:g}", "training",
                    "nothing would be learned", "--set training.optimizer.lr=1e-4")
    elif warmup >= count:
        yield Found("updates", "warning", f"the warm-up takes {warmup} updates and the run has {count}",
                    "training.schedule.warmup", "the learning rate never gets to its value",
                    f"--set training.schedule.warmup={max(1, count // 20)}")
    batch = getattr(training, "batch", None)
    if batch is not None and batch % ranks:
        yield Found("updates", "error", f"a batch of {batch} cannot be divided over {ranks} ranks", "training.batch",
                    "each rank takes an equal part", f"--set training.batch={batch // ranks * ranks or ranks}")


def _filled(run: Any) -> Iterator[Found]:
    """Whether there are as many pairs of face and voice as a batch takes."""
    try:
        look_at_pairs(run.data, run.training.batch)
    except JobError as error:
        yield Found("updates", "error", error.what, "data", "the job would end before its first step",
                    error.hint or "bring more people")


def past_the_end(run: Any, resume: Path | None) -> Iterator[Found]:
    """Of a checkpoint that a person named; a run's own at its last step may still lack the evaluation."""
    total = getattr(getattr(run, "training", None), "max_steps", None)
    if resume is None or total is None:
        return
    try:
        step = json.loads((resume / "state.json").read_bytes())["progress"]["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Found("resume", "error", f"its state cannot be read: {error}", str(resume),
                    "there is nothing to go on from", "--resume never, or another checkpoint")
        return
    if step > total:
        yield Found("resume", "error", f"the checkpoint is at step {step} and the run ends at step {total}",
                    str(resume), "it would end at once and look like a success",
                    f"--set training.max_steps={step + total}")


def _look_at_weights(report: Report, schema: str, run: Any, resume: Path | None) -> None:
    from jobs import preflight_model  # loads torch

    looked = preflight_model.look(schema, run, resume)
    report.found += looked.found
    if looked.networks is not None:
        report.least_gpu_mb, report.checkpoint_bytes, report.counted = preflight_model.needs(looked.networks)


def _writable(run: Any) -> Iterator[Found]:
    """Folders outside of the run's own that it writes to."""
    for key in ("features.directory", "hub_cache"):
        if not (folder := _value(run, key)):
            continue
        there = next(one for one in (Path(folder).absolute(), *Path(folder).absolute().parents) if one.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            yield Found("inputs", "error", f"{there} cannot be written to", key, "the job keeps files there",
                        f"chmod u+wx {there}, or --set {key}=null: in the run's own folder")


# --- the data -----------------------------------------------------------------------------------------------

def _data(run: Any, loaded: bool) -> Iterator[Found]:
    skips = _value(run, "training.dataset.on_bad", "sources.on_bad", "data.on_bad") == "skip"
    for key, value in _lists(run):
        path = Path(find_list(value, "data_train.txt"))
        yield from _told(key, skips, lambda path=path: look_at_samples(path, loaded))
    root = getattr(run, "data", None)
    if isinstance(root, str) and LATER not in root and not root.startswith(("random:", "hub:")):
        yield from _told("data", skips, lambda: look_at_clips(Path(str(find_path(root)))))
    elif loaded and any(getattr(root, key, None) for key in ("pairs", "voxceleb", "faces")):
        yield from _told("data", skips, lambda: look_at_people(root))


def _lists(run: Any) -> Iterator[tuple[str, str]]:
    for key in ("training.dataset.path", "training.validation.path", "sources.path"):
        if (value := _value(run, key)) and LATER not in value:
            yield key, value


def _value(run: Any, *keys: str) -> Any:
    """Of the first key that the config has."""
    for key in keys:
        found = run
        for name in key.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None


def _told(key: str, skips: bool, look_at: Callable[[], list[Defect]]) -> Iterator[Found]:
    try:
        defects = look_at()
    except JobError as error:
        defects, skips = [Defect(error.what, error.hint or "correct it")], False
    for defect in defects:
        yield Found("samples", "warning" if skips else "error", defect.what, key,
                    "it is left out" if skips else "training stops at a bad sample", defect.fix)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # it says itself what is wrong
    code = main()
    sys.stdout.flush()
    os._exit(code)  # to take torch apart again costs as much as all that was looked at
