"""The generator of phases 2 and reconstruct: a named checkpoint, its own weights, rig, prompts and order of views.

Nothing is assumed that the checkpoint can say: what it does not say (public folders) must be given, and what is said
twice must agree.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.contract import MANIFEST, BadCheckpoint, fingerprint, sha256_file, verify_checkpoint
from configs.phase2 import Generator
from jobs.data.options import rig_named
from jobs.data.prompts import check_embeddings, check_rig
from jobs.data.samples import CAMERAS, read_cameras
from jobs.mv_components import ABOUT, PROMPTS
from jobs.mv_data import slots
from jobs.runtime import JobError
from jobs.world import World
from models import rigs
from models.cameras import Rig
from models.mv_unet import UNetError, build_unet, unet_config
from models.mvdiffusion import EMA, UNET, MVDiffusionPipeline, PipelineError
from models.weights import WeightsError, read_tensor

_USED = ("vae", "image_encoder", "image_normalizer", "image_noising_scheduler", "scheduler", "feature_extractor")


class Interrupted(Exception):
    """The sampling was given up because the job was asked to stop; nothing of the batch is kept."""


@dataclass(frozen=True)
class ViewGenerator:
    """One picture to all views of `rig` (whose size is that of the pictures).

    `order` [V]: the view in each slot of the UNet; `prompts` [V, L, D] of the views in that order; `fingerprint`:
    of the checkpoint's content, wherever it lies.
    """

    pipeline: MVDiffusionPipeline
    rig: Rig
    prompts: Tensor
    order: Tensor
    background: tuple[float, float, float]
    fingerprint: str
    config: Generator

    @property
    def size(self) -> int:
        """px of its pictures."""
        return self.rig.width

    @property
    def reference(self) -> int:
        """The view that is put in."""
        return int(self.order[0])

    def views(self, pictures: Tensor, seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """RGB [B, V, 3, S, S] in 0..1, in the order of the rig, of pictures [B, 3, S, S] in 0..1 over `background`.

        An object's random numbers are a function of its own seed. Raises Interrupted (see `stop_when`).
        """
        config, pipeline = self.config, self.pipeline
        embeds, condition = pipeline.encode(pictures)
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            latents = pipeline.sample(embeds, condition, self.prompts, steps or config.steps, config.guidance,
                                      config.eta, seeds)
        decoded = pipeline.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        found = torch.empty_like(decoded)
        found[:, self.order] = decoded  # slot by slot to the rig's order
        return found

    def stop_when(self, asked: Callable[[], bool]) -> None:
        """From now on `views` raises Interrupted within one step of the sampler after `asked()` became true."""
        def look(*_: object) -> None:
            if asked():
                raise Interrupted

        self.pipeline.unet.register_forward_pre_hook(look)

    def untrained(self) -> ViewGenerator:
        """The same with fresh random weights in the UNet: what the training is held against."""
        torch.manual_seed(0)
        own = self.pipeline
        unet = build_unet(unet_config(own.unet)).eval().to(own.device)
        parts = {name: getattr(own, name) for name in _USED}
        return replace(self, pipeline=MVDiffusionPipeline(unet=unet, **parts))


def load_generator(config: Generator, world: World) -> ViewGenerator:
    """On this rank's device. Raises AgreedError that names the file, or both sides of what does not agree."""
    folder = Path(config.checkpoint)
    identity = world.on_main(lambda: _verified(folder, config))
    found = world.all_or_none(lambda: _load(folder, config, identity))
    found.pipeline.to(world.device)
    return replace(found, prompts=found.prompts.to(world.device))


def _verified(folder: Path, config: Generator) -> str:
    """The fingerprint of the checkpoint's content; ours are verified first. Raises JobError."""
    hint = "name one checkpoint of phase 1 (…/checkpoints/step-NNNNNNNN-aNNN), or a public MVDiffusion folder"
    if not folder.is_dir():
        raise JobError(f"generator.checkpoint: there is no folder {folder}", hint)
    wanted = EMA if config.weights == "ema" else UNET
    if not (folder / wanted).is_dir():
        raise JobError(f"generator.checkpoint: {folder} has no {wanted}/: weights = {config.weights} is not in it",
                       hint if config.weights == "unet" else
                       f"{hint}; for a folder without an average set generator.weights: unet")
    if not (folder / MANIFEST).is_file():
        return fingerprint({f"{part}/{file.name}": {"sha256": sha256_file(file)} for part in (*_USED, wanted)
                            for file in sorted((folder / part).glob("*")) if file.is_file()})
    try:
        return fingerprint(verify_checkpoint(folder).files)
    except BadCheckpoint as error:
        raise JobError(f"generator.checkpoint does not verify: {error}", "name another checkpoint") from None


