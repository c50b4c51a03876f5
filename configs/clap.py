"""The run files of CLAP2Diffusion: an image from a sound, three stages over a text-to-image UNet, then its evaluation
and generation. Defaults are those of the full size, and of stage 1 where the stages differ.
"""
from __future__ import annotations

from typing import Literal

from configs.fields import (
    Count, DataPath, Fraction, Positive, PositiveFloat, ResourcesOverride, Strict, Text, Weight,
)
from configs.training import AdamW, Checkpoint, Precision, Schedule as AnySchedule, Wandb


class TinyBase(Strict):
    """A text-to-image UNet on the pixels themselves, pre-trained by the run on the data's pictures and class names."""

    channels: tuple[Positive, ...] = (32, 64)
    layers_per_block: Positive = 1
    cross_attention_dim: Positive = 32
    steps: Positive = 400
    batch: Positive = 16  # pictures per rank
    lr: PositiveFloat = 2e-3

    def __post_init__(self) -> None:
        if any(width % 16 for width in self.channels):
            raise ValueError("`channels`: must be multiples of 16")


class TinyClap(Strict):
    """A small audio tower of random weights; its outputs are centred on the data's clips."""

    rate: Positive = 16_000  # Hz
    seconds: PositiveFloat = 1.0
    width: Positive = 16
    projection: Positive = 64


class Tiny(Strict):
    """Sizes of the components that are made on the spot when `base_model` is random:SEED."""

    base: TinyBase = TinyBase()
    clap: TinyClap = TinyClap()


class ClapModel(Strict):
    image_size: Positive = 512  # px
    tokens: Positive = 8  # audio tokens
    hidden: Positive = 1024  # of the projector
    dropout: Fraction = 0.1  # of the projector
    gate: float = 0.1  # tanh(gate) at the start
    tiny: Tiny = Tiny()  # for base_model: random:SEED only

    def __post_init__(self) -> None:
        if not 0 < abs(self.gate) < 1:
            raise ValueError(f"`gate`: {self.gate} must be between 0 and 1 and not 0: at 0 only the gates have a "
                             "gradient, and a gate that stays there keeps everything from learning")


class Lora(Strict):
    """On to_k, to_q, to_v and to_out.0 of every attention."""

    rank: Positive = 8
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.1


class Optimizer(AdamW):
    lr: PositiveFloat = 1e-4
    gate_lr: PositiveFloat = 1e-2  # of the gates, which have no weight decay
    grad_clip: PositiveFloat = 0.5


class Schedule(AnySchedule):
    warmup: Count = 600


class Validation(Strict):
    """The fixed grid: the same noise at the same timesteps of every item, with its own audio, another's, and none."""

    every_steps: Positive = 500  # besides the first and the last step
    max_items: Positive | None = 256  # null: all
    timesteps: Positive = 8  # quantiles per item
    seed: Count = 0
    resamples: Positive = 2000  # of the bootstrap over items
    patience: Positive | None = None  # evaluations without a better val/score, then the run is done


class Training(Strict):
    max_steps: Positive  # attempted passes; one update every `accumulation` of them
    batch_per_rank: Positive = 4
    accumulation: Positive = 2
    seed: Count = 0
    precision: Precision = "bf16"
    loader_workers: Count = 8  # processes per rank
    gradient_checkpointing: bool = False
    prompt: Literal["empty", "text"] = "empty"  # beside the audio; text: what the metadata says
    audio_dropout: Fraction = 0.0  # chance that a sample hears nothing
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    validation: Validation = Validation()
    max_consecutive_skips: Positive = 50  # then the run stops as non-finite
    log_every_steps: Positive = 1


class _Stage(Strict):
    """What the three stages share."""

    data: DataPath  # a folder of {train,val}_metadata.json, audio/, frames/; random:SEED: the procedural set
    training: Training
    hub_cache: DataPath | None = None  # every cache of the model libraries; null: cache/ in the run's own directory
    checkpoint: Checkpoint = Checkpoint()
    wandb: Wandb = Wandb()
    resources: ResourcesOverride = ResourcesOverride()  # for launch; the job itself does not look at it


class Clap1Run(_Stage, kw_only=True):
    """Stage 1: projector, keys and values of the audio, gates."""

    # A folder in diffusers' format (unet, vae, text_encoder, tokenizer, scheduler); random:SEED: made and pre-trained
    # here; hub:OWNER/NAME: downloaded.
    base_model: DataPath
    clap_model: DataPath | None = None  # a folder in transformers' format, or hub:OWNER/NAME; null: beside random:SEED
    seconds: PositiveFloat = 10.0  # of sound that the audio tower hears
    model: ClapModel = ClapModel()

    def __post_init__(self) -> None:
        if self.base_model.startswith("random:") != (self.clap_model is None):
            raise ValueError("`clap_model`: base_model: random:SEED makes its own audio tower; every other base needs "
                             "a folder of one here")


class Clap2Run(_Stage, kw_only=True):
    """Stage 2: a LoRA too."""

    init_from: DataPath  # a checkpoint of stage 1
    force: bool = False  # begin although the one before has not learned to listen
    base_model: DataPath | None = None  # null: where that checkpoint says
    clap_model: DataPath | None = None
    lora: Lora = Lora()


class Clap3Run(_Stage, kw_only=True):
    """Stage 3: the gates alone."""

    init_from: DataPath  # a checkpoint of stage 2, with its LoRA
    force: bool = False
    base_model: DataPath | None = None
    clap_model: DataPath | None = None
    target_gate: tuple[Fraction, Fraction] | None = None  # done when the mean tanh(gate) lies in it: a value, no proof

    def __post_init__(self) -> None:
        if self.target_gate and self.target_gate[0] > self.target_gate[1]:
            raise ValueError(f"`target_gate`: {self.target_gate[0]} is above {self.target_gate[1]}")


class Sampling(Strict):
    steps: Positive = 50
    guidance: tuple[PositiveFloat, ...] = (7.5,)  # 1: none
    audio_strength: Weight = 1.0


class Bars(Strict):
    """What a good model reaches at least."""

    win_shuffled: Fraction = 0.8
    win_null: Fraction = 0.65
    accuracy: Fraction = 0.9  # of generated pictures, at the highest guidance


class ClapEvaluateRun(Strict):
    data: DataPath
    checkpoint: DataPath
    split: Text = "val"
    base_model: DataPath | None = None
    clap_model: DataPath | None = None
    hub_cache: DataPath | None = None
    image_encoder: DataPath | None = None  # a CLIP folder; null: pictures are told by the nearest class template
    grid: Validation = Validation()
    gates: tuple[Fraction, ...] = (0.0, 0.1, 0.4, 1.0)  # tanh(gate) of the sweep
    sampling: Sampling = Sampling()
    max_pictures: Positive | None = 256  # generated, per guidance; null: one per item
    batch: Positive = 8
    seed: Count = 0
    precision: Precision = "bf16"
    bars: Bars = Bars()
    resources: ResourcesOverride = ResourcesOverride()


class ClapGenerateRun(Strict):
    checkpoint: DataPath
    audio: DataPath
    prompt: str = ""
    negative_prompt: str = ""
    steps: Positive = 50
    guidance: PositiveFloat = 7.5  # 1: none
    audio_strength: Weight = 1.0
    seed: Count = 0
    base_model: DataPath | None = None
    clap_model: DataPath | None = None
    hub_cache: DataPath | None = None
    precision: Precision = "bf16"
    resources: ResourcesOverride = ResourcesOverride()
