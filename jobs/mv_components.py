"""The networks around the UNet, from a folder or made on the spot, and what of a checkpoint does not change.

A checkpoint of phase 1 is a diffusers folder:

    unet/ unet_ema/                       config.json, diffusion_pytorch_model.safetensors
    vae/ image_encoder/ … scheduler/      as they came, or as they were made
    model_index.json README.md
    mvdiffusion.json                      attention, rig, image size, weighting: what diffusers has no word for
    prompt_embeds.pt opencv_cameras.json  of the rig's views, in their order
"""
from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from configs.phase1 import Phase1Run, Tiny
from jobs.checkpoint import link_tree
from jobs.data.prompts import check_embeddings, check_rig
from jobs.data.samples import CAMERAS
from jobs.data.writing import write_cameras
from jobs.runtime import JobError
from jobs.world import mixed_seed
from models.cameras import Rig
from models.mv_unet import MultiViewUNet, UNetError, build_unet, load_unet, unet_config
from models.mvdiffusion import EMA, UNET, PipelineError, load_frozen, without_progress_bars
from models.weights import WeightsError, read_tensor

PROMPTS = "prompt_embeds.pt"
ABOUT = "mvdiffusion.json"
WEIGHTS_FILE = "diffusion_pytorch_model"
_FROZEN = ("vae", "image_encoder", "image_normalizer", "image_noising_scheduler", "scheduler", "feature_extractor")
_CARRIED = (*_FROZEN, "text_encoder", "tokenizer")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,_-"  # what a tiny tokenizer knows

_README = """# A multi-view diffusion checkpoint

`unet/` holds the weights that were trained, `unet_ema/` their moving average: the one to sample with.
One picture of an object becomes its {views} views; they are those of `{cameras}`, their prompts `{prompts}`.

Every folder opens with plain diffusers (transformers for the image encoder), but **plain diffusers does not know the
attention rule**: `attention: {attention}` in unet/config.json (queries of view v attend to the tokens of view 0 and of
view v) is a key that it ignores. A plain `UNet2DConditionModel` computes single-view attention: it runs, and its six
pictures do not belong together. Open the folder with

    from models.mvdiffusion import MVDiffusionPipeline
    MVDiffusionPipeline.from_pretrained(FOLDER)
"""


