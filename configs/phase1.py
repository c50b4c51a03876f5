"""The run file of phase 1: MVDiffusion, one picture of an object to its six views. Defaults are those of the full
size."""
from __future__ import annotations

from typing import Literal

from msgspec.structs import force_setattr, replace

from configs.fields import (
    Count, DataPath, Fraction, Positive, PositiveFloat, ResourcesOverride, Strict, Weight,
)
from configs.training import (
    TEST_SAMPLING_STEPS, AdamW, Checkpoint, Dataset, Decay, Mode, Precision, Schedule as AnySchedule, Wandb,
    check_updates, shortened,
)

Views = Count | Literal["random"] | tuple[Count, ...]


class TinyUNet(Strict):
    """Attention at all levels but the coarsest and in the middle, as at full size; heads of 16 channels."""

    channels: tuple[Positive, ...] = (32, 64, 64)
    layers_per_block: Positive = 1
    cross_attention_dim: Positive = 32


class TinyVae(Strict):
    """An autoencoder that the run trains itself before its first step: pictures shrink by 2 per further channel."""

    channels: tuple[Positive, ...] = (16, 32, 32)
    train_steps: Positive = 1000
    batch: Positive = 8  # pictures per rank
    lr: PositiveFloat = 2e-3
    min_psnr: Weight = 28.0  # dB on the validation pictures; below it the run stops and says so


class TinyClip(Strict):
    """A random image encoder."""

    width: Positive = 32
    layers: Positive = 2
    image_size: Positive = 32
    patch_size: Positive = 8


class Tiny(Strict):
    """Sizes of the components that are made on the spot when `pretrained` is random:SEED."""

    unet: TinyUNet = TinyUNet()
    vae: TinyVae = TinyVae()
    clip: TinyClip = TinyClip()
    prediction_type: Literal["v_prediction", "epsilon"] = "v_prediction"
    prompt_tokens: Positive = 7

    def __post_init__(self) -> None:
        if any(width % 16 for width in self.unet.channels):
            raise ValueError("`unet`: its channels must be multiples of 16")
        if any(width % 8 for width in self.vae.channels):
            raise ValueError("`vae`: its channels must be multiples of 8")


class Model(Strict):
    image_size: Positive = 512  # px
    attention: Literal["front_self", "dense"] = "front_self"  # what each view's queries see in self-attention
    tiny: Tiny = Tiny()  # for pretrained: random:SEED only


class Validation(Strict):
    """The EMA weights on fixed samples with fixed noise."""

    path: DataPath
    every_steps: Positive = 500  # besides the first and the last step
    max_samples: Positive | None = 16  # null: all
    steps: Positive = 50
    guidance: PositiveFloat = 3.0  # 1: none
    eta: Fraction = 1.0
    seed: Count = 0
    lpips_weights: DataPath | None = None  # VGG-16 in torchvision's names; both: val/lpips is measured too
    lpips_heads: DataPath | None = None  # the five 1x1 heads, linN.model.1.weight

    def __post_init__(self) -> None:
        if (self.lpips_weights is None) != (self.lpips_heads is None):
            raise ValueError("`lpips_weights` and `lpips_heads`: LPIPS needs both files; give both, or neither")


class Optimizer(AdamW):
    """Weight decay on weights of two and more dimensions."""

    lr: PositiveFloat = 5e-5
    allowed_gradnorm_factor: PositiveFloat = 50.0


class Schedule(AnySchedule):
    decay: Decay = "constant"


class Training(Strict):
    dataset: Dataset
    validation: Validation
    max_steps: Positive  # attempted passes; one update every `accumulation` of them
    reference_view_idx: Views = 0  # the view that is put in; random, or one of a list: prompts move with the views
    condition_dropout: Fraction = 0.05  # chance that the label is zeroed, the condition latents, or both: each
    snr_weighting: Literal["public", "paper", "none"] = "public"
    snr_gamma: PositiveFloat = 5.0
    ema_max_decay: Fraction = 0.9999  # reached by a ramp: min(this, (1 + n) / (10 + n)) for the n-th applied update
    batch_per_rank: Positive = 4  # objects, of all their views each
    accumulation: Positive = 1
    seed: Count = 0
    precision: Precision = "bf16"
    loader_workers: Count = 4  # processes per rank
    gradient_checkpointing: bool = True
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    max_consecutive_skips: Positive = 50  # then the run stops as non-finite
    log_every_steps: Positive = 1

    def __post_init__(self) -> None:
        check_updates(self.max_steps, self.accumulation)
        if self.condition_dropout > 1 / 3:
            raise ValueError(f"`condition_dropout`: {self.condition_dropout} is the chance of each of three cases; "
                             "at most 1/3")
        if self.reference_view_idx == ():
            raise ValueError("`reference_view_idx`: the list is empty")


class Phase1Run(Strict):
    training: Training
    pretrained: DataPath  # a diffusers folder (a public one or a checkpoint of this stage); random:SEED: made here
    mode: Mode = "full"  # test: at most 600 training samples, 10,000 steps and 25 sampling steps in validation
    prompt_embeds: DataPath | None = None  # [views, L, D]; null: those in the folder, or random beside random:SEED
    model: Model = Model()
    checkpoint: Checkpoint = Checkpoint()
    wandb: Wandb = Wandb()
    resources: ResourcesOverride = ResourcesOverride()  # for launch; the job itself does not look at it

    def __post_init__(self) -> None:
        if self.mode == "test":
            validation = self.training.validation
            validation = replace(validation, steps=min(TEST_SAMPLING_STEPS, validation.steps))
            force_setattr(self, "training", replace(shortened(self.training), validation=validation))
