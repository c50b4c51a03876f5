"""Is it learning? What a contrastive training says aloud when it is not.

A loss that stays at ln(batch) is that of guessing, however smooth its curve looks.
"""
from __future__ import annotations

import math
from collections import deque
from statistics import fmean

from configs.face_voice import Guards
from jobs.runtime import JobError

_FALLS = 0.02  # of ln(batch), from the first to the second half of the window: it is learning


class NotLearning(JobError):
    """An alarm in a run that stops at one."""

    exit_code = 3


class Alarms:
    """Each is said when it begins, and again only when all was well for a while meanwhile. Texts or None."""

    def __init__(self, guards: Guards, batch: int) -> None:
        self._guards, self._chance = guards, math.log(batch)
        self._losses: deque[float] = deque(maxlen=guards.chance_window)
        self._since: dict[str, int] = {}  # of those that were said: for how long all has been well

    def of_loss(self, step: int, loss: float) -> str | None:
        """`loss` of a step, as the ranks share it."""
        guards = self._guards
        self._losses.append(loss)
        full = len(self._losses) == guards.chance_window and step >= guards.after
        distance = fmean(abs(one - self._chance) for one in self._losses)
        stays = distance <= guards.chance_share * self._chance and not self._falls()
        return self._told("loss", full and stays,
                          f"the loss stays at ln(batch) = {self._chance:.3f}, the loss of guessing (off by "
                          f"{distance:.3f} on average in {guards.chance_window} steps): the towers may be random and "
                          "frozen, the learning rate too low, faces and voices mixed up")

    def _falls(self) -> bool:
        """A loss that comes from above passes ln(batch) on its way down."""
        losses, half = list(self._losses), len(self._losses) // 2
        return half > 0 and fmean(losses[:half]) - fmean(losses[half:]) > _FALLS * self._chance

    def of_spread(self, step: int, what: str, std: float, cosine: float) -> str | None:
        """The spread (models.face_voice.Spread) of the embeddings of a batch."""
        guards = self._guards
        fallen = std < guards.min_std or cosine > guards.max_cosine
        return self._told(what, step >= guards.after and fallen,
                          f"the embeddings of {what} have collapsed: std {std:.3f} (1 is spread evenly), mean cosine "
                          f"of all pairs {cosine:.3f}: everybody looks alike")

    def of_validation(self, step: int, value: float, low: float, high: float) -> str | None:
        """1:2 matching of people that are not trained on, with its interval."""
        return self._told("validation", step >= self._guards.after and low <= 0.5,
                          f"validation is at chance: 1:2 matching {value:.3f} ({low:.3f} .. {high:.3f}), chance 0.5")

    def _told(self, name: str, on: bool, text: str) -> str | None:
        new = on and name not in self._since
        if on:
            self._since[name] = 0
        elif name in self._since:
            self._since[name] += 1
            if self._since[name] >= self._guards.chance_window:
                del self._since[name]
        return text if new else None