@dataclass(frozen=True)
class Components:
    """The networks, `prompts` [V, L, D], and `source`: the folder they came from, or None: made here."""

    unet: MultiViewUNet
    frozen: dict[str, Any]
    prompts: Tensor
    source: Path | None

    @property
    def vae(self) -> AutoencoderKL:
        return self.frozen["vae"]

    @property
    def fingerprint(self) -> str:
        """sha256 over the frozen weights and the prompts: what a resume must share."""
        digest = hashlib.sha256()
        for name in ("vae", "image_encoder", "image_normalizer"):
            for key, tensor in self.frozen[name].state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        digest.update(self.prompts.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_components(config: Phase1Run, resume: Path | None, rig: Rig) -> Components:
    """From the checkpoint to resume, else from `pretrained`, else made. Raises JobError."""
    if resume is None and config.pretrained.startswith("random:"):
        return _made(config, rig)
    folder = resume or Path(config.pretrained)
    try:
        frozen = load_frozen(folder)
        with_ema = resume is None and (folder / EMA).is_dir()
        unet = load_unet(folder / (EMA if with_ema else UNET), None if resume else config.model.attention)
        given = None if resume else config.prompt_embeds
        prompts = read_prompts(Path(given) if given else folder / PROMPTS)
    except (PipelineError, UNetError) as error:
        key = "resume" if resume else "pretrained"
        raise JobError(f"{key}: {error}",
                       "name a folder in diffusers' format with unet, vae, image_encoder, …") from None
    check_together(unet, prompts, rig, Path(given) if given else folder / PROMPTS)
    return Components(unet, frozen, prompts, folder)


def check_together(unet: MultiViewUNet, prompts: Tensor, rig: Rig, path: Path) -> None:
    """Raises JobError when UNet, prompts and data are not made for each other."""
    check_embeddings(prompts, len(rig.names), unet.config.cross_attention_dim, f"prompt_embeds: {path}")
    check_rig(path, rig)
    if unet.num_views != len(rig.names):
        raise JobError(f"the samples have {len(rig.names)} views, the UNet is made for {unet.num_views}",
                       "train it on samples of its own rig")


def _made(config: Phase1Run, rig: Rig) -> Components:
    """Small and random: a function of the seed after `random:`."""
    tiny, seed = config.model.tiny, int(config.pretrained.removeprefix("random:"))
    torch.manual_seed(mixed_seed("components", seed))
    levels, views = len(tiny.unet.channels), len(rig.names)
    unet = build_unet({
        "attention": config.model.attention, "num_views": views, "in_channels": 8, "out_channels": 4,
        "sample_size": config.model.image_size // 2 ** (len(tiny.vae.channels) - 1),
        "block_out_channels": tiny.unet.channels, "layers_per_block": tiny.unet.layers_per_block,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1), "norm_num_groups": 8,
        "attention_head_dim": tuple(width // 16 for width in tiny.unet.channels), "use_linear_projection": True,
        "cross_attention_dim": tiny.unet.cross_attention_dim, "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2 * tiny.clip.width})
    prompts = torch.randn(views, tiny.prompt_tokens, tiny.unet.cross_attention_dim)
    if config.prompt_embeds:
        prompts = read_prompts(Path(config.prompt_embeds))
        check_together(unet, prompts, rig, Path(config.prompt_embeds))
    return Components(unet, _made_frozen(tiny, config.model.image_size), prompts, None)


def _made_frozen(tiny: Tiny, size: int) -> dict[str, Any]:
    """The public schedulers; the rest tiny and random."""
    clip, vae = tiny.clip, tiny.vae
    levels = len(vae.channels)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=clip.width, intermediate_size=2 * clip.width, num_hidden_layers=clip.layers,
        num_attention_heads=max(1, clip.width // 16), image_size=clip.image_size, patch_size=clip.patch_size,
        projection_dim=clip.width))
    found: dict[str, Any] = {
        "vae": AutoencoderKL(
            block_out_channels=vae.channels, layers_per_block=1, latent_channels=4, norm_num_groups=8,
            sample_size=size, down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels, mid_block_add_attention=False),
        "image_encoder": encoder,
        "image_normalizer": StableUnCLIPImageNormalizer(clip.width),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "scheduler": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                   prediction_type=tiny.prediction_type, set_alpha_to_one=False, steps_offset=1,
                                   clip_sample=False),
        "feature_extractor": CLIPImageProcessorPil(
            size={"shortest_edge": clip.image_size}, crop_size={"height": clip.image_size, "width": clip.image_size}),
    }
    for name in ("vae", "image_encoder", "image_normalizer"):
        found[name].eval().requires_grad_(False)
    return found


def read_prompts(path: Path) -> Tensor:
    """fp32. Raises JobError."""
    try:
        return read_tensor(path).float()
    except WeightsError as error:
        raise JobError(f"prompt_embeds: {error}", "make them with `python -m jobs.data prompts`") from None


def write_folder(target: Path, components: Components, own: Path, about: dict[str, Any], rig: Rig | None) -> None:
    """Everything of a checkpoint but the UNet's weights, below the new directory `target`. Files of a folder below
    `own` (the run's checkpoints) are linked, others copied: what a person edits must not change a checkpoint."""
    target.mkdir(parents=True)
    source = components.source
    for name in _CARRIED:
        if source is None and name in components.frozen:
            with without_progress_bars():
                components.frozen[name].save_pretrained(target / name)
        elif source is not None and (source / name).is_dir():
            inside = source.resolve().is_relative_to(own.resolve())
            (link_tree if inside else shutil.copytree)(source / name, target / name)
    if source is None:
        _write_text_encoder(target, components.unet.config.cross_attention_dim)
    config = unet_config(components.unet)
    for name in (UNET, EMA):
        (target / name).mkdir()
        (target / name / "config.json").write_text(json.dumps(config, indent=2))
    torch.save(components.prompts, target / PROMPTS)
    (target / "model_index.json").write_text(json.dumps(_index(target), indent=2))
    (target / ABOUT).write_text(json.dumps(about, indent=1))
    attention, views = components.unet.attention, components.unet.num_views
    readme = _README.format(views=views, attention=attention, cameras=CAMERAS, prompts=PROMPTS)
    (target / "README.md").write_text(readme)
    if rig is not None:
        images = [f"images/cam_{view:03d}.png" for view in range(len(rig.names))]
        write_cameras(target / CAMERAS, "rig", rig, images)


def _write_text_encoder(target: Path, width: int) -> None:
    """A tokenizer of letters and a random text encoder: without them plain diffusers does not open the folder."""
    words = [letter + end for letter in _LETTERS for end in ("", "</w>")] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    start, end = len(words) - 2, len(words) - 1
    config = CLIPTextConfig(vocab_size=len(words), hidden_size=width, intermediate_size=width, num_hidden_layers=1,
                            num_attention_heads=1, projection_dim=width, bos_token_id=start, eos_token_id=end,
                            pad_token_id=end)
    torch.manual_seed(0)
    with without_progress_bars():
        tokenizer.save_pretrained(target / "tokenizer")
        CLIPTextModel(config).save_pretrained(target / "text_encoder")


def _index(target: Path) -> dict[str, Any]:
    """model_index.json, by which plain diffusers opens the folder."""
    classes = {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    there = {name: kind if (target / name).is_dir() else [None, None] for name, kind in classes.items()}
    return {"_class_name": "StableUnCLIPImg2ImgPipeline", "_diffusers_version": diffusers.__version__, **there}
