"""GS-LRM as a stage: its losses, its validation and what it leaves behind."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import msgspec
import psutil
import torch
from PIL import Image
from torch import Tensor, nn

from configs.phase3 import Losses, Model, Phase3Run
from configs.reconstruct import Turntable
from jobs import bars
from jobs.data.multiview import Batch, MultiView
from jobs.heldout import Heldout
from jobs.metrics import Metrics
from jobs.reconstructor import ABOUT, load_weights, network
from jobs.runtime import JobError
from jobs.stage import Stage
from jobs.turntable import save_turntable
from jobs.world import World, mixed_seed
from models import losses
from models.cameras import rays
from models.gaussians import Gaussians, RenderError, load_gsplat, render, save_ply
from models.gslrm import GLOBAL_TOKENS, GSLRM, Recompute, activation_gb
from models.perceptual import Lpips, PerceptualLoss
from models.weights import WeightsError

_PIXELS_AT_ONCE = 1 << 20  # target pixels whose rendering graph is alive at a time
_ACTIVATIONS_SHARE = 0.5  # of the free memory that `auto` gives to them; the rest is the renderer's and the losses'
_BYTES_PER_WEIGHT = 16  # the weight, its gradient and two moments, fp32
PICTURE = "before_after_truth.png"
PLY = "gaussians.ply"


class GSLRMStage(Stage):
    """Posed views in, 3D Gaussians out, supervised by renderings."""

    name = "phase3"
    scalars = ("mse",)
    shown = ("loss", "psnr")
    best_metric = "val/psnr"

    def __init__(self, config: Phase3Run, train: MultiView, heldout: Heldout, metrics: Metrics, world: World,
                 identity: dict[str, str], provenance: dict[str, str]) -> None:
        compiled = "yes" if config.training.compile else "no"
        self.source, self.identity = train, identity
        self.provenance = provenance | {"compiled blocks": compiled}
        self._config, self._heldout, self._metrics, self._device = config, heldout, metrics, world.device
        self._found: dict[str, float] = {}
        self._model = build_model(config).to(world.device)
        self._pictures = PictureLoss(config, world.device)
        self.modules = {"gslrm": self._model}
        if config.training.compile:
            check_compiler(world.device)
            self._model.compile_blocks()

    def prepare(self, world: World, attachments: Path, pictures: Path) -> str:
        """On all ranks, before training: where what goes into each checkpoint and the pictures of validation are to be;
        how activations are kept, which is told."""
        if world.is_main:
            write_about(self._config.model, attachments)
        self.attachments, self._seen, self._is_main = attachments, pictures, world.is_main
        self._model.checkpoint_activations, words = recomputation(self._config, self._model, world)
        return words

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return decays(name, parameter)

    def names(self, batch: Batch) -> list[str]:
        return batch.names

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batch.to(self._device)
        training = self._config.training
        count = training.input_views
        images, c2w, fxfycxcy = batch.images, batch.c2w, batch.fxfycxcy
        gaussians = self._model(images[:, :count], c2w[:, :count], fxfycxcy[:, :count])
        first = count if training.targets == "heldout" else 0
        with torch.autocast(self._device.type, enabled=False):
            masks = batch.masks
            loss, mse = self._pictures.deferred(gaussians, images[:, first:], masks[:, first:],
                                                c2w[:, first:], fxfycxcy[:, first:], step)
            loss = loss + self._geometry(gaussians, masks[:, :count], c2w[:, :count], fxfycxcy[:, :count])
        return loss, {"mse": mse}

    def _geometry(self, gaussians: Gaussians, masks: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> Tensor:
        weights = self._config.training.losses
        total = gaussians.means.new_zeros(())
        if not (weights.pixelalign or weights.pointsdist):
            return total
        views, height, width = masks.shape[1], *masks.shape[-2:]
        points = self._model.pixel_grid(gaussians.means, views, height, width)
        origins, directions = rays(c2w, fxfycxcy, height, width)
        if weights.pixelalign:
            mask = masks if weights.masked_l2 or weights.masked_ssim else None
            total = total + weights.pixelalign * losses.pixelalign(points, origins, directions, mask)
        if weights.pointsdist:
            total = total + weights.pointsdist * losses.pointsdist(points, origins)
        return total

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        mse = torch.tensor(means["mse"], dtype=torch.float64)
        return {"loss": means["loss"], "psnr": losses.psnr(mse).item()}

    def evaluate(self, step: int, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        found = self._heldout.evaluate(self._model, stop_asked)
        self._found = found or self._found
        if found is not None and self._is_main:
            picture = self._heldout.picture([self._model])
            self._seen.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(self._seen / f"step-{step:08d}.png")
            if self._metrics.takes_images:
                self._metrics.image(step, "val/picture", picture)
        return found

    def artifacts(self, directory: Path) -> None:
        """gaussians.ply and its film; the held-out views of one validation sample before training, after it, and in
        truth; validation.json with what the last evaluation is held against."""
        before = build_model(self._config).to(self._device).eval()
        self._model.eval()
        with torch.no_grad():
            scene = self._heldout.example(self._model)
            save_ply(directory / PLY, scene)
            self._film(scene, directory)
            Image.fromarray(self._heldout.picture([before, self._model])).save(directory / PICTURE)
        found = bars.bars(self._found["val/psnr"], {bars.WHITE: self._found["val/psnr_white"],
                                                    bars.MEAN: self._found["val/psnr_mean"]})
        bars.write(directory, self._found, found)
        for line in bars.told(found):
            self._metrics.say(line)

    def _film(self, scene: Gaussians, directory: Path) -> None:
        frames, background = self._config.turntable_frames, self._config.training.dataset.background
        if frames:
            film, why = save_turntable(scene, Turntable(frames=frames), self._config.model.image_size, background,
                                       directory)
            self._metrics.say(f"turntable: {film}" + (f" ({why})" if why else ""))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies."""
    return parameter.dim() >= 2 and name != "gaussian_position_embeddings"


