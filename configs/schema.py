"""What a stage file, a cluster file and the parts they share may say: frozen, strict, units in the names.

msgspec decodes them: one declaration gives the type, its bounds and the refusal of unknown keys, it is C code
that imports in a few milliseconds, and it never turns "5" into 5. A value that is wrong only together with another
raises ValueError("`key`: …") in `__post_init__`; configs.keys adds file, line and value.

Run files have a schema per stage: `Phase1Run`, `Phase2Run`, …; a stage without one has a free-form run file.
"""
from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from msgspec import NODEFAULT, Meta
from msgspec.structs import fields

from configs.fields import (
    Count, Resources, ResourcesOverride, Sbatch, Strict, Text, Weight, check_pattern, check_sbatch,
    parse_duration)
from configs.clap import Clap1Run, Clap2Run, Clap3Run, ClapEvaluateRun, ClapGenerateRun
from configs.face_voice import FaceVoiceEvalRun, FaceVoiceRun
from configs.phase1 import Phase1Run
from configs.phase2 import Phase2Run
from configs.phase3 import Phase3Run
from configs.reconstruct import ReconstructRun

__all__ = [
    "NODE_TYPES", "SCHEMAS", "BaseNode", "ClusterFile", "Environment", "LocalNode", "Node", "Phase1Run", "Phase2Run",
    "Phase3Run", "ReconstructRun", "Resources", "ResourcesOverride", "Restart", "ResumeGlob", "SlurmNode", "SshNode",
    "SshOptions", "StageFile", "check_node_name", "parse_duration",
]

# What a guard may be named after: the rules of docs/doctor.md that can speak while a job runs.
RULES = ("unread", "stalled", "non-finite", "updates-skipped", "at-chance", "loss-constant", "no-gradient",
         "weights-still", "lr-stuck", "lr-end", "white-renders", "identity-copy", "views-collapsed",
         "embeddings-collapsed", "input-ignored", "no-better-than-baseline", "overfitting", "train-val-gap", "slower",
         "starved", "gpus-idle", "nothing-trained")

# By the name that a stage file gives as `schema:`.
SCHEMAS: dict[str, type[Strict]] = {
    "phase1": Phase1Run, "phase2": Phase2Run, "phase3": Phase3Run, "reconstruct": ReconstructRun,
    "face-voice": FaceVoiceRun, "face-voice-eval": FaceVoiceEvalRun,
    "clap1": Clap1Run, "clap2": Clap2Run, "clap3": Clap3Run, "clap-evaluate": ClapEvaluateRun,
    "clap-generate": ClapGenerateRun}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
Secret = Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
_NODE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


# --- stage files ------------------------------------------------------------------------------------------

class Restart(Strict):
    """When a job that failed by itself is started again; the wait before that is doubled each time."""

    max_restarts: Count = 3
    backoff_s: Weight = 10.0
    backoff_max_s: Weight = 600.0


class ResumeGlob(Strict):
    """How a program that knows nothing of launch resumes: from the newest match of `glob`, named by `arg`."""

    glob: Text
    arg: Text  # words; {path} becomes the checkpoint
    verify: str | None = None  # a command that exits 0 when the checkpoint is good; {path} becomes it

    def __post_init__(self) -> None:
        if "{path}" not in self.arg:
            raise ValueError("`arg`: must hold {path}, the place of the checkpoint's path")


class RestartWith(Strict):
    """`restart-with: {set: {training.optimizer.lr: 5e-6}}`: it goes on with other values, once per rule."""

    set: dict[str, str | int | float | bool] = {}


class RestartPolicy(Strict, rename="kebab"):
    restart_with: RestartWith


