"""The reconstructor of a named checkpoint: its sizes, its weights, the rig it was trained on."""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cluster.contract import parse_checkpoint_name
from configs.errors import ConfigError
from configs.load import read_run
from configs.phase3 import Model, Phase3Run
from configs.reconstruct import Reconstructor as Config
from jobs.checkpoint import load_module, read_state
from jobs.runtime import JobError
from models import rigs
from models.cameras import Rig
from models.gaussians import Gaussians, render
from models.gslrm import GSLRM, GSLRMConfig
from models.weights import WeightsError

ABOUT = "gslrm.json"  # in a checkpoint: {"model": the sizes of configs.phase3.Model}
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Reconstructor:
    """Six views to Gaussians. `rig`: fingerprint of the one it was trained on; empty: several, or nobody says."""

    model: GSLRM
    size: int  # px of the pictures it takes
    rig: str
    rig_words: str
    precision: str

    def gaussians(self, views: Tensor, rig: Rig) -> Gaussians:
        """One scene of RGB views [V, 3, S, S] in 0..1, whatever their size, taken by `rig`."""
        own = rig.resized(self.size, self.size)
        device = next(self.model.parameters()).device
        pictures = views.to(device)
        if views.shape[-1] != self.size:
            pictures = interpolate(pictures, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(pictures[None], own.c2w[None].to(device), own.fxfycxcy[None].to(device))

    def untrained(self) -> Reconstructor:
        """The same with fresh random weights."""
        torch.manual_seed(0)
        fresh = GSLRM(self.model.config).eval().to(next(self.model.parameters()).device)
        return Reconstructor(fresh, self.size, self.rig, self.rig_words, self.precision)


def load_reconstructor(config: Config, device: torch.device) -> Reconstructor:
    """Raises JobError that names the file and what is missing or does not fit."""
    path = Path(config.checkpoint)
    if not path.exists():
        raise JobError(f"reconstructor.checkpoint: there is no {path}",
                       "name one checkpoint of phase 3 (…/checkpoints/step-NNNNNNNN-aNNN), or a public .pt file")
    identity: Mapping[str, Any] = read_state(path)["identity"] if path.is_dir() else {}
    sizes = config.model or sizes_of(path)
    model = network(sizes)
    try:
        load_weights(model, path)
    except WeightsError as error:
        raise JobError(f"reconstructor.checkpoint: {error}", "give its sizes: reconstructor.model") from None
    rig = identity.get("rig", "")
    return Reconstructor(model.eval().to(device), sizes.image_size, rig if _FINGERPRINT.fullmatch(rig) else "",
                         identity.get("rig in words", "no rig that it names"), config.precision)


def network(sizes: Model) -> GSLRM:
    """With the weights of its own initialisation."""
    return GSLRM(GSLRMConfig(
        d=sizes.d, d_head=sizes.d_head, n_layer=sizes.n_layer, patch_size=sizes.patch_size,
        scale_bias=sizes.scale_bias, scale_max=sizes.scale_max, opacity_bias=sizes.opacity_bias,
        depth_half=sizes.depth_half, clip_xyz=sizes.clip_xyz))


def load_weights(model: GSLRM, path: Path) -> None:
    """Strictly: of a public checkpoint (.pt), or of the directory of one of ours. Raises WeightsError."""
    if path.is_dir():
        load_module(path, "gslrm", model)
    else:
        model.load_upstream(path)


def sizes_of(path: Path) -> Model:
    """From the checkpoint, else from the run it lies in; the public sizes for a public file. Raises JobError."""
    if not path.is_dir():
        return Model()
    about, run = path / ABOUT, path.parent.parent / "config.yaml"
    try:
        if about.is_file():
            return msgspec.convert(json.loads(about.read_bytes())["model"], Model)
        if parse_checkpoint_name(path.name) and run.is_file():
            return read_run(run, Phase3Run).model
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise JobError(f"reconstructor.checkpoint: the sizes of {path} cannot be read: {error}",
                       "give them: reconstructor.model") from None
    raise JobError(f"reconstructor.checkpoint: {path} does not say the sizes of its network (no {ABOUT}, and it lies "
                   "in no run)", "give them as the run that trained it has them: reconstructor.model")


def check_rigs(generator: str, ours: Rig, reconstructor: Reconstructor) -> None:
    """Raises JobError when the two checkpoints were trained on different rigs; says which has what."""
    if reconstructor.rig and reconstructor.rig != ours.fingerprint:
        raise JobError(
            f"the two checkpoints belong to different rigs: the generator {generator} makes {rigs.describe(ours)} "
            f"({ours.fingerprint[:12]}); the reconstructor was trained on {reconstructor.rig_words} "
            f"({reconstructor.rig[:12]})",
            "train phase 3 on what this generator makes (phase 2), or name the generator of its data")


def rendered(gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, size: int,
             background: tuple[float, float, float]) -> Tensor:
    """RGB [V, 3, size, size] in 0..1 of one scene, a view at a time, on the CPU."""
    device = gaussians.means.device
    with torch.no_grad():
        views = [render(gaussians, pose[None, None].to(device), pinhole[None, None].to(device), size, size,
                        background).image[0, 0].clamp(0, 1).cpu() for pose, pinhole in zip(c2w, fxfycxcy)]
    return torch.stack(views)
