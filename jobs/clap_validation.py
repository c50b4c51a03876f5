"""Does the model listen? The fixed grid of an audio-conditioned model, and what it is held against.

For every item, at the same timesteps with the same noise: the loss with its own audio (matched), with audio of another
class (shuffled), with none (null). Averaged over timesteps even perfect conditioning gains little, because the noisy
picture itself shows what it is; so what counts is the *paired* difference per item and its bootstrap interval.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.clap import Validation
from jobs.clap_components import Loaded
from jobs.data.clips import Clips
from jobs.loader import Draw
from jobs.runtime import JobError
from jobs.world import World, mixed_seed
from models.audio_attention import gates
from models.mv_conditioning import training_target

CONDITIONS = ("matched", "shuffled", "null")


class Refused(JobError):
    """It would waste what follows; the person may insist."""

    exit_code = 4


@dataclass(frozen=True)
class Interval:
    """A mean over items, and the 5 % and 95 % quantiles of the means of resampled items."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, resamples: int, seed: int) -> Interval:
    """Of one number per item."""
    random = np.random.default_rng(mixed_seed("bootstrap", seed))
    means = values[random.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, (0.05, 0.95))
    return Interval(float(values.mean()), float(low), float(high))


def other_sounds(labels: Sequence[str | None], seed: int) -> list[int]:
    """For every item the index of one of another class; without labels a derangement: no item keeps its own.

    Raises JobError when there is none.
    """
    if len(labels) < 2:
        raise JobError("validation needs two items: a model is held against itself hearing another's sound")
    random = np.random.default_rng(mixed_seed("other sounds", seed))
    if any(label is None for label in labels):
        order = random.permutation(len(labels))
        partner = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
        return [partner[index] for index in range(len(labels))]
    found = []
    for label in labels:
        others = [index for index, other in enumerate(labels) if other != label]
        if not others:
            raise JobError(f"all items of validation are of the class {label!r}: nothing could be confused",
                           "validate on several classes, or leave the labels out")
        found.append(int(random.choice(others)))
    return found


class Grid:
    """The validation of one data set; items are divided over the ranks and summed in a fixed order."""

    def __init__(self, loaded: Loaded, clips: Clips, config: Validation, bf16: bool, world: World) -> None:
        self._loaded, self._clips, self._config, self._world = loaded, clips, config, world
        self._bf16 = bf16
        self._partners = other_sounds([clip.label for clip in clips.clips], config.seed)
        self._embeddings: Tensor | None = None

    @property
    def embeddings(self) -> Tensor:
        """[items, E] of every item's own sound; made once, each alone."""
        if self._embeddings is None:
            rows = [self._loaded.conditioning.embed(self._clips.batch([Draw(0, index)]).features)
                    for index in range(len(self._clips))]
            self._embeddings = torch.cat(rows)
        return self._embeddings

    def evaluate(self, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        """The three losses, the paired differences with their bounds, win rates, and the mean gate. None when the
        ranks were asked to stop meanwhile."""
        table = self.losses(stop_asked)
        if table is None:
            return None
        found = summary(table, self._config.resamples, self._config.seed)
        opened = gates(self._loaded.frozen.unet)
        return found | {"val/gate": sum(opened) / len(opened), "val/items": len(table)}

    @torch.no_grad()
    def losses(self, stop_asked: Callable[[], bool] | None = None) -> np.ndarray | None:
        """[items, 3] of the mean loss over the timesteps in each of CONDITIONS, the same on every rank."""
        world, count = self._world, len(self._clips)
        table = torch.zeros(count, len(CONDITIONS), dtype=torch.float64, device=world.device)
        for start in range(0, count, world.size):
            if stop_asked and stop_asked():
                return None
            if start + world.rank < count:
                table[start + world.rank] = self._item(start + world.rank)
        return world.sum(table).cpu().numpy()

    def _item(self, index: int) -> Tensor:
        """[3] float64."""
        loaded, steps = self._loaded, self._config.timesteps
        device, conditioning = self._world.device, loaded.conditioning
        scheduler, codec = loaded.frozen.scheduler, loaded.codec
        latents = codec.draw(codec.moments(self._clips.pictures([index]).to(device)), None).expand(steps, -1, -1, -1)
        generator = torch.Generator().manual_seed(
            mixed_seed("grid", self._config.seed, self._clips.clips[index].name))
        noise = torch.randn(latents.shape, generator=generator).to(device)
        highest = scheduler.config.num_train_timesteps
        t = torch.tensor([int((row + 0.5) * highest / steps) for row in range(steps)], device=device)
        noisy = scheduler.add_noise(latents, noise, t)
        target = training_target(scheduler, latents, noise, t)
        heard = self.embeddings[[index, self._partners[index], index]]
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            tokens = conditioning.tokens(heard).repeat_interleave(steps, 0)
            scale = torch.tensor([1.0, 1.0, 0.0], device=device).repeat_interleave(steps)
            text = self._clips.clips[index].text if loaded.about.prompt == "text" else ""
            arguments = conditioning.arguments(conditioning.prompts([text] * 3 * steps), tokens, scale)
            predicted = loaded.frozen.unet(noisy.repeat(3, 1, 1, 1), t.repeat(3), **arguments).sample
        errors = (predicted.float() - target.repeat(3, 1, 1, 1)).double().square().mean((1, 2, 3))
        return errors.view(3, steps).mean(1)


def summary(table: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """Of [items, 3] losses. `val/score`, higher is better, is what the best checkpoint is chosen by."""
    matched, shuffled, null = table.T
    found = {"val/score": -float(matched.mean()),
             **{f"val/{name}": float(column.mean()) for name, column in zip(CONDITIONS, table.T)}}
    for name, other in (("gap", shuffled), ("null_gap", null)):
        interval = bootstrap(other - matched, resamples, seed)
        found |= {f"val/{name}": interval.mean, f"val/{name}_low": interval.low, f"val/{name}_high": interval.high}
    return found | {"val/win": float((shuffled > matched).mean()), "val/null_win": float((null > matched).mean())}


def has_learned(found: dict[str, float]) -> bool:
    """Whether both paired differences are above 0 with their 5 % bounds."""
    return found["val/gap_low"] > 0 and found["val/null_gap_low"] > 0


def in_words(found: dict[str, float]) -> list[str]:
    """Lines for people."""
    return [f"{'above' if found[f'val/{name}_low'] > 0 else 'NOT above'} 0: {what} - matched "
            f"{found[f'val/{name}']:.5f} (5 % bound {found[f'val/{name}_low']:.5f}), win rate {found[f'val/{win}']:.2f}"
            for name, what, win in (("gap", "shuffled", "win"), ("null_gap", "null", "null_win"))]