class StageFile(Strict):
    """configs/stages/NAME.yaml: what to run, with what, and how it resumes and shows its progress."""

    about: str
    torchrun: Text | None = None  # a module (jobs.phase3) or a script (train.py), started once per rank
    python: Text | None = None  # the same in one process
    command: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None  # a program and its arguments
    pipeline: dict[str, dict[str, Any] | None] | None = None  # other stages by their labels: configs.pipeline
    args: tuple[str, ...] = ()  # for torchrun and python; before the path of the resolved config
    pass_config: bool | None = None  # append that path? null: yes, unless it is a command and its config says nothing
    schema: Literal[
        "phase1", "phase2", "phase3", "reconstruct", "face-voice", "face-voice-eval",
        "clap1", "clap2", "clap3", "clap-evaluate", "clap-generate",
    ] | None = None  # null: the run file is free-form
    default_config: Text | None = None
    paths: tuple[str, ...] = ()  # free-form run files: the keys that hold paths, as a.b.c
    resources: Resources = Resources()
    env: dict[str, str] = {}
    secrets: tuple[str, ...] = ()  # names of environment variables; never their values
    grace_s: Weight | None = None  # null: 60 s, or three times the last measured save
    restart: Restart = Restart()
    resume: Literal["launch", "none"] | ResumeGlob = "none"
    guards: dict[str, Literal["log", "notify", "checkpoint-and-stop"] | RestartPolicy] = {}  # by rule, or default
    progress: dict[str, str] = {}  # step, total, loss, … : a regular expression with one group

    def __post_init__(self) -> None:
        given = [key for key in ("torchrun", "python", "command", "pipeline") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("exactly one of torchrun, python, command and pipeline must be given, here: "
                             + (" and ".join(given) or "none"))
        if self.pipeline is not None:
            self._check_pipeline()
        if self.args and self.command:
            raise ValueError("`args`: belongs to torchrun and python; put a command's arguments in its list")
        for name in self.secrets:
            if not _NAME.fullmatch(name):
                raise ValueError(f"`secrets`: {name!r} is no name of an environment variable")
        for name in self.guards:
            if name not in ("default", *RULES):
                raise ValueError(f"`guards`: no rule is called {name!r}; rules: default, {', '.join(RULES)}")
        for name, pattern in self.progress.items():
            check_pattern(f"progress.{name}", pattern)

    def _check_pipeline(self) -> None:
        """What its stages say themselves has no place beside them."""
        if not self.pipeline:
            raise ValueError("`pipeline`: names no stage")
        for name in self.__struct_fields__:
            if name not in ("about", "pipeline", "default_config") and getattr(self, name) != _PLAIN[name]:
                raise ValueError(f"`{name}`: belongs to a stage, not to a pipeline")

    @property
    def kind(self) -> Literal["torchrun", "python", "command"]:
        return "torchrun" if self.torchrun else "python" if self.python else "command"

    @property
    def argv(self) -> tuple[str, ...]:
        """Program first, without the config's path."""
        return self.command or ((self.torchrun or self.python or ""), *self.args)

    def passes_config(self, says: bool) -> bool:
        """Whether the config's path is appended. `says`: there are values in it."""
        return self.kind != "command" or says if self.pass_config is None else self.pass_config


_PLAIN = {field.name: field.default if field.default_factory is NODEFAULT else field.default_factory()
          for field in fields(StageFile)}  # what a stage file says when it does not say it


# --- cluster.yaml -----------------------------------------------------------------------------------------

class Environment(Strict):
    """One of: a conda environment by name, a venv's directory, an interpreter."""

    conda: Text | None = None
    venv: Text | None = None
    python: Text | None = None
    conda_base: Text | None = None  # null: the usual places in ~ and /opt/conda are searched

    def __post_init__(self) -> None:
        given = [key for key in ("conda", "venv", "python") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("exactly one of conda, venv and python must be given, here: "
                             + (" and ".join(given) or "none"))
        if self.conda_base and not self.conda:
            raise ValueError("`conda_base`: has a meaning only beside `conda`")


class SshOptions(Strict):
    client: Literal["fabric", "openssh"] = "fabric"  # openssh: hardware keys, Kerberos, a ControlMaster


class Notify(Strict):
    """Who is told what becomes of a job, by the job's node: one of these. A webhook is given by the NAME of a secret
    (an environment variable) that holds its address, because whoever knows the address can write there."""

    slack: Secret | None = None
    discord: Secret | None = None
    webhook: Secret | None = None  # gets a JSON object
    command: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None  # gets the same on stdin
    on: Annotated[tuple[Literal["end", "failure", "stall", "finding"], ...], Meta(min_length=1)] = (
        "end", "failure", "stall", "finding")

    def __post_init__(self) -> None:
        given = [key for key in ("slack", "discord", "webhook", "command") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("exactly one of slack, discord, webhook and command must be given, here: "
                             + (" and ".join(given) or "none"))

    @property
    def kind(self) -> str:
        return next(key for key in ("slack", "discord", "webhook", "command") if getattr(self, key) is not None)


class BaseNode(Strict):
    """What every node has. Paths are paths on the node; `~` is the home there."""

    workdir: Text | None = None  # runs/ and .launch/ are made in it; null: ~/launch
    env: Environment | None = None  # null: the first python3 on the node's PATH (local: this Python)
    gpus: Literal["auto"] | tuple[Count, ...] = "auto"
    data: Text | None = None  # relative paths in run files are below it
    agent_python: Text | None = None  # the Python >= 3.10 of the supervisor; null: found
    share: Literal["private", "group"] = "private"
    env_vars: dict[str, str] = {}
    notify: tuple[Notify, ...] | None = None  # null: as the whole file says


class LocalNode(BaseNode, tag_field="via", tag="local"):
    """This computer."""


class SshNode(BaseNode, tag_field="via", tag="ssh"):
    """A machine that `ssh HOST` reaches."""

    host: Text | None = None  # a name for ssh; null: the node's name
    ssh: SshOptions = SshOptions()
    peers: bool = False  # other nodes reach it by `ssh -o BatchMode=yes`


class SlurmNode(BaseNode, tag_field="via", tag="slurm"):
    """A SLURM cluster, or a part of it."""

    login: Text = "here"  # where sbatch runs: a name for ssh, or here
    partition: Text | None = None
    sbatch: Sbatch = {}  # for every job there; those of a stage go over these
    ssh: SshOptions = SshOptions()
    peers: bool = False

    def __post_init__(self) -> None:
        check_sbatch(self.sbatch)


Node = LocalNode | SshNode | SlurmNode
NODE_TYPES: dict[str, type[LocalNode] | type[SshNode] | type[SlurmNode]] = {
    "local": LocalNode, "ssh": SshNode, "slurm": SlurmNode}


class ClusterFile(Strict):
    """cluster.yaml. `source` is the file it was read from, `ssh_config` an absolute path (`~` expanded)."""

    source: str
    ssh_config: str | None = None
    notify: tuple[Notify, ...] = ()  # of jobs on every node, `local` too
    nodes: dict[str, Node] = {}


def check_node_name(name: str, via: str) -> None:
    """Raises ValueError for a name that the command line could not tell apart."""
    if not _NODE_NAME.fullmatch(name):
        raise ValueError("a node's name is letters, digits, '.', '_' and '-'")
    if name in ("any", "here"):
        raise ValueError(f"{name!r} has a meaning of its own and cannot name a node")
    if name == "local" and via != "local":
        raise ValueError("`local` is always this computer; give the other machine another name")
