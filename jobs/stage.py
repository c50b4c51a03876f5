"""What a stage brings to the one training loop (jobs.trainer)."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jobs.loader import Source


@dataclass(frozen=True)
class Learning:
    """How fast a parameter learns; None: as the plan says. A rate of its own follows the same schedule."""

    lr: float | None = None
    weight_decay: float | None = None


class Stage(ABC):
    """Subclass, set the attributes, and write at least `loss`, `names` and `evaluate`.

    Nothing in a stage may draw from a live generator whose state lives longer than one call: the trainer
    seeds torch before each pass and evaluation as a function of (seed, step, rank), and that is what makes a
    resume exact.
    """

    name: str
    source: Source
    modules: dict[str, nn.Module]  # what a checkpoint holds; trained is what requires a gradient
    frozen: dict[str, nn.Module] = {}  # what is used, not trained, and in no checkpoint: it must get no gradient
    gathers = False  # `loss` has collectives: no rank may begin a pass for which another has no batch
    watches_gradients = False  # end the run when a trained tensor gets no gradient (jobs.guards)
    files: dict[str, str] = {}  # module -> its own file of a checkpoint, without ending; default: model
    attachments: Path | None = None  # a directory whose files are linked into each checkpoint
    scalars: tuple[str, ...] = ()  # what `loss` reports besides the loss, always all of them
    shown: tuple[str, ...] = ("loss",)  # on the line for people
    best_metric: str | None = None  # of `evaluate`, higher is better: that checkpoint is never pruned
    identity: dict[str, str]  # fingerprints that a resumed checkpoint must share: name -> value
    provenance: dict[str, str]  # where the inputs came from; a resume says what changed

    @abstractmethod
    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one pass (0-d) and its `scalars`."""

    @abstractmethod
    def names(self, batch: Any) -> list[str]:
        """What the samples of a batch are called, for the line about a skipped update."""

    def offenders(self) -> list[str]:
        """Of the passes of the update that was just skipped, the samples of this rank that are not finite themselves;
        none: it cannot be said, and all are named."""
        return []

    @abstractmethod
    def evaluate(self, step: int, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        """The same metrics on every rank, in eval mode and without gradients.

        `stop_asked` is a collective: all ranks call it equally often. When it says True the answer is None.
        """

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies."""
        return parameter.dim() >= 2

    def learning(self, name: str, parameter: nn.Parameter) -> Learning:
        """The rate and weight decay of a parameter; `name` begins with its module's."""
        decayed = self.decays(name.split(".", 1)[1], parameter)
        return Learning(weight_decay=None if decayed else 0.0)

    def finished(self, found: dict[str, float]) -> str | None:
        """Why the run is done after this evaluation, before its last step, or None. Asked when the plan has a
        `patience`."""
        return None

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Scalars to log, from the loss and scalars averaged over the ranks."""
        return means

    def after_update(self, applied: int) -> None:
        """Called after each applied update, as for an EMA."""

    def artifacts(self, directory: Path) -> None:
        """What the stage is for, written by rank 0 at the end."""
