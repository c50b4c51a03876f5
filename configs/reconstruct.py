"""The run file of reconstruct: one picture through phase 1 and phase 3. Defaults are those of the full size."""
from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from configs.fields import Count, DataPath, Positive, PositiveFloat, ResourcesOverride, Strict
from configs.phase2 import Generator
from configs.phase3 import Model
from configs.training import Precision

Fill = Annotated[float, Meta(gt=0, le=1)]
Elevation = Annotated[float, Meta(gt=-90, lt=90)]


class Fit(Strict):
    """How the picture becomes the generator's square one."""

    crop: Literal["auto", "never", "always"] = "auto"  # auto: a square picture is taken as it is
    fill: Fill = 0.75  # of the cropped frame's side, by the longer side of the object
    keep_background: bool = False  # take a picture without alpha whose border is not the generator's background


class Reconstructor(Strict):
    """A checkpoint of phase 3, or a public GS-LRM one."""

    checkpoint: DataPath
    model: Model | None = None  # null: what the checkpoint or its run says; for public ones the public sizes
    precision: Precision = "bf16"


class Turntable(Strict):
    frames: Count = 150  # 0: none
    fps: PositiveFloat = 30.0
    size: Positive | None = None  # px; null: that of the views
    elevation_deg: Elevation = 0.0


class ReconstructRun(Strict):
    input_image: DataPath
    generator: Generator
    reconstructor: Reconstructor
    fit: Fit = Fit()
    turntable: Turntable = Turntable()
    truth: DataPath | None = None  # a sample's folder: the true views of this object, for metrics.json
    mean_of: DataPath | None = None  # training samples, a list or its folder: their mean stands beside, with `truth`
    resources: ResourcesOverride = ResourcesOverride()  # for launch; the job itself does not look at it

    def __post_init__(self) -> None:
        if self.mean_of is not None and self.truth is None:
            raise ValueError("`mean_of`: has a meaning only beside `truth`")
