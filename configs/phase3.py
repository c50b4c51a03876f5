"""The run file of phase 3: GS-LRM, six posed views to 3D Gaussians. Defaults are the reference's values."""
from __future__ import annotations

from typing import Literal

from msgspec.structs import force_setattr

from configs.fields import Count, DataPath, Fraction, Positive, PositiveFloat, ResourcesOverride, Strict, Weight
from configs.training import AdamW, Checkpoint, Dataset, Mode, Precision, Wandb, check_updates, shortened


class Model(Strict):
    """Sizes, and the constants between the network's raw outputs and a Gaussian.

    The constants are those of the public 512 px checkpoint. From scratch below 512 px they turn the picture white:
    set scale_bias = ln(0.6 px * 2.7 / fx) and scale_max = scale_bias + 0.7.
    """

    d: Positive = 1024
    d_head: Positive = 64
    n_layer: Positive = 24
    patch_size: Positive = 8
    image_size: Positive = 512  # px; images are resized to it, cameras with them
    scale_bias: float = -2.3  # added to the raw log-scale
    scale_max: float = -1.2  # upper bound of the log-scale
    opacity_bias: float = -2.0  # added to the raw opacity logit
    depth_half: PositiveFloat = 1.8  # world units around the point of a ray nearest to the origin
    clip_xyz: bool = False  # positions clipped to [-1, 1]

    def __post_init__(self) -> None:
        if self.d % self.d_head:
            raise ValueError(f"`d_head`: {self.d_head} does not divide d {self.d}")
        if self.image_size % self.patch_size:
            raise ValueError(f"`patch_size`: {self.patch_size} does not divide image_size {self.image_size}")


class Validation(Strict):
    """Every leave-one-out view of every sample, with the same inputs each time."""

    path: DataPath
    every_steps: Positive = 500  # besides the first and the last step
    max_samples: Positive | None = None  # null: all


class Optimizer(AdamW):
    """Weight decay on 2-D weights only."""

    lr: PositiveFloat = 5e-6
    beta2: Fraction = 0.95
    weight_decay: Weight = 0.05
    grad_clip: PositiveFloat = 0.5
    allowed_gradnorm_factor: PositiveFloat = 50.0


class Schedule(Strict):
    """Linear warm-up, then cosine to 0; counted in applied updates."""

    warmup: Count = 500


class Losses(Strict):
    """Weights of the loss terms; 0 is off."""

    l2: Weight = 1.0
    ssim: Weight = 0.5
    masked_l2: Weight = 0.0
    masked_ssim: Weight = 0.0
    background: Weight = 0.0
    pixelalign: Weight = 0.0
    pointsdist: Weight = 0.0
    lpips: Weight = 0.0
    lpips_weights: DataPath | None = None  # VGG-16 in torchvision's names, or random:SEED in tests
    lpips_heads: DataPath | None = None  # the five 1x1 heads, linN.model.1.weight
    perceptual: Weight = 0.0
    perceptual_weights: DataPath | None = None  # conv{1..16}.{weight,bias}; public GS-LRM checkpoints have them
    l2_warmup_steps: Count = 0  # lpips and perceptual are 0 before this step

    def __post_init__(self) -> None:
        for term, key in (("lpips", "lpips_weights"), ("lpips", "lpips_heads"), ("perceptual", "perceptual_weights")):
            if getattr(self, term) > 0 and getattr(self, key) is None:
                raise ValueError(f"`{key}`: the loss `{term}` has weight {getattr(self, term)} "
                                 f"and needs this file; give its path, or set {term} to 0")
        terms = (self.l2, self.ssim, self.masked_l2, self.masked_ssim, self.lpips, self.perceptual)
        if not any(terms):
            raise ValueError("all losses that compare pictures (l2, ssim, masked_l2, masked_ssim, lpips, "
                             "perceptual) are 0: nothing would be learned")


class Training(Strict):
    dataset: Dataset
    validation: Validation
    max_steps: Positive  # attempted passes; one update every `accumulation` of them
    input_views: Positive = 5
    targets: Literal["all", "heldout"] = "heldout"  # all: the inputs too; heldout: only the other views
    maximize_view_overlap: bool = False  # rigs with many views: extra targets within 60 degrees of an input
    batch_per_rank: Positive = 1
    accumulation: Positive = 1
    seed: Count = 0
    precision: Precision = "bf16"
    loader_workers: Count = 4  # processes per rank
    # false: all activations are kept; selective: those of attention, the rest is computed again in backward; true: all
    # is computed again; auto: the first of these that fits into the free memory
    activation_checkpointing: bool | Literal["auto", "selective"] = "auto"
    compile: bool = False  # the transformer's blocks by torch.compile: minutes at the start, some percent less per step
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    losses: Losses = Losses()
    max_consecutive_skips: Positive = 50  # then the run stops as non-finite
    log_every_steps: Positive = 1

    def __post_init__(self) -> None:
        check_updates(self.max_steps, self.accumulation)


class Phase3Run(Strict):
    training: Training
    mode: Mode = "full"  # test: at most 600 training samples and 10,000 steps
    model: Model = Model()
    init_from: DataPath | None = None  # weights only, the run starts at step 0; strict
    checkpoint: Checkpoint = Checkpoint()
    turntable_frames: Count = 150  # of the film at the end; 0: none
    wandb: Wandb = Wandb()
    resources: ResourcesOverride = ResourcesOverride()  # for launch; the job itself does not look at it

    def __post_init__(self) -> None:
        if self.mode == "test":
            force_setattr(self, "training", shortened(self.training))
