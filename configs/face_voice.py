"""The run files of face-voice: matching faces and voices; and of face-voice-eval."""
from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from configs.fields import (
    Count, DataPath, Fraction, Positive, PositiveFloat, ResourcesOverride, Strict, Text, check_pattern,
)
from configs.training import AdamW, Checkpoint as AnyCheckpoint, Precision, Wandb

Share = Annotated[float, Meta(ge=0, lt=1)]


class Procedural(Strict):
    """Identities that two numbers each describe, made in the run directory: no data is needed."""

    identities: Positive = 220
    media: Annotated[int, Meta(ge=2)] = 6  # faces, and as many voices, of each
    size: Positive = 32  # px
    rate: Positive = 8000  # Hz
    seed: Count = 0


class Source(Strict):
    """One data set; which keys are given says how it lies on the disk."""

    faces: DataPath | None = None  # with `voices`: two folders, matched by the names of their files without ending
    voices: DataPath | None = None
    pairs: DataPath | None = None  # lines <face>TAB<voice>[TAB<identity>], or JSON [{face, voice, identity, gender}]
    voxceleb: DataPath | None = None  # a folder of idNNNNN/{faces,voices}/…
    identity: Text | None = None  # one group: who it is, found in a file's name below its folder; null: see docs
    genders: DataPath | None = None  # a table with tabs: identity, gender; VoxCeleb's own vox1_meta.csv is one

    def __post_init__(self) -> None:
        given = [key for key in ("faces", "pairs", "voxceleb") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"`{given[1]}`: {' and '.join(given)} are both given; set all but one to null")
        if (self.faces is None) != (self.voices is None):
            missing = "voices" if self.voices is None else "faces"
            raise ValueError(f"`{missing}`: faces and voices are given together")
        if self.identity is not None:
            check_pattern("identity", self.identity, "who it is")


class Split(Strict):
    """By identity: nobody who is seen or heard in training is in validation or test."""

    val: Share = 0.1  # of the identities
    test: Share = 0.1
    seen: Share = 0.1  # of the media of each training identity, kept back for the seen-heard test
    seed: Count = 0


class Data(Source):
    procedural: Procedural | None = None
    val: Source | None = None  # given: validation on these, and no split
    test: Source | None = None
    split: Split = Split()
    allow_overlap: bool = False  # take a validation or test set with identities that are trained on
    on_bad: Literal["error", "skip"] = "error"  # skip: bad files are counted and listed

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [key for key in ("faces", "pairs", "voxceleb", "procedural") if getattr(self, key) is not None]
        if not given:
            raise ValueError("`procedural`: one of faces and voices, pairs, voxceleb and procedural must be given")
        if len(given) > 1:
            raise ValueError(f"`{given[1]}`: {' and '.join(given)} are both given; set all but one to null")
        if (self.val is None) != (self.test is None):
            raise ValueError(f"`{'test' if self.test is None else 'val'}`: val and test are given together")
        if self.split.val + self.split.test >= 1:
            raise ValueError("`split.test`: val and test together leave no identity to train on")


class FaceTower(Strict):
    kind: Literal["vit", "tiny"] = "vit"
    path: DataPath | None = None  # a transformers folder; random:SEED: ViT-B/16 from random weights
    size: Positive = 32  # px, of the tiny one; a folder says its own
    width: Annotated[int, Meta(ge=8, multiple_of=4)] = 64  # of the tiny one

    def __post_init__(self) -> None:
        _check_path(self.kind, self.path)


class VoiceTower(Strict):
    kind: Literal["wav2vec2", "wavlm", "tiny"] = "wav2vec2"
    path: DataPath | None = None  # a transformers folder; random:SEED: the base size from random weights
    rate: Positive = 8000  # Hz, of the tiny one; a folder says its own
    width: Positive = 64  # of the tiny one

    def __post_init__(self) -> None:
        _check_path(self.kind, self.path)


def _check_path(kind: str, path: str | None) -> None:
    if kind != "tiny" and path is None:
        raise ValueError(f"`path`: the tower {kind} needs a folder of its weights (or random:SEED to try)")
    if kind == "tiny" and path is not None:
        raise ValueError("`path`: the tiny tower takes no weights from a folder")


