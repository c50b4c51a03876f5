"""Finding and reading stage files, run files and cluster.yaml. The API of this package.

    load_stage("phase3", Path.cwd())                              -> Stage
    load_run(stage, "demo", ["training.max_steps=50"], Path.cwd()) -> Resolved
    load_cluster(Path.cwd())                                      -> ClusterFile | None
    read_run(path, Phase3Run)                                     -> Phase3Run      (what a job does)

Every mistake in a file or a --set is a ConfigError (exit code 2).
"""
from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from configs.errors import NO_VALUE, ConfigError
from configs.fields import Resources, ResourcesOverride, Strict
from configs.keys import decode, holds_path, look_up, path_keys
from configs.places import find_cluster, upward
from configs.schema import NODE_TYPES, SCHEMAS, ClusterFile, Node, Notify, StageFile, check_node_name
from configs.sets import apply_sets, exists
from configs.yaml12 import Document, dump, parse, read

__all__ = [
    "ABSENT", "ConfigError", "Resolved", "Stage", "diff", "dump", "find_cluster", "has_key", "list_runs",
    "list_stages", "load_cluster", "load_run", "load_stage", "look_up", "read_run", "read_run_file", "resolve_text",
    "with_values",
]

S = TypeVar("S", bound=Strict)
_PACKAGED = Path(__file__).parent


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()  # in a diff: the key is not there


@dataclass(frozen=True)
class Stage:
    """A stage file, read: its name is the file's."""

    name: str
    spec: StageFile
    source: Path


@dataclass(frozen=True)
class Resolved:
    """A run file with its --set values and all defaults filled in."""

    stage: str
    data: dict[str, Any]  # JSON-like; what becomes config.yaml; without `resources`
    typed: Strict | None  # the same as its type; None for a free-form run file
    source: Path | None  # None: the stage has no run file, or it was given as text
    path_keys: tuple[str, ...]  # dotted keys that hold a path
    set_keys: tuple[str, ...]  # dotted keys that came by --set
    resources: Resources  # the stage's, with what the run file and --set changed

    @property
    def set_path_keys(self) -> tuple[str, ...]:
        """The path keys whose value came by --set: relative ones mean the person's current directory."""
        return tuple(key for key in self.path_keys
                     if any(key == given or key.startswith(f"{given}.") for given in self.set_keys))


def load_stage(name: str, start: Path) -> Stage:
    """`configs/stages/NAME.yaml` upward from `start`, else the one launch comes with. Raises ConfigError."""
    known = list_stages(start)
    if name not in known:
        raise ConfigError("there is no such stage", value=name, hint=_among("stage", name, list(known)))
    document = read(known[name])
    return Stage(name, decode(document, StageFile), known[name])


def load_run(stage: Stage, given: str | Document | None, sets: list[str], start: Path) -> Resolved:
    """A run file by name (`configs/runs/STAGE/NAME.yaml`) or path, or its content; None: the default_config."""
    document = read_run_file(stage, given, start)
    if document is None:
        if stage.spec.schema:
            raise ConfigError(f"the stage {stage.name} needs a run file", str(stage.source),
                              hint=_among("--config", "", list(list_runs(stage.name, start))))
        return _resolve(stage, Document(f"{stage.name} (no run file)", {}), sets, None, stage.spec.resources)
    return _resolve(stage, document, sets, Path(document.name), stage.spec.resources)


def read_run_file(stage: Stage, given: str | Document | None, start: Path) -> Document | None:
    """None: none is given, and the stage names no default. Raises ConfigError."""
    if isinstance(given, Document):
        return given
    name = given or stage.spec.default_config
    return None if name is None else read(_find_run(stage.name, name, start))


def has_key(stage: Stage, given: str | Document | None, key: str, start: Path) -> bool:
    """Whether `--set KEY=…` would find its key in that run file of the stage."""
    document = read_run_file(stage, given, start) or Document(stage.name, {})
    return exists(document, tuple(key.split(".")), SCHEMAS[stage.spec.schema] if stage.spec.schema else None)


def resolve_text(
    stage: Stage, text: str, where: str, sets: list[str], resources: Resources | None = None,
) -> Resolved:
    """The same for a config that is no file here (a job's config.yaml, on restart); `resources`: what it had."""
    return _resolve(stage, parse(text, where), sets, None, resources or stage.spec.resources)


def read_run(path: Path, schema: type[S]) -> S:
    """What a job reads: the file as its type. Raises ConfigError."""
    return decode(read(path), schema)


