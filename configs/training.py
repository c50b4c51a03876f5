"""What the run files of the stages that train have in common. A stage says here only where it differs."""
from __future__ import annotations

from typing import Literal, TypeVar

from msgspec.structs import replace

from configs.fields import Count, DataPath, Fraction, Positive, PositiveFloat, Strict, Text, Weight

TEST_SAMPLES = 600
TEST_STEPS = 10_000
TEST_SAMPLING_STEPS = 25
Mode = Literal["full", "test"]
Precision = Literal["fp32", "bf16"]
Decay = Literal["cosine", "constant"]
T = TypeVar("T", bound=Strict)


class Dataset(Strict):
    path: DataPath  # a list file, one sample directory per line
    on_bad: Literal["error", "skip"] = "error"  # skip: bad samples are counted and listed
    background: tuple[Fraction, Fraction, Fraction] = (1.0, 1.0, 1.0)  # RGB behind transparent pixels
    max_samples: Positive | None = None  # spread evenly over the list; null: all


class AdamW(Strict):
    lr: PositiveFloat
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    weight_decay: Weight = 0.01
    grad_clip: PositiveFloat = 1.0  # norm
    allowed_gradnorm_factor: PositiveFloat = 1000.0  # a step whose norm exceeds grad_clip times this is skipped


class Schedule(Strict):
    """Linear warm-up, then the decay; counted in applied updates."""

    warmup: Count = 100
    decay: Decay = "cosine"


class Checkpoint(Strict):
    every_steps: Positive = 1000
    keep_last: Positive = 2


class Wandb(Strict):
    mode: Literal["off", "offline", "online"] = "off"  # online without a key becomes offline
    project: Text = "launch"


def check_updates(max_steps: int, accumulation: int) -> None:
    """Raises ValueError when that many passes make no update at all."""
    if max_steps < accumulation:
        raise ValueError(f"`accumulation`: {accumulation} passes make one update, but max_steps is "
                         f"only {max_steps}: there would be no update at all")


def shortened(training: T) -> T:
    """The `training:` of a run in test mode: at most so many training samples and steps, whatever it asks for."""
    samples = min(TEST_SAMPLES, training.dataset.max_samples or TEST_SAMPLES)
    return replace(training, dataset=replace(training.dataset, max_samples=samples),
                   max_steps=min(TEST_STEPS, training.max_steps))