def _load(folder: Path, config: Generator, identity: str) -> ViewGenerator:
    return with_views(load_pipeline(folder, config), folder, config, identity)


def load_pipeline(folder: Path, config: Generator) -> MVDiffusionPipeline:
    """Its networks. Raises JobError."""
    try:
        return MVDiffusionPipeline.from_pretrained(folder, config.weights)
    except (PipelineError, UNetError) as error:
        raise JobError(f"generator.checkpoint: {error}", "name another checkpoint") from None


def with_views(pipeline: MVDiffusionPipeline, folder: Path, config: Generator, identity: str) -> ViewGenerator:
    """The views that the networks in `folder` make, and their prompts. Raises JobError when these do not belong
    together."""
    about = _about(folder)
    rig = _rig(folder, config, about)
    if pipeline.unet.num_views != len(rig.names):
        raise JobError(f"generator: its UNet makes {pipeline.unet.num_views} views, its rig has {len(rig.names)}: "
                       f"{rigs.describe(rig)}", "give the rig it was trained on: generator.rig or generator.rig_of")
    prompts = _prompts(folder, config, pipeline, rig)
    size = int(about.get("image_size") or _size_of(pipeline))
    reference = about.get("reference_view_idx", 0)
    if isinstance(reference, list):
        reference = reference[0]
    order = slots(reference if isinstance(reference, int) else 0, len(rig.names))
    red, green, blue = about.get("background", (1.0, 1.0, 1.0))
    return ViewGenerator(pipeline, rig.resized(size, size), prompts[order], order, (red, green, blue), identity,
                         config)


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise JobError(f"{path} is not JSON: {error}", "name another checkpoint") from None


def _size_of(pipeline: MVDiffusionPipeline) -> int:
    return pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def _rig(folder: Path, config: Generator, about: dict[str, Any]) -> Rig:
    """The rig the checkpoint carries, else the one that is given; when both are there, they agree. Raises JobError."""
    given = rig_named(config.rig_of or config.rig) if config.rig_of or config.rig else None
    own = _carried(folder)
    if own is not None and about.get("rig", own.fingerprint) != own.fingerprint:
        raise JobError(f"{folder / CAMERAS} has the rig {own.fingerprint[:12]}, {folder / ABOUT} says it was trained "
                       f"on {about['rig'][:12]}", "name another checkpoint: this one was edited")
    if own is None and given is None:
        raise JobError(f"generator: {folder} does not say which rig it was trained on (no {CAMERAS})",
                       "give it: generator.rig: mv6 for the public FaceLift weights, or generator.rig_of: a sample of "
                       "its training data")
    if own is not None and given is not None and own.fingerprint != given.fingerprint:
        raise JobError("generator: another rig is asked for than the generator was trained on: "
                       + rigs.mismatch("the checkpoint", own, "generator.rig", given),
                       "leave generator.rig and generator.rig_of out: the checkpoint carries its own")
    found = own or given
    assert found is not None
    return found


def _carried(folder: Path) -> Rig | None:
    if not (folder / CAMERAS).is_file():
        return None
    raw = read_cameras(folder.name, folder)
    try:
        rig = rigs.from_record(raw["rig"])
        size = raw["frames"][0]["w"]
        rows = [[frame[key] for key in ("fx", "fy", "cx", "cy")] for frame in raw["frames"]]
        frames = Rig.from_w2c(rig.names, torch.tensor([frame["w2c"] for frame in raw["frames"]]), torch.tensor(rows),
                              size, size)
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(f"{folder / CAMERAS}: its rig cannot be read: {error}", "name another checkpoint") from None
    if difference := rig.difference(frames):
        raise JobError(f"{folder / CAMERAS}: its cameras are not those of the rig it carries: {difference}",
                       "name another checkpoint: this one was edited")
    return rig


def _prompts(folder: Path, config: Generator, pipeline: MVDiffusionPipeline, rig: Rig) -> Tensor:
    path = Path(config.prompt_embeds or folder / PROMPTS)
    try:
        prompts = read_tensor(path).float()
    except WeightsError as error:
        raise JobError(f"generator.prompt_embeds: {error}", "make them with `python -m jobs.data prompts`") from None
    width = pipeline.unet.config.cross_attention_dim
    check_embeddings(prompts, len(rig.names), width, f"generator.prompt_embeds: {path}")
    check_rig(path, rig)
    return prompts


def prompts_digest(prompts: Tensor) -> str:
    return hashlib.sha256(prompts.cpu().contiguous().numpy().tobytes()).hexdigest()