def load_cluster(start: Path) -> ClusterFile | None:
    """The cluster file that `find_cluster` names, or None when there is none. Raises ConfigError."""
    path = find_cluster(start)
    return read_cluster(path) if path else None


def read_cluster(path: Path) -> ClusterFile:
    """Raises ConfigError."""
    document = read(path)
    top = decode(document, _ClusterTop)
    ssh_config = str((path.parent / Path(top.ssh_config).expanduser()).absolute()) if top.ssh_config else None
    return ClusterFile(source=str(path), ssh_config=ssh_config, notify=top.notify,
                       nodes={name: _node(document, name) for name in top.nodes})


def list_stages(start: Path) -> dict[str, Path]:
    """All stages that can be named from here; the nearest file of a name wins."""
    return _named_files(start, Path("stages"))


def list_runs(stage: str, start: Path) -> dict[str, Path]:
    """All run files of a stage that can be named from here; the nearest file of a name wins."""
    return _named_files(start, Path("runs") / stage)


def with_values(data: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of `data` with the given dotted keys (which must exist) replaced."""
    result = copy.deepcopy(data)
    for key, value in values.items():
        *above, last = key.split(".")
        look_up(result, tuple(above))[last] = value
    return result


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs, ABSENT where one side lacks it; lists are leaves."""
    before, after = dict(_leaves(old, "")), dict(_leaves(new, ""))
    return [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in {**before, **after}
            if repr(before.get(key, ABSENT)) != repr(after.get(key, ABSENT))]


class _ClusterTop(Strict):
    ssh_config: str | None = None
    notify: tuple[Notify, ...] = ()
    nodes: dict[str, dict[str, Any]] = {}


def _node(document: Document, name: str) -> Node:
    at = ("nodes", name)
    via = look_up(document.data, (*at, "via"))
    if not isinstance(via, str) or via not in NODE_TYPES:
        what = "is missing" if via is NO_VALUE else f"must be {' or '.join(NODE_TYPES)}"
        raise ConfigError(what, document.place((*at, "via")), f"nodes.{name}.via", via,
                          "ssh: a machine that ssh reaches, slurm: a cluster, local: this computer")
    try:
        check_node_name(name, via)
    except ValueError as error:
        raise ConfigError(str(error), document.place(at), f"nodes.{name}") from None
    return decode(document, NODE_TYPES[via], at)


def _resolve(
    stage: Stage, document: Document, sets: list[str], source: Path | None, base: Resources,
) -> Resolved:
    document = copy.deepcopy(document)
    if document.data is None:
        document.data = {}
    if not isinstance(document.data, dict):
        raise ConfigError("a run file is a mapping of keys", document.name)
    schema = SCHEMAS[stage.spec.schema] if stage.spec.schema else None
    set_keys = apply_sets(document, sets, schema, stage.name)
    override = decode(document, ResourcesOverride, ("resources",))
    typed = decode(document, schema) if schema else None
    data = _plain(msgspec.to_builtins(typed)) if typed is not None else document.data
    data.pop("resources", None)
    paths = path_keys(schema, data) if schema else tuple(
        key for key in stage.spec.paths if holds_path(look_up(data, tuple(key.split(".")))))
    changed = msgspec.to_builtins(override)
    if "sbatch" in changed:
        changed["sbatch"] = {**base.sbatch, **changed["sbatch"]}
    resources = msgspec.structs.replace(base, **changed)
    return Resolved(stage.name, data, typed, source, paths, set_keys, resources)


def _find_run(stage: str, name: str, start: Path) -> Path:
    known = list_runs(stage, start)
    if found := known.get(name.removesuffix(".yaml")):
        return found
    path = start / Path(name).expanduser()
    if path.is_file():
        return path
    raise ConfigError(f"there is no such run file of the stage {stage}, nor a file of that path", value=name,
                      hint=_among("run file", name, list(known)))


def _named_files(start: Path, below: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for configs in (*(above / "configs" for above in upward(start)), _PACKAGED):
        for path in sorted((configs / below).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def _among(noun: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return (f"nearest: {close[0]}; " if close else "") + f"{noun}: {', '.join(sorted(known)) or 'none found'}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _leaves(data: Any, key: str) -> list[tuple[str, Any]]:
    if not isinstance(data, dict) or not data:
        return [(key, data)] if key else []
    return [leaf for name, item in data.items() for leaf in _leaves(item, f"{key}.{name}" if key else name)]
