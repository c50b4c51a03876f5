"""Pipelines: a stage file that names stages, what each waits for and what it takes from the ones before.

    about: views, then the reconstructor, then one picture through both
    pipeline:
      phase1: {gpus: 2}
      phase2: {takes: {checkpoint: "${phase1.checkpoints.best}"}}
      phase3: {takes: {data: "${phase2.artifacts.samples}"}, set: {training.max_steps: 50}}
      reconstruct: {takes: {mvdiffusion: "${phase1.checkpoints.best}", gslrm: "${phase3.checkpoints.best}"}}

A run file of a pipeline has a section per label: the name of a run file of that stage, or its values themselves.
"""
from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.fields import Count, Positive, Strict, Text, check_duration
from configs.keys import decode, nearest_hint
from configs.load import Stage, has_key, load_stage, read_run_file
from configs.schema import SCHEMAS
from configs.sets import apply_sets
from configs.yaml12 import Document, read, scalar

_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_TAKEN = re.compile(r"\$\{([^{}.]+)\.(checkpoints\.(?:last|best)|artifacts\.[^{}\n]+)\}")


class PipelineStage(Strict):
    """One entry of `pipeline:`."""

    stage: Text | None = None  # null: the one called like the label
    config: Text | None = None  # a run file of that stage; null: its default
    node: Text | None = None  # null: what `launch submit` is told
    nodes: Positive | None = None
    gpus: Count | None = None
    time: Text | None = None
    after: tuple[str, ...] | None = None  # labels; null: those it takes from, else the one before it
    any: bool = False  # it goes on however they ended
    takes: dict[str, str] = {}  # key of its config -> ${label.checkpoints.last|best} or ${label.artifacts.NAME}
    set: dict[str, Any] = {}  # key of its config -> value

    def __post_init__(self) -> None:
        check_duration("time", self.time)


@dataclass(frozen=True)
class Member:
    """One stage of a pipeline, with its run file and everything that changes it."""

    label: str
    stage: Stage
    entry: PipelineStage
    config: str | Document | None  # a name, or the values themselves
    sets: tuple[str, ...]  # as --set has them
    after: tuple[str, ...]  # labels of earlier members


def load_pipeline(stage: Stage, run: str | None, sets: list[str], start: Path) -> tuple[Member, ...]:
    """The stages of a pipeline in their order. Raises ConfigError for every mistake in its files or a --set."""
    document = read(stage.source)
    entries = _entries(document, stage)
    sections = _sections(stage, run, list(entries), start)
    stages = {label: _stage(document, label, entry, start) for label, entry in entries.items()}
    configs = {label: sections.get(label, entry.config) for label, entry in entries.items()}
    after = {label: _after(document, label, entry, list(entries)) for label, entry in entries.items()}
    own = {label: _own_sets(document, label, entry, stages[label], configs[label], start)
           for label, entry in entries.items()}
    given = _given_sets(sets, stages, configs, start)
    return tuple(Member(label, stages[label], entry, configs[label], (*own[label], *given[label]), after[label])
                 for label, entry in entries.items())


def _entries(document: Document, stage: Stage) -> dict[str, PipelineStage]:
    labels = list(stage.spec.pipeline or {})
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise ConfigError("a label is letters, digits, '_' and '-'", document.place(("pipeline", label)),
                              f"pipeline.{label}")
    return {label: decode(document, PipelineStage, ("pipeline", label)) for label in labels}


def _stage(document: Document, label: str, entry: PipelineStage, start: Path) -> Stage:
    key = ("pipeline", label, "stage") if entry.stage else ("pipeline", label)
    try:
        found = load_stage(entry.stage or label, start)
    except ConfigError as error:
        if error.where:  # a mistake in that file, not in this one
            raise
        raise ConfigError(error.what, document.place(key), ".".join(key), error.value, error.hint) from None
    if found.spec.pipeline is not None:
        raise ConfigError("a pipeline inside a pipeline", document.place(key), ".".join(key), found.name)
    return found


