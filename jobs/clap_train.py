"""What the three stages of CLAP2Diffusion share before the first step: data, components, the checkpoint before."""
from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.contract import ENV_RUN_DIR
from configs.clap import Clap1Run, Clap2Run, Clap3Run
from configs.load import read_run
from jobs.runtime import Job, StopFlag, job_from_environment
from jobs.start import arguments, open_job, open_wandb, plan_of, with_found

if TYPE_CHECKING:  # torch takes a second: a mistake in the config is told before it is imported
    from jobs.clap_components import About, Frozen, Loaded
    from jobs.clap_stage import ClapStage
    from jobs.data.clips import Clip, Clips
    from jobs.metrics import Metrics
    from jobs.schedule import Plan
    from jobs.world import World
    from models.clap2diffusion import Recipe

ClapRun = Clap1Run | Clap2Run | Clap3Run
_STAGED = ".components-"  # beside the checkpoints, per attempt


def main(stage: str, schema: type[ClapRun], about: str) -> None:
    force = {} if schema is Clap1Run else {"force": "begin although the stage before has not learned to listen"}
    given = arguments(stage, about, **force)
    config = read_run(given.config, schema)
    set_caches(config.hub_cache, config.base_model, config.clap_model)
    from jobs.world import open_world

    with open_world() as world:
        Start(stage, config, given, world, StopFlag().install()).train()


def data_folder(data: str) -> Path:
    """The folder of a data set; random:SEED is the procedural one, made in the run's cache. Raises JobError."""
    if not data.startswith("random:"):
        return Path(data)
    from jobs.data.sounds import made_at

    return made_at(_cache() / f"sounds-{data.removeprefix('random:')}", int(data.removeprefix("random:")))


def _cache() -> Path:
    return (Path(os.environ.get(ENV_RUN_DIR) or "runs") / "cache").absolute()


def set_caches(hub_cache: str | None, *models: str | None) -> None:
    """Offline, unless a model is named to be downloaded; every cache in a place that is named."""
    from jobs.clap_caches import HUB, use_caches

    use_caches(Path(hub_cache or _cache()).absolute(), not any((model or "").startswith(HUB) for model in models))


@dataclass(frozen=True)
class Data:
    """Checked rows, and where they came from."""

    train: list[Clip]
    val: list[Clip]
    provenance: dict[str, str]


