"""Face-voice matching as a stage: its loss over all ranks, its validation and its alarms."""
from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from configs.face_voice import Evaluation, FaceVoiceRun
from jobs import matching_report
from jobs.alarms import Alarms, NotLearning
from jobs.data.pairs import Parts, People
from jobs.data.seen_heard import Batch, Medium
from jobs.gathering import gathered
from jobs.loader import Source
from jobs.matching_report import SEEN, UNSEEN, Embedded
from jobs.metrics import Metrics
from jobs.protocols import Side
from jobs.runtime import AgreedError, JobError
from jobs.stage import Learning, Stage
from jobs.towers import Built
from jobs.world import World, mixed_seed
from models.face_voice import FaceVoice, contrast, spread

ABOUT = "face_voice.json"
_READERS = 4  # threads that read files for an evaluation
_SEEN_PEOPLE = 250  # at most, in the seen-heard test
_SPREADS = ("face_std", "face_cosine", "voice_std", "voice_cosine")


class Matcher:
    """Files to embeddings: the media, the towers (none where features are kept) and the heads."""

    def __init__(self, face: Built, voice: Built, heads: FaceVoice, faces: Medium, voices: Medium,
                 device: torch.device, bf16: bool) -> None:
        self.face, self.voice, self.heads, self.faces, self.voices = face, voice, heads, faces, voices
        self.device, self.bf16 = device, bf16

    def media(self, faces: Medium, voices: Medium) -> Matcher:
        """The same on other media."""
        return Matcher(self.face, self.voice, self.heads, faces, voices, self.device, self.bf16)

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, D] of the faces and of the voices."""
        return (self.heads.faces(self._features(self.face.tower, batch.faces, None)),
                self.heads.voices(self._features(self.voice.tower, batch.voices, batch.lengths)))

    def encode(self, paths: list[Path], face: bool) -> Tensor:
        """The towers' features [n, width], without a gradient. Raises JobError."""
        medium, built = (self.faces, self.face) if face else (self.voices, self.voice)
        with ThreadPoolExecutor(_READERS) as threads:
            items, lengths = medium.together(list(threads.map(medium.read, paths)))
        lengths = None if lengths is None else lengths.to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self._features(built.tower, items.to(self.device), lengths).float()

    def embedded(self, paths: list[Path], face: bool) -> Tensor:
        """[n, D] on the CPU, without a gradient; in eval mode."""
        if not paths:
            return torch.zeros(0, self.heads.face[-1].out_features)
        features = self.encode(paths, face)
        with torch.no_grad():
            return (self.heads.faces(features) if face else self.heads.voices(features)).cpu()

    @staticmethod
    def _features(tower: nn.Module, items: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is not None:
            return tower(items, lengths)
        return items if items.dim() == 2 else tower(items)  # features that were kept are [B, width]


def embeddings(matcher: Matcher, people: People, batch: int, world: World | None,
               stop_asked: Callable[[], bool] | None = None) -> Embedded | None:
    """Of all media of some people; divided over the ranks of `world`, or here alone. None when asked to stop."""
    sides = []
    for face in (True, False):
        media = [(path, number) for number, person in enumerate(people.persons)
                 for path in (person.faces if face else person.voices)]
        found = _table(matcher, [path for path, _ in media], face, batch, world, stop_asked)
        if found is None:
            return None
        sides.append(Side(found.numpy(), torch.tensor([number for _, number in media]).numpy()))
    genders = {number: person.gender for number, person in enumerate(people.persons) if person.gender}
    return Embedded(*sides, genders)


def _table(matcher: Matcher, paths: list[Path], face: bool, batch: int, world: World | None,
           stop_asked: Callable[[], bool] | None) -> Tensor | None:
    width = matcher.heads.face[-1].out_features
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    table = torch.zeros(len(paths), width, device=matcher.device)
    for start in range(0, len(paths), batch * ranks):
        if stop_asked and stop_asked():
            return None
        mine = slice(min(start + rank * batch, len(paths)), min(start + (rank + 1) * batch, len(paths)))
        table[mine] = _agreed(lambda mine=mine: matcher.embedded(paths[mine], face), world).to(matcher.device)
    return (world.sum(table) if world else table).cpu()


def _agreed(work: Callable[[], Tensor], world: World | None) -> Tensor:
    """A bad file of one rank ends all of them."""
    return world.all_or_none(work) if world else work()


@dataclass(frozen=True)
class Setting:
    """What the data and the towers were found to be."""

    parts: Parts
    source: Source
    evaluated: Matcher  # on the media of an evaluation
    identity: dict[str, str]  # of the towers that are in no checkpoint
    provenance: dict[str, str]


class FaceVoiceStage(Stage):
    """Pairs of faces and voices in, one space out."""

    name = "face-voice"
    scalars = ("accuracy", "scale", *_SPREADS)
    shown = ("loss", "accuracy", "scale", "gpu_gb")
    best_metric = "val/match"
    gathers = True

    def __init__(self, config: FaceVoiceRun, matcher: Matcher, setting: Setting, metrics: Metrics, world: World,
                 attachments: Path) -> None:
        self.source, self.identity, self.provenance = setting.source, setting.identity, setting.provenance
        self._config, self._matcher, self._setting = config, matcher, setting
        self._metrics, self._world = metrics, world
        towers = {"face": matcher.face.tower, "voice": matcher.voice.tower}
        trained = config.model.freeze != "all"
        self.modules = {"heads": matcher.heads, **(towers if trained else {})}
        self.frozen = {} if trained else towers
        self.attachments = attachments
        self._alarms = Alarms(config.training.guards, config.training.batch)
        self._step = 0
        self._finite: deque[tuple[list[str], Tensor]] = deque(maxlen=config.training.accumulation)

    def learning(self, name: str, parameter: nn.Parameter) -> Learning:
        """Pretrained towers have their own rate."""
        rate = None if name.startswith("heads.") else self._config.training.optimizer.towers_lr
        return Learning(rate, None if parameter.dim() >= 2 else 0.0)

    def names(self, batch: Batch) -> list[str]:
        return batch.names

    def offenders(self) -> list[str]:
        return [name for names, finite in self._finite for name, good in zip(names, finite.tolist()) if not good]

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._step = step + 1
        batch = batch.to(self._world.device)
        mine = self._matcher.embed(batch)
        self._finite.append((batch.names, torch.stack([part.detach().isfinite().all(1) for part in mine]).all(0)))
        faces, voices = (gathered(part, self._world) for part in mine)
        identities = gathered(batch.identities, self._world)
        heads = self._matcher.heads
        with torch.autocast(self._world.device.type, enabled=False):
            found = contrast(faces, voices, identities, heads.log_scale)
        with torch.no_grad():
            spreads = [value for part in (faces, voices) for value in (spread(part).std, spread(part).cosine)]
        return found.loss, {"accuracy": found.accuracy, "scale": heads.log_scale.exp(), **dict(zip(_SPREADS, spreads))}

    def after_update(self, applied: int) -> None:  # noqa: ARG002
        self._matcher.heads.clamp_scale()

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        self._tell(self._step, self._alarms.of_loss(self._step, means["loss"]))
        for what in ("face", "voice"):
            self._tell(self._step, self._alarms.of_spread(
                self._step, f"{what}s", means[f"{what}_std"], means[f"{what}_cosine"]))
        if self._world.device.type == "cuda":
            return means | {"gpu_gb": torch.cuda.max_memory_allocated(self._world.device) / 1e9}
        return means

    def evaluate(self, step: int, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        how = self._config.training.validation
        media = embeddings(self._setting.evaluated, self._setting.parts.val.at_most(how.media),
                           self._config.evaluation.batch, self._world, stop_asked)
        if media is None:
            return None
        found, match = matching_report.quick(media, how.trials, self._config.evaluation.seed)
        self._tell(step, self._alarms.of_validation(step, match.value, match.low, match.high))
        return found

    def artifacts(self, directory: Path) -> None:
        """The protocols on the test identities, and on media of trained ones that were kept back."""
        for module in (*self.modules.values(), *self.frozen.values()):
            module.eval()
        setting = self._setting
        self._metrics.say("\n" + report(setting.evaluated, setting.parts, self._config.evaluation, directory))

    def _tell(self, step: int, alarm: str | None) -> None:
        if alarm is None:
            return
        self._metrics.write(step, "alarm", alarm=alarm)
        self._metrics.say(f"ALARM at step {step}: {alarm}")
        if self._config.training.guards.stop:  # every rank has the same numbers
            raise AgreedError(NotLearning(f"step {step}: {alarm}", "training.guards.stop ends the run here"))


def report(matcher: Matcher, parts: Parts, how: Evaluation, directory: Path) -> str:
    """Evaluate, write the files and give the table. On one rank."""
    seen = People(tuple(sorted(parts.seen.persons, key=lambda one: mixed_seed(how.seed, one.name))[:_SEEN_PEOPLE]))
    groups = []
    for name, people in ((UNSEEN, parts.test), (SEEN, seen)):
        if len(people.persons) >= 2:
            media = embeddings(matcher, people.at_most(how.media), how.batch, None)
            assert media is not None
            groups.append(matching_report.evaluated(name, media, how))
    matching_report.write(directory, groups)
    return matching_report.table(groups)


def write_about(config: FaceVoiceRun, matcher: Matcher, trained: People, data: dict[str, Any], digests: dict[str, str],
                directory: Path) -> None:
    """What somebody with a checkpoint needs to know besides it."""
    directory.mkdir(exist_ok=True)
    about = {"face": matcher.face.about, "voice": matcher.voice.about, "model": msgspec.to_builtins(config.model),
             "clips": msgspec.to_builtins(config.training.clips), "precision": config.training.precision,
             "seed": config.training.seed, "data": data, "trained": sorted(trained.names), "frozen towers": digests}
    (directory / ABOUT).write_text(json.dumps(about, indent=1))


def read_about(checkpoint: Path) -> dict[str, Any]:
    """Raises JobError."""
    try:
        return json.loads((checkpoint / ABOUT).read_bytes())
    except (OSError, ValueError) as error:
        raise JobError(f"{checkpoint} is no checkpoint of face-voice: {ABOUT}: {error}",
                       "name one with --resume: a job, or its checkpoints/step-…") from None