def write_about(model: Model, directory: Path) -> None:
    """The sizes of the network, for whoever gets a checkpoint without its run."""
    directory.mkdir(exist_ok=True)
    (directory / ABOUT).write_text(json.dumps({"model": msgspec.to_builtins(model)}, indent=1))


def activations(config: Phase3Run, model: GSLRM) -> dict[Recompute, float]:
    """What backward needs of a rank's batch, GB, for each way to keep it."""
    training, sizes = config.training, config.model
    tokens = GLOBAL_TOKENS + training.input_views * (sizes.image_size // sizes.patch_size) ** 2
    return activation_gb(model.config, training.batch_per_rank * tokens, 2 if training.precision == "bf16" else 4)


def recomputation(config: Phase3Run, model: GSLRM, world: World) -> tuple[Recompute, str]:
    """What backward computes again (the same on every rank), and a word about it."""
    asked, need = config.training.activation_checkpointing, activations(config, model)
    if asked != "auto":
        return asked, f"activations: {_NAMED[asked]}, ~{need[asked]:.2g} GB"
    if world.device.type == "cuda":
        free = torch.cuda.mem_get_info(world.device)[0]
    else:
        free = psutil.virtual_memory().available // world.size
    state = _BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in model.parameters())
    room = _ACTIVATIONS_SHARE * (min(world.gather(free)) - state) / 1e9
    found = next((way for way, gb in need.items() if gb <= room), True)
    return found, f"activations: {_NAMED[found]}, ~{need[found]:.2g} GB (auto: room for {max(0.0, room):.3g} GB)"


_NAMED: dict[Recompute, str] = {False: "kept", "selective": "those of attention are kept", True: "computed again"}


def check_compiler(device: torch.device) -> None:
    """Raises JobError when this machine lacks what torch.compile calls."""
    compiler = os.environ.get("CXX", "g++")
    missing = [] if shutil.which(compiler) else [f"the C++ compiler {compiler}"]
    if device.type == "cuda" and find_spec("triton") is None:
        missing.append("the Python package triton")
    if missing:
        raise JobError(f"training.compile: torch.compile needs {' and '.join(missing)}, not found here",
                       "install it, or set training.compile: false")


def check_renderer(config: Phase3Run, device: torch.device) -> None:
    """Raises JobError when this machine cannot render, or the pictures are too small to compare."""
    if config.model.image_size < losses.SSIM_WINDOW:
        raise JobError(f"model.image_size = {config.model.image_size}: SSIM needs at least "
                       f"{losses.SSIM_WINDOW} px")
    if device.type == "cuda":
        try:
            load_gsplat()  # compiled at first use, for minutes
        except RenderError as error:
            raise JobError(f"rendering: {error}") from None