class Start:
    """One run of one stage: `train()` once. Everything is checked before the run directory is made."""

    def __init__(self, stage: str, config: ClapRun, given: argparse.Namespace, world: World, stop: StopFlag) -> None:
        self._stage, self._given, self._world, self._stop = stage, given, world, stop
        keys = ("data", "base_model", "clap_model", "hub_cache", *(() if stage == "clap1" else ("init_from",)))
        self._config = with_found(config, *keys)

    def train(self) -> None:
        from jobs.metrics import Metrics
        from jobs.trainer import Trainer

        config, world = self._config, self._world
        world.on_main(lambda: data_folder(config.data))
        data = world.all_or_none(self._data)
        loaded = world.all_or_none(self._loaded)
        metrics = Metrics(config.training.max_steps)
        job = open_job(self._stage, config, self._given, world)
        world.on_main(lambda: metrics.open(job.attempt.metrics, open_wandb(config.wandb, config, job)))
        metrics.say(f"data: {len(data.train)} pairs to train on, {len(data.val)} to validate on; {config.data}")
        try:
            staged = world.value_from_main(job.checkpoints / f"{_STAGED}a{job.attempt.number:03d}")
            world.on_main(lambda: _empty(job.checkpoints, staged))
            loaded = loaded or self._made(data, staged, metrics)
            if loaded is not None:
                stage = self._as_stage(loaded, data, staged, metrics)
                Trainer(stage, self._plan(), world, job, metrics, self._stop).run()
        finally:
            metrics.close()

    def _plan(self) -> Plan:
        training = self._config.training
        plan = plan_of(self._config, lr_decay=training.schedule.decay)
        return replace(plan, partial_update=True, patience=training.validation.patience)

    def _data(self) -> Data:
        """Raises JobError."""
        from jobs.data.clips import check_files, clips_fingerprint, read_clips, spread

        root = data_folder(self._config.data)
        train, val = read_clips(root, "train"), read_clips(root, "val")
        val = spread(val, self._config.training.validation.max_items)
        check_files([*train, *val])
        return Data(train, val, {"training data": clips_fingerprint(train), "validation data": clips_fingerprint(val)})

    # --- components -------------------------------------------------------------------------------------------------

    def _resumed(self) -> Path | None:
        job: Job | None = None if self._given.run_dir else job_from_environment(self._given.resume)
        if job:
            return job.resume
        return Path(self._given.resume).absolute() if self._given.resume else None

    def _loaded(self) -> Loaded | None:
        """From the checkpoint to resume, the stage before, or folders; None: it has to be made. Raises JobError."""
        from jobs.clap_components import load_checkpoint

        config = self._config
        lora = (config.lora.rank, config.lora.alpha, config.lora.dropout) if isinstance(config, Clap2Run) else None
        if resume := self._resumed():
            made = (config.base_model or "").startswith("random:")
            return load_checkpoint(resume, None if made else config.base_model, config.clap_model, self._say)
        if not isinstance(config, Clap1Run):
            return load_checkpoint(Path(config.init_from), config.base_model, config.clap_model, self._say, lora)
        if config.base_model.startswith("random:"):
            return None
        return self._from_folders(config)

    def _from_folders(self, config: Clap1Run) -> Loaded:
        from jobs.clap_components import folder_of, load_frozen
        from models.clap2diffusion import Recipe

        base, clap = (folder_of(str(model), self._say) for model in (config.base_model, config.clap_model))
        frozen = load_frozen(base, clap)
        recipe = Recipe("", int(frozen.features.sampling_rate), config.seconds, config.model.tokens)
        return self._assembled(config, frozen, recipe)

    def _made(self, data: Data, staged: Path, metrics: Metrics) -> Loaded | None:
        """Tiny components, the base model pre-trained; None when asked to stop meanwhile: there is nothing to save."""
        from jobs import clap_made
        from jobs.clap_components import write_made
        from models.clap2diffusion import AudioProjector, Conditioning, Recipe

        config, world = self._config, self._world
        assert isinstance(config, Clap1Run)
        metrics.say(f"no base model ({config.base_model}): a tiny one is made and trained first")
        frozen = clap_made.make_frozen(config)
        tiny = config.model.tiny
        recipe = Recipe("", tiny.clap.rate, tiny.clap.seconds, config.model.tokens)
        conditioning = Conditioning(recipe, frozen.clap, frozen.features, frozen.text_encoder, frozen.tokenizer,
                                    AudioProjector(tiny.clap.projection, 8, 1, 8))
        clips = self._clips(data.train, conditioning, recipe, config.model.image_size)
        clap_made.centre(conditioning, clips)
        for network in (*frozen.networks.values(), conditioning.projector):
            network.to(world.device)
        if not clap_made.pretrain_base(frozen.unet, conditioning, frozen.scheduler, clips, tiny.base,
                                       config.training.seed, world, self._stop, metrics.say):
            metrics.write(0, "stopped")
            metrics.say("stopped as asked while the base model was trained; a restart begins anew")
            world.barrier()
            return None
        world.on_main(lambda: write_made(staged, frozen))
        return self._assembled(config, frozen, recipe)

    def _assembled(self, config: Clap1Run, frozen: Frozen, recipe: Recipe) -> Loaded:
        """Our parts with fresh weights: a function of the seed."""
        import torch

        from jobs.clap_components import About, assemble, base_fingerprint, fingerprint
        from jobs.world import mixed_seed

        model = config.model
        projector = {"width_in": frozen.clap.config.projection_dim, "hidden": model.hidden, "tokens": model.tokens,
                     "width": frozen.unet.config.cross_attention_dim, "dropout": model.dropout}
        about = About("clap1", model.image_size, config.training.prompt, frozen.base_path, base_fingerprint(frozen),
                      frozen.clap_path, replace(recipe, clap=fingerprint(frozen.clap)), projector, None,
                      dict(frozen.scheduler.config))
        torch.manual_seed(mixed_seed("projector", config.training.seed))
        return assemble(frozen, about, model.gate, None)

    # --- the stage --------------------------------------------------------------------------------------------------

    def _clips(self, clips: list[Clip], conditioning: Any, recipe: Recipe, size: int, anywhere: bool = False) -> Clips:
        from jobs.data.clips import Clips

        return Clips(clips, recipe.rate, recipe.seconds, size, self._config.training.seed, conditioning.mel, anywhere)

    def _as_stage(self, loaded: Loaded, data: Data, staged: Path, metrics: Metrics) -> ClapStage:
        from jobs.clap_components import carry_made
        from jobs.clap_stage import ClapStage
        from jobs.clap_validation import Grid

        config, world, training = self._config, self._world, self._config.training
        about: About = replace(loaded.about, stage=self._stage, prompt=training.prompt)
        loaded = replace(loaded, about=about)
        bf16 = training.precision == "bf16"
        loaded.to(world.device, bf16)

        def stage_folder() -> None:
            staged.mkdir(parents=True, exist_ok=True)
            about.write(staged)
            if loaded.folder is not None:
                carry_made(staged, loaded.folder)

        world.on_main(stage_folder)
        train, val = (self._clips(clips, loaded.conditioning, about.recipe, about.image_size, clips is data.train)
                      for clips in (data.train, data.val))
        grid = world.all_or_none(lambda: Grid(loaded, val, training.validation, bf16, world))
        identity = {"base model": about.base_fingerprint, "audio tower": about.recipe.clap,
                    "conditioning": str(about.recipe.record()), "prompt": about.prompt}
        stage = ClapStage(self._stage, training, loaded, train, grid, world, metrics, identity, data.provenance, staged)
        stage.starts_from(another=self._stage != "clap1" and self._resumed() is None,
                          force=getattr(config, "force", False) or getattr(self._given, "force", False))
        if isinstance(config, Clap3Run):
            stage.ends_within(config.target_gate)
        return stage

    def _say(self, text: str) -> None:
        if self._world.is_main:
            print(text, flush=True)


def _empty(checkpoints: Path, staged: Path) -> None:
    """Remove what attempts before this one had staged."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for old in checkpoints.glob(f"{_STAGED}*"):
        shutil.rmtree(old, ignore_errors=True)
    staged.mkdir()
