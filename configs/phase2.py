"""The run file of phase 2: real samples to a synthetic data set of six views each. Defaults are those of the full
size."""
from __future__ import annotations

from typing import Literal

from msgspec.structs import force_setattr, replace

from configs.fields import Count, DataPath, Fraction, Positive, PositiveFloat, ResourcesOverride, Strict, Text
from configs.training import TEST_SAMPLES, TEST_SAMPLING_STEPS, Mode, Precision


class Sources(Strict):
    """The real samples; one view of each, or every view on its own, is put into the generator."""

    path: DataPath  # a list file, one sample directory per line; or a data set's folder: its data_train.txt
    view: Count | Literal["all"] = 0
    on_bad: Literal["error", "skip"] = "error"  # skip: bad samples are counted and listed
    frame: Text | None = None  # regular expression, one group: the source frame in a sample's name; null: the sample
    limit: Positive | None = None  # generated samples at most, spread evenly over all; null: all


class Matte(Strict):
    """Alpha from how far a pixel is from the generator's background, 0..1: below `low` none, from `high` on all."""

    low: Fraction = 0.04
    high: Fraction = 0.12

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"`high`: {self.high} must be above low {self.low}")


class Quality(Strict):
    """What a generated sample must show to be taken into the data set."""

    min_coverage: Fraction = 0.005  # of each picture, by the object
    max_coverage: Fraction = 0.95
    min_difference: Fraction = 0.02  # RMSE between any two views, RGB in 0..1
    min_explained: Fraction = 0.97  # of each silhouette, by the other five: models.hull
    max_rejected: Fraction = 0.5  # share of rejected samples above which the run stops: the generator is at fault

    def __post_init__(self) -> None:
        if self.min_coverage >= self.max_coverage:
            raise ValueError(f"`max_coverage`: {self.max_coverage} must be above min_coverage {self.min_coverage}")


class Generator(Strict):
    """A checkpoint of phase 1, or a public MVDiffusion folder, and how it is sampled."""

    checkpoint: DataPath
    weights: Literal["ema", "unet"] = "ema"  # unet: for folders without unet_ema
    rig: Literal["mv6", "orbit32"] | None = None  # null: the one in the checkpoint; public folders carry none: mv6
    rig_of: DataPath | None = None  # a sample's folder whose rig it is, where no name fits
    prompt_embeds: DataPath | None = None  # [views, L, D]; null: those in the checkpoint
    steps: Positive = 50
    guidance: PositiveFloat = 3.0  # 1: none
    eta: Fraction = 1.0
    seed: Count = 0
    precision: Precision = "bf16"


class Phase2Run(Strict):
    generator: Generator
    sources: Sources
    mode: Mode = "full"  # test: at most 600 samples and 25 sampling steps
    batch: Positive | None = None  # samples at once per rank; null: as many as the GPU's free memory holds
    max_batch: Positive = 16  # of what is found so
    val_share: Fraction = 0.1  # of the source frames, all samples of a frame on one side
    matte: Matte = Matte()
    quality: Quality = Quality()
    resources: ResourcesOverride = ResourcesOverride()  # for launch; the job itself does not look at it

    def __post_init__(self) -> None:
        if not 0 < self.val_share < 1:
            raise ValueError(f"`val_share`: {self.val_share} must be between 0 and 1: both lists need samples")
        if self.mode == "test":
            limit = min(TEST_SAMPLES, self.sources.limit or TEST_SAMPLES)
            force_setattr(self, "sources", replace(self.sources, limit=limit))
            steps = min(TEST_SAMPLING_STEPS, self.generator.steps)
            force_setattr(self, "generator", replace(self.generator, steps=steps))