def _after(document: Document, label: str, entry: PipelineStage, labels: list[str]) -> tuple[str, ...]:
    before = labels[:labels.index(label)]
    taken = []
    for key, value in entry.takes.items():
        path = ("pipeline", label, "takes", key)
        match = _TAKEN.fullmatch(value)
        if match is None:
            raise ConfigError("must be ${LABEL.checkpoints.last}, ${LABEL.checkpoints.best} or "
                              "${LABEL.artifacts.NAME}", document.place(path), ".".join(path), value)
        taken.append(_earlier(document, path, match[1], label, labels))
    named = [_earlier(document, ("pipeline", label, "after", str(number)), word, label, labels)
             for number, word in enumerate(entry.after or ())]
    default = [] if entry.after is not None or taken else before[-1:]
    return tuple(dict.fromkeys([*named, *taken, *default]))


def _earlier(document: Document, path: tuple[str, ...], word: str, label: str, labels: list[str]) -> str:
    """Raises ConfigError for what is no label of this pipeline, or stands behind the one that needs it."""
    key = ".".join(path)
    if word not in labels:
        raise ConfigError(f"there is no {word!r} in this pipeline", document.place(path), key,
                          hint=nearest_hint(word, labels))
    if labels.index(word) >= labels.index(label):
        raise ConfigError(f"{word!r} stands behind {label!r}: a stage waits for those before it",
                          document.place(path), key, hint=f"move {word} up")
    return word


# --- run files and --set ------------------------------------------------------------------------------------

def _sections(stage: Stage, run: str | None, labels: list[str], start: Path) -> dict[str, str | Document]:
    """label -> the name of its run file, or its values as a document of their own."""
    document = read_run_file(stage, run, start)
    if document is None or document.data is None:
        return {}
    if not isinstance(document.data, dict):
        raise ConfigError("the run file of a pipeline is a mapping of its labels", document.name)
    found: dict[str, str | Document] = {}
    for label, section in document.data.items():
        if label not in labels:
            raise ConfigError("the pipeline has no such stage", document.place((label,)), label,
                              hint=nearest_hint(label, labels))
        if section is not None and not isinstance(section, (str, dict)):
            raise ConfigError("must be the name of a run file, or a mapping of its values", document.place((label,)),
                              label, section)
        if section is not None:
            found[label] = section if isinstance(section, str) else _part(document, label)
    return found


def _part(document: Document, label: str) -> Document:
    places = {path[1:]: where for path, where in document.places.items() if path[:1] == (label,)}
    return Document(document.name, document.data[label], places)


def _own_sets(document: Document, label: str, entry: PipelineStage, stage: Stage, config: str | Document | None,
              start: Path) -> list[str]:
    """What the pipeline file itself says of a stage's config, `takes` last. Raises ConfigError for an unknown key."""
    run = copy.deepcopy(read_run_file(stage, config, start)) or Document(stage.name, {})
    found = []
    for where, values in (("set", entry.set), ("takes", entry.takes)):
        for key, value in values.items():
            found.append(f"{key}={_as_text(value)}")
            try:
                apply_sets(run, found[-1:], SCHEMAS[stage.spec.schema] if stage.spec.schema else None, stage.name)
            except ConfigError as error:
                path = ("pipeline", label, where, key)
                raise ConfigError(f"{error.what} in a run file of {stage.name}", document.place(path),
                                  ".".join(path), value, error.hint) from None
    return found


def _as_text(value: Any) -> str:
    """A YAML value as `--set` would be given it."""
    if isinstance(value, str):
        return value if scalar(value) == value and value[:1] not in ("[", "{", "'", '"') else json.dumps(value)
    return json.dumps(value)


def _given_sets(sets: list[str], stages: dict[str, Stage], configs: dict[str, str | Document | None],
                start: Path) -> dict[str, list[str]]:
    """`--set phase3.a.b=v` is for phase3; one that names no label is for every stage that has such a key."""
    found: dict[str, list[str]] = {label: [] for label in stages}
    for argument in sets:
        key, equals, value = argument.partition("=")
        first, dot, rest = key.removeprefix("+").partition(".")
        if first in stages and dot:
            found[first].append(f"{'+' if key.startswith('+') else ''}{rest}{equals}{value}")
            continue
        having = [label for label, stage in stages.items() if has_key(stage, configs[label], key, start)]
        if not having:
            raise ConfigError("no stage of the pipeline has such a key", f"--set {argument}", key,
                              hint=f"begin with a label: --set {next(iter(stages))}.{key}=…; "
                                   f"labels: {', '.join(stages)}")
        for label in having:
            found[label].append(argument)
    return found
