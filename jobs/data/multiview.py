"""A multi-view data set: checked samples, cached pixels, and which views are inputs and targets of a draw."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from jobs.batch import TensorBatch
from jobs.data.samples import (
    BadSample, Sample, angles_deg, check_view_count, read_list, read_sample, summary_of, usual_view_count,
)
from jobs.loader import Draw
from jobs.memory import Memory
from jobs.runtime import JobError
from jobs.world import World, mixed_seed

OVERLAP_DEG = 60.0
_DECODE_ALL_BELOW = 4096  # images; beyond that, pixels are checked when they are read
T = TypeVar("T")


@dataclass(frozen=True)
class Views:
    """`pixels` uint8 [V, 4, S, S]: RGB over the background, and alpha; c2w [V, 4, 4]; fxfycxcy [V, 4] px."""

    pixels: Tensor
    c2w: Tensor
    fxfycxcy: Tensor


@dataclass(frozen=True)
class Batch(TensorBatch):
    """B samples with the same number of views each, the inputs first.

    pixels uint8 [B, n, 4, S, S]; c2w [B, n, 4, 4]; fxfycxcy [B, n, 4] px; views [B, n] the views' places in
    the rig.
    """

    pixels: Tensor
    c2w: Tensor
    fxfycxcy: Tensor
    views: Tensor
    names: list[str]

    @property
    def images(self) -> Tensor:
        """RGB [B, n, 3, S, S] in 0..1."""
        return self.pixels[:, :, :3].float() / 255

    @property
    def masks(self) -> Tensor:
        """Alpha [B, n, 1, S, S] in 0..1."""
        return self.pixels[:, :, 3:].float() / 255


@dataclass(frozen=True)
class ViewChoice:
    """Which views of a sample are put in and which are compared."""

    inputs: int
    targets: Literal["all", "heldout"]
    maximize_overlap: bool

    def check(self, views: int) -> None:
        """Raises JobError when a sample of `views` views cannot be divided so."""
        if self.inputs > views:
            raise JobError(f"training.input_views = {self.inputs}: the samples have only {views} views",
                           f"set it to at most {views - 1}")
        if self.targets == "heldout" and self.inputs == views:
            raise JobError(f"training.input_views = {self.inputs} with training.targets = heldout: "
                           f"all {views} views would be inputs and none is left to compare with",
                           f"set input_views to at most {views - 1}, or targets to all")

    def choose(self, seed: int, draw: Draw, c2w: Tensor) -> list[int]:
        """The inputs, then the extra views, of c2w [V, 4, 4]: a function of (seed, step, sample) alone."""
        generator = torch.Generator().manual_seed(mixed_seed("views", seed, draw.step, draw.index))
        order = torch.randperm(len(c2w), generator=generator).tolist()
        inputs, rest = order[:self.inputs], order[self.inputs:]
        if self.maximize_overlap and rest:
            nearest = angles_deg(c2w)[inputs].amin(0)
            near = [view for view in rest if nearest[view] <= OVERLAP_DEG]
            rest = near or [min(rest, key=lambda view: nearest[view])]
        return inputs + rest


class MultiView:
    """Samples at `size` x `size` px over `background`; a `jobs.loader.Source`.

    Their pixels are kept, as many as fit into the memory.
    """

    def __init__(self, samples: list[Sample], size: int, background: tuple[float, float, float],
                 choice: ViewChoice, seed: int, ranks: int) -> None:
        self.samples, self.size, self.background = samples, size, background
        self._choice, self._seed = choice, seed
        self._memory = Memory.of_machine(ranks)

    def __len__(self) -> int:
        return len(self.samples)

    def views(self, index: int) -> Views:
        """All views of one sample. Raises BadSample."""
        sample = self.samples[index]
        pixels = self._memory.get_or_make(index, lambda: read_pixels(sample, self.size, self.background))
        return Views(pixels, sample.c2w(), sample.fxfycxcy(self.size))

    def batch(self, draws: list[Draw]) -> Batch:
        """Raises BadSample."""
        items = [(draw, self.views(draw.index)) for draw in draws]
        chosen = [self._choice.choose(self._seed, draw, views.c2w) for draw, views in items]
        count = min(map(len, chosen))  # `maximize_overlap` finds a different number for each
        chosen = [order[:count] for order in chosen]
        return Batch(
            pixels=torch.stack([views.pixels[order] for (_, views), order in zip(items, chosen)]),
            c2w=torch.stack([views.c2w[order] for (_, views), order in zip(items, chosen)]),
            fxfycxcy=torch.stack([views.fxfycxcy[order] for (_, views), order in zip(items, chosen)]),
            views=torch.tensor(chosen),
            names=[self.samples[draw.index].name for draw in draws],
        )


def read_pixels(sample: Sample, size: int, background: tuple[float, float, float]) -> Tensor:
    """uint8 [V, 4, size, size]: composited RGB and alpha. Raises BadSample."""
    return torch.stack([_read_view(sample.name, frame.image, size, background) for frame in sample.frames])


def read_rgba(name: str, path: Path) -> np.ndarray:
    """uint8 [H, W, 4], straight alpha. Raises BadSample for a picture that is broken or wholly transparent."""
    try:
        with Image.open(path) as image:
            rgba = np.asarray(image.convert("RGBA"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        # the last two: PIL, for a broken chunk
        raise BadSample(name, str(path), f"cannot be decoded: {error}",
                        "render or export this image again") from None
    if not rgba[..., 3].any():
        raise BadSample(name, str(path), "is fully transparent: the object is not in it",
                        "check the segmentation of this view, or remove the sample from the list")
    return rgba


def _read_view(name: str, path: Path, size: int, background: tuple[float, float, float]) -> Tensor:
    rgba = read_rgba(name, path).astype(np.float32) / 255
    alpha = rgba[..., 3:]
    # Composited before it is resized: RGB is 0 where alpha is 0, so resizing it straight darkens the
    # silhouette.
    rgb = rgba[..., :3] * alpha + np.asarray(background, dtype=np.float32) * (1 - alpha)
    both = np.round(np.concatenate([rgb, alpha], 2) * 255).astype(np.uint8)
    if both.shape[0] != size:
        bands = [Image.fromarray(both[..., band]).resize((size, size), Image.Resampling.BICUBIC)
                 for band in range(4)]
        both = np.stack([np.asarray(band) for band in bands], 2)
    return torch.from_numpy(both).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Found:
    """What a list file held: usable samples, and the ones left out."""

    samples: list[Sample]
    skipped: list[BadSample]
    paths: str  # how its lines were meant

    def at_most(self, count: int | None) -> Found:
        """So many of the samples, spread evenly over all: neighbours in a list are often the same pose."""
        total = len(self.samples)
        if count is None or count >= total:
            return self
        return replace(self, samples=[self.samples[i * total // count] for i in range(count)])


def find_samples(path: Path, on_bad: Literal["error", "skip"], world: World,
                 views: int | None = None) -> Found:
    """Check every sample of a list, each rank a share of them; the same answer on every rank.

    `views`: the number they must have; None: what most of them have. With `skip`, and for data sets of a few
    thousand images, the pixels are decoded too. Raises AgreedError that names every bad sample (`error`), or
    when none is good.
    """
    lines, paths = world.on_main(lambda: read_list(path))
    results = _shared(world, len(lines), lambda i: _or_defect(lambda: read_sample(*lines[i])))
    samples = [result for result in results if isinstance(result, Sample)]
    defects = [result for result in results if isinstance(result, BadSample)]
    if samples:
        wrong = check_view_count(samples, views or usual_view_count(samples))
        bad = {defect.sample for defect in wrong}
        samples = [sample for sample in samples if sample.name not in bad]
        defects += wrong
    if on_bad == "skip" or sum(len(sample.frames) for sample in samples) <= _DECODE_ALL_BELOW:
        decoded = _shared(world, len(samples), lambda i: _or_defect(lambda: check_pixels(samples[i])))
        defects += [result for result in decoded if isinstance(result, BadSample)]
        samples = [sample for sample, result in zip(samples, decoded) if not isinstance(result, BadSample)]
    if defects and (on_bad == "error" or not samples):
        world.agree(summary_of(defects))
    return Found(samples, defects, paths)


def check_pixels(sample: Sample) -> None:
    """Decode every view. Raises BadSample."""
    for frame in sample.frames:
        _read_view(sample.name, frame.image, frame.size, (1.0, 1.0, 1.0))


def _or_defect(work: Callable[[], T]) -> T | BadSample:
    try:
        return work()
    except BadSample as defect:
        return defect


def _shared(world: World, count: int, work: Callable[[int], T]) -> list[T]:
    """[work(0), …, work(count - 1)], the work divided over the ranks."""
    parts = world.gather([work(index) for index in range(world.rank, count, world.size)])
    return [parts[index % world.size][index // world.size] for index in range(count)]
