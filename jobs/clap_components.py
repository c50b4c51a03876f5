"""The frozen networks of CLAP2Diffusion, from folders or from a checkpoint, and what of a checkpoint does not change.

A checkpoint of a stage holds model.safetensors (projector, audio attention, LoRA) and beside it

    clap2diffusion.json     recipe of the conditioning, base model, audio tower, LoRA, sizes
    base/ clap/             only when they were made on the spot; else the file above says where they are
"""
from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import ClapAudioModelWithProjection, ClapFeatureExtractor, CLIPTextModel, CLIPTokenizer

from jobs.checkpoint import link_tree, load_module, read_state
from jobs.clap_caches import HUB
from jobs.runtime import JobError
from models.audio_attention import INITIAL_GATE, TrainedParts
from models.clap2diffusion import AudioProjector, Codec, Conditioning, Recipe, add_lora, build_trained
from models.mvdiffusion import without_progress_bars
from models.weights import from_folder

ABOUT = "clap2diffusion.json"
BASE, CLAP = "base", "clap"
PROJECTOR, PARTS = "projector", "unet"  # modules of a checkpoint


@dataclass(frozen=True)
class Frozen:
    """What is used and never trained; fp32, eval mode. Where each came from: a path, or None: made here."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | None  # None: the UNet works on pixels
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    clap: ClapAudioModelWithProjection
    features: ClapFeatureExtractor
    base_path: str | None
    clap_path: str | None

    @property
    def networks(self) -> dict[str, nn.Module]:
        found = {"unet": self.unet, "text_encoder": self.text_encoder, "clap": self.clap}
        return found | ({"vae": self.vae} if self.vae is not None else {})


@dataclass(frozen=True)
class About:
    """clap2diffusion.json."""

    stage: str
    image_size: int
    prompt: str  # what stood beside the audio: empty, or text
    base: str | None  # its folder; None: base/ in the checkpoint
    base_fingerprint: str
    clap: str | None
    recipe: Recipe
    projector: dict[str, Any]  # arguments of AudioProjector
    lora: tuple[int, float, float] | None  # rank, alpha, dropout
    scheduler: dict[str, Any]
    version: int = 1

    def write(self, folder: Path) -> None:
        values = {**self.__dict__, "recipe": self.recipe.record()}
        (folder / ABOUT).write_text(json.dumps(values, indent=1))


@dataclass(frozen=True)
class Loaded:
    """A whole model: what is frozen, and what a stage may train."""

    frozen: Frozen
    conditioning: Conditioning
    parts: TrainedParts
    about: About
    folder: Path | None  # the checkpoint it was read from

    @property
    def projector(self) -> AudioProjector:
        return self.conditioning.projector

    @property
    def codec(self) -> Codec:
        return Codec(self.frozen.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one picture."""
        side = self.about.image_size
        if self.frozen.vae is not None:
            side //= 2 ** (len(self.frozen.vae.config.block_out_channels) - 1)
        return self.frozen.unet.config.in_channels, side, side

    def to(self, device: torch.device, coarse: bool) -> None:
        """Move everything; `coarse`: what is frozen in bf16 on a GPU, what may train stays fp32."""
        for name, network in self.frozen.networks.items():
            network.to(device)
            if coarse and device.type == "cuda" and name == "unet":
                ours = dict(self.parts.named_parameters())
                for key, parameter in network.named_parameters():
                    if key not in ours:
                        parameter.data = parameter.data.to(torch.bfloat16)
        self.projector.to(device)


def folder_of(model: str, say: Any) -> Path:
    """The folder of a model; hub:OWNER/NAME is downloaded into the cache, and said. Raises JobError."""
    if not model.startswith(HUB):
        return Path(model)
    from huggingface_hub import snapshot_download

    say(f"downloading {model.removeprefix(HUB)} from the hub into {os.environ['HF_HUB_CACHE']}")
    try:
        return Path(snapshot_download(model.removeprefix(HUB), cache_dir=os.environ["HF_HUB_CACHE"]))
    except (OSError, ValueError) as error:
        raise JobError(f"{model} cannot be downloaded: {error}",
                       "name a folder that holds it: a job may run where there is no network") from None


def load_frozen(base: Path, clap: Path) -> Frozen:
    """From a folder in diffusers' format and one in transformers'. Raises JobError naming the part."""
    tokenizer = read_part(CLIPTokenizer, base / "tokenizer", "base_model")
    return Frozen(
        unet=read_part(UNet2DConditionModel, base / "unet", "base_model", torch_dtype=torch.float32),
        vae=(read_part(AutoencoderKL, base / "vae", "base_model", torch_dtype=torch.float32)
             if (base / "vae").is_dir() else None),
        text_encoder=read_part(CLIPTextModel, base / "text_encoder", "base_model", dtype=torch.float32),
        tokenizer=tokenizer, scheduler=read_part(DDIMScheduler, base / "scheduler", "base_model"),
        clap=read_part(ClapAudioModelWithProjection, clap, "clap_model", dtype=torch.float32),
        features=read_part(ClapFeatureExtractor, clap, "clap_model"), base_path=str(base), clap_path=str(clap))


