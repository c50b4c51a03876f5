"""A picture from a sound, through a checkpoint of CLAP2Diffusion.

    python -m jobs.clap_generate CONFIG [--audio dog.wav] [--prompt "a photo"] [--negative-prompt …] [--steps 50]
                                        [--guidance 7.5] [--audio-strength 1] [--seed 0] [--run-dir DIR]
"""
from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from configs.clap import ClapGenerateRun
from configs.load import read_run
from jobs.clap_train import set_caches
from jobs.runtime import JobError, job_by_hand, job_from_environment, run_job
from jobs.start import with_found

PICTURE, PROVENANCE = "picture.png", "picture.json"
_FLAGS = {"audio": str, "prompt": str, "negative_prompt": str, "steps": int, "guidance": float,
          "audio_strength": float, "seed": int, "checkpoint": str}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.clap_generate", description="A picture from a sound.")
    parser.add_argument("config", type=Path, help="a run file (configs/runs/clap-generate/*.yaml)")
    parser.add_argument("--run-dir", help="where to write; default: runs/clap-generate-by-hand-<time>")
    for name, kind in _FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="instead of what the run file says")
    given = parser.parse_args()
    config = _with_flags(read_run(given.config, ClapGenerateRun), given)
    config = with_found(config, "checkpoint", "audio", "base_model", "clap_model", "hub_cache")
    set_caches(config.hub_cache, config.base_model, config.clap_model)
    _generate(config, given.run_dir)


def _with_flags(config: ClapGenerateRun, given: argparse.Namespace) -> ClapGenerateRun:
    """Raises JobError for a value that the run file could not have either."""
    import msgspec

    flags = {name: getattr(given, name) for name in _FLAGS if getattr(given, name) is not None}
    try:
        return msgspec.convert({**msgspec.to_builtins(config), **flags}, ClapGenerateRun)
    except msgspec.ValidationError as error:
        raise JobError(f"{error}") from None


def _generate(config: ClapGenerateRun, run_dir: str | None) -> None:
    from jobs.clap_pictures import Painter, seeds_of, to_image

    began = time.monotonic()
    painter = Painter(Path(config.checkpoint), config.base_model, config.clap_model, config.precision)
    embedding = painter.hear(Path(config.audio))
    [picture] = painter.paint(embedding, config.prompt, config.negative_prompt, config.steps, config.guidance,
                              config.audio_strength, seeds_of(config.seed, 1))
    job = (None if run_dir else job_from_environment(None)) or job_by_hand("clap-generate", run_dir, None)
    job.run.artifacts.mkdir(parents=True, exist_ok=True)
    to_image(picture).save(job.run.artifacts / PICTURE)
    (job.run.artifacts / PROVENANCE).write_text(json.dumps(_provenance(config, painter.loaded.about), indent=1))
    print(f"{job.run.artifacts / PICTURE} from {config.audio} in {time.monotonic() - began:.1f} s")


def _provenance(config: ClapGenerateRun, about: Any) -> dict[str, Any]:
    import msgspec

    return {**msgspec.to_builtins(config), "audio_sha256": hashlib.sha256(Path(config.audio).read_bytes()).hexdigest(),
            "checkpoint_stage": about.stage, "base_fingerprint": about.base_fingerprint,
            "recipe": about.recipe.record()}


if __name__ == "__main__":
    run_job(main, 0)