class PictureLoss:
    """The terms between renderings and targets, weighted as the config says."""

    def __init__(self, config: Phase3Run, device: torch.device) -> None:
        self._weights: Losses = config.training.losses
        self._background = config.training.dataset.background
        self._perceptual = self._lpips = None
        weights = self._weights
        try:
            if weights.perceptual:
                self._perceptual = PerceptualLoss(str(weights.perceptual_weights)).to(device)
            if weights.lpips:
                self._lpips = Lpips(str(weights.lpips_weights), str(weights.lpips_heads)).to(device)
        except WeightsError as error:
            raise JobError(f"training.losses: {error}") from None

    def deferred(self, gaussians: Gaussians, images: Tensor, masks: Tensor, c2w: Tensor, fxfycxcy: Tensor,
                 step: int) -> tuple[Tensor, Tensor]:
        """(loss, mean squared error) of the renderings against images [B, T, 3, H, W].

        The renderer's graph of one group of views is alive at a time, so memory does not grow with the target
        views; the gradients in the Gaussians are kept and handed to the network's backward.
        """
        leaves = gaussians.map(lambda field: field.detach().requires_grad_())
        batch, views, _, height, width = images.shape
        group = max(1, _PIXELS_AT_ONCE // (batch * height * width))
        total, squares = images.new_zeros(()), images.new_zeros(())
        shares = self._shares(masks, group)
        for index, start in enumerate(range(0, views, group)):
            part = slice(start, start + group)
            rendering = render(leaves, c2w[:, part], fxfycxcy[:, part], width, height, self._background).image
            share = images[:, part].shape[1] / views
            loss = self._terms(rendering, images[:, part], masks[:, part], step, share, shares[index])
            loss.backward()
            total += loss.detach()
            squares += share * losses.l2(rendering.detach(), images[:, part])
        gradients = [leaf.grad for leaf in _fields(leaves)]
        return _WithGradients.apply(total, *_fields(gaussians), *gradients), squares

    def _shares(self, masks: Tensor, group: int) -> list[tuple[float, float]]:
        """Of each group of views, its share of all pixels inside the mask and of all outside."""
        if not (self._weights.masked_l2 or self._weights.background) or masks.shape[1] <= group:
            return [(1.0, 1.0)] * -(-masks.shape[1] // group)
        parts = masks.split(group, 1)
        inside = torch.stack([(part > 0.5).sum() for part in parts]).double()
        outside = torch.stack([(part < 0.5).sum() for part in parts]).double()
        shares = torch.stack([inside / inside.sum().clamp(min=1), outside / outside.sum().clamp(min=1)], 1)
        return [(share[0], share[1]) for share in shares.tolist()]

    def _terms(self, rendering: Tensor, target: Tensor, mask: Tensor, step: int, share: float,
               mask_shares: tuple[float, float]) -> Tensor:
        weights = self._weights
        late = step >= weights.l2_warmup_steps
        inside, outside = mask_shares
        terms: list[tuple[float, Callable[[], Tensor]]] = [
            (weights.l2 * share, partial(losses.l2, rendering, target)),
            (weights.ssim * share, partial(losses.ssim, rendering, target)),
            (weights.masked_l2 * inside, partial(losses.masked_l2, rendering, target, mask)),
            (weights.masked_ssim * share, partial(losses.masked_ssim, rendering, target, mask)),
            (weights.background * outside, partial(losses.background_l2, rendering, mask, self._background)),
        ]
        if self._perceptual is not None and late:
            terms.append((weights.perceptual * share, partial(self._perceptual, rendering, target)))
        if self._lpips is not None and late:
            terms.append((weights.lpips * share, partial(self._lpips, rendering, target)))
        return torch.stack([weight * term() for weight, term in terms if weight]).sum()


def _fields(gaussians: Gaussians) -> list[Tensor]:
    return [getattr(gaussians, field.name) for field in fields(gaussians)]


class _WithGradients(torch.autograd.Function):
    """A value whose gradients in `fields` are known already: apply(value, *fields, *gradients)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[len(pairs) // 2:])
        return value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, *(gradient * upstream for gradient in gradients), *(None for _ in gradients))


def build_model(config: Phase3Run) -> GSLRM:
    """The network at step 0: a function of the config's seed, or of `init_from`. Raises JobError."""
    torch.manual_seed(mixed_seed("weights", config.training.seed))
    model = network(config.model)
    if config.init_from:
        _initialise(model, Path(config.init_from))
    return model


def _initialise(model: GSLRM, path: Path) -> None:
    """Weights only."""
    try:
        load_weights(model, path)
    except WeightsError as error:
        raise JobError(f"init_from: {error}", "name weights of this model, or change `model:`") from None