def read_part(kind: Any, folder: Path, key: str, **given: Any) -> Any:
    """Frozen, where it is a network. Raises JobError that names `key`."""
    try:
        with without_progress_bars():
            found = from_folder(kind, folder, **given)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise JobError(f"{key}: {kind.__name__} cannot be read from {folder}: {error}",
                       "base_model is a diffusers folder (unet, vae, text_encoder, tokenizer, scheduler), clap_model "
                       "a transformers one") from None
    if isinstance(found, nn.Module):
        found.eval().requires_grad_(False)
    return found


def fingerprint(*networks: nn.Module) -> str:
    """sha256 over names and weights."""
    digest = hashlib.sha256()
    for network in networks:
        for key, tensor in network.state_dict().items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_fingerprint(frozen: Frozen) -> str:
    vae = [frozen.vae] if frozen.vae is not None else []
    return fingerprint(frozen.unet, frozen.text_encoder, *vae)


def read_about(checkpoint: Path) -> About:
    """Of a checkpoint, verified. Raises JobError when it is none of CLAP2Diffusion."""
    read_state(checkpoint)
    return about_in(checkpoint)


def about_in(checkpoint: Path) -> About:
    """The same, not verified."""
    try:
        values = json.loads((checkpoint / ABOUT).read_bytes())
        lora = tuple(values["lora"]) if values["lora"] else None
        return About(**{**values, "recipe": Recipe(**values["recipe"]), "lora": lora})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(f"{checkpoint} is no checkpoint of CLAP2Diffusion: {ABOUT}: {error}",
                       "name one of the stages clap1, clap2 or clap3") from None


def assemble(frozen: Frozen, about: About, gate: float, folder: Path | None) -> Loaded:
    """Our parts around frozen networks, with fresh weights. Raises JobError when they cannot be put together."""
    projector = AudioProjector(**about.projector)
    conditioning = Conditioning(about.recipe, frozen.clap, frozen.features, frozen.text_encoder, frozen.tokenizer,
                                projector)
    try:
        parts = build_trained(frozen.unet, gate, about.lora)
    except ValueError as error:
        raise JobError(f"base_model: {error}") from None
    return Loaded(frozen, conditioning, parts, about, folder)


def load_checkpoint(checkpoint: Path, base_model: str | None, clap_model: str | None, say: Any,
                    new_lora: tuple[int, float, float] | None = None) -> Loaded:
    """The model of a checkpoint, with its weights. `new_lora`: add one that does nothing yet, if it has none.

    Raises JobError: not verified, another base model or audio tower, weights that do not fit.
    """
    about = read_about(checkpoint)
    base = folder_of(base_model or about.base or str(checkpoint / BASE), say)
    clap = folder_of(clap_model or about.clap or str(checkpoint / CLAP), say)
    frozen = load_frozen(base, clap)
    for what, there, here in (("base model", about.base_fingerprint, base_fingerprint(frozen)),
                              ("audio tower", about.recipe.clap, fingerprint(frozen.clap))):
        if there != here:
            raise JobError(f"{checkpoint} was trained around another {what} ({there[:12]}) than that of "
                           f"{base if what == 'base model' else clap} ({here[:12]})",
                           "name the one that it was trained with")
    frozen = replace(frozen, base_path=about.base and str(base), clap_path=about.clap and str(clap))
    loaded = assemble(frozen, about, INITIAL_GATE, checkpoint)
    load_module(checkpoint, PROJECTOR, loaded.projector)
    load_module(checkpoint, PARTS, loaded.parts)
    if new_lora and not about.lora:
        torch.manual_seed(0)  # its A is random: the same on every rank and in every attempt
        add_lora(frozen.unet, *new_lora)
        loaded = replace(loaded, about=replace(about, lora=new_lora))
    return loaded


def write_made(target: Path, frozen: Frozen) -> None:
    """base/ and clap/ of components that were made here. Before audio attention is added to the UNet."""
    with without_progress_bars():
        for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            part = getattr(frozen, name)
            if part is not None:
                part.save_pretrained(target / BASE / name)
        frozen.clap.save_pretrained(target / CLAP)
        frozen.features.save_pretrained(target / CLAP)


def carry_made(target: Path, checkpoint: Path) -> None:
    """The same from a checkpoint that has them."""
    for name in (BASE, CLAP):
        if (checkpoint / name).is_dir():
            link_tree(checkpoint / name, target / name)