class Model(Strict):
    face: FaceTower
    voice: VoiceTower
    freeze: Literal["all", "none", "top_k"] = "none"  # all: only the heads are trained, on features that are kept
    top_k: Positive = 2  # blocks of each tower that freeze: top_k trains
    width: Positive = 512  # of the embeddings
    dropout: Share = 0.1
    first_scale: PositiveFloat = 14.2857  # 1 / temperature; learned between 1 and 100


class Clips(Strict):
    train_s: PositiveFloat = 3.0  # drawn anew from a recording each time; freeze: all takes eval_s
    eval_s: PositiveFloat = 6.0  # from its middle
    min_s: PositiveFloat = 0.3  # shorter recordings are bad ones


class Validation(Strict):
    every_steps: Positive = 500
    media: Positive = 10  # faces and voices of one identity, at most
    trials: Positive = 2000  # of 1:2 matching


class Optimizer(AdamW):
    """Weight decay on 2-D weights only."""

    lr: PositiveFloat = 1e-3  # heads and temperature
    towers_lr: PositiveFloat = 1e-5
    beta2: Fraction = 0.98


class Schedule(Strict):
    warmup: Count = 100  # applied updates
    decay: Literal["cosine", "plateau", "constant"] = "cosine"
    plateau_factor: Annotated[float, Meta(gt=0, lt=1)] = 0.5  # of the learning rate, after
    plateau_patience: Positive = 3  # evaluations without a better one
    stop_patience: Positive | None = None  # evaluations without a better one that end the run; null: never


class Guards(Strict):
    """What is said aloud while training: a loss that stays at ln(batch), embeddings that fall into one point."""

    after: Count = 100  # steps, before which nothing is said
    chance_window: Positive = 50  # steps whose mean |loss - ln(batch)| is looked at
    chance_share: Fraction = 0.1  # of ln(batch)
    min_std: Fraction = 0.1  # of embeddings; 1: spread evenly over the sphere
    max_cosine: Fraction = 0.95  # mean of all pairs
    stop: bool = False  # end the run at an alarm


class Training(Strict):
    max_steps: Positive
    batch: Positive = 64  # pairs compared with one another, over all ranks; never changed
    accumulation: Positive = 1
    seed: Count = 0
    precision: Precision = "bf16"
    loader_workers: Count = 4  # processes per rank
    flip: bool = True  # faces mirrored, every second time
    clips: Clips = Clips()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    validation: Validation = Validation()
    guards: Guards = Guards()
    max_consecutive_skips: Positive = 20
    max_skip_ratio: Fraction = 0.2  # of all updates, once there are 50: then the run stops as non-finite
    log_every_steps: Positive = 1

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise ValueError("`batch`: one pair has nothing to be told apart from")


class Evaluation(Strict):
    """The protocols at the end, on identities never met (unseen-unheard) and on new media of trained ones."""

    media: Positive = 10  # faces and voices of one identity, at most
    trials: Positive = 10_000
    bootstrap: Annotated[int, Meta(ge=20)] = 1000  # resamplings of the identities
    batch: Positive = 64
    seed: Count = 0


class Features(Strict):
    """Where the outputs of frozen towers are kept: by the content of the file and of the tower."""

    directory: Text | None = None  # on the node, shared by runs; null: the run's own
    batch: Positive = 32


class Checkpoint(AnyCheckpoint):
    every_steps: Positive = 500


class FaceVoiceRun(Strict):
    data: Data
    model: Model
    training: Training
    evaluation: Evaluation = Evaluation()
    features: Features = Features()
    checkpoint: Checkpoint = Checkpoint()
    wandb: Wandb = Wandb()
    resources: ResourcesOverride = ResourcesOverride()  # for launch; the job itself does not look at it


class FaceVoiceEvalRun(Strict):
    """A checkpoint on the data it was split from, or on other data."""

    checkpoint: DataPath | None = None  # null: the one that --resume names
    data: Source | None = None  # null: the test identities of the training
    allow_overlap: bool = False  # take data with identities that were trained on
    evaluation: Evaluation = Evaluation()
    features: Features = Features()
    resources: ResourcesOverride = ResourcesOverride()
