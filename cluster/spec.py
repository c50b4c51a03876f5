"""JobSpec: everything that defines a job, as one frozen value with one canonical JSON form. Standard library only."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

SPEC_VERSION = 1

Kind = Literal["torchrun", "python", "command"]


class BadSpec(ValueError):
    """A spec.json that this version of launch cannot read; the message says which field."""


@dataclass(frozen=True)
class RestartPolicy:
    """When a job that failed by itself is started again."""

    max_restarts: int = 3
    backoff_s: float = 10.0  # before the first retry; doubles with each one
    backoff_max_s: float = 600.0


@dataclass(frozen=True)
class ResumeRule:
    """How a restart finds what to resume from.

    launch: our verified checkpoints, by LAUNCH_RESUME. none: always from the start. glob: the newest file or directory
    that matches `glob` (relative to `cwd`, or to the run directory's code/), named to the program by `arg`
    (`--resume_from_checkpoint {path}`, split into words before {path} is filled in); `verify` is an optional command.
    """

    kind: Literal["launch", "none", "glob"] = "none"
    glob: str | None = None
    arg: str | None = None
    verify: str | None = None


@dataclass(frozen=True)
class PythonEnv:
    """The environment a job runs in. `kind` conda: `value` is its name; venv: its directory; python: the interpreter;
    system: the first `python3` on the node's PATH."""

    kind: Literal["conda", "venv", "python", "system"] = "system"
    value: str = ""
    conda_base: str | None = None


@dataclass(frozen=True)
class CodeRef:
    """Which code a job runs: the digest of its snapshot, or (with --cwd) what was found in that directory."""

    digest: str | None = None  # None: nothing was packed
    git_sha: str | None = None
    dirty: bool = False
    untracked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slurm:
    """How SLURM is to run a job. `options` are sbatch's by their long names, the stage's over the node's; what launch
    itself asks for (nodes, gres, time, signal, …) is added when the job is submitted, unless it is given here."""

    partition: str | None = None
    nodelist: str | None = None  # the job was aimed at this machine
    options: dict[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class After:
    """A job that must have ended before this one starts. `label` is what `${label.…}` in the config calls it."""

    id: str
    run_dir: str  # on the node that has it
    any: bool = False  # however it ended; else only once it completed
    label: str = ""
    peer: tuple[str, ...] = ()  # the command that asks that node's agent from here; empty: run_dir is seen here


@dataclass(frozen=True)
class Group:
    """The sweep or pipeline that a job is one of."""

    id: str  # what a person calls all of it
    kind: Literal["sweep", "pipeline"]
    member: str  # the number of a sweep's point, the label of a pipeline's stage
    size: int
    position: int = 0  # of `size`, in its order
    parallel: int = 0  # so many points at a time; 0: all
    point: dict[str, str] = field(default_factory=dict)  # dotted key -> value, as it was typed


@dataclass(frozen=True)
class Cost:
    """How much there is to do, so that what was measured says how long it takes: cluster/node/measured.py."""

    work: str  # fingerprint of all that decides how long a step takes, but for the machine
    steps: int | None = None  # passes or samples; None: nobody can say yet
    evaluations: int = 0
    val_samples: int | None = None  # in each of them
    checkpoints: int = 0  # on the disk at a time
    growing: bool = False  # the artifacts grow with the steps
    calibration: bool = False  # it runs only to be measured, and is removed then


@dataclass(frozen=True)
class Guard:
    """What follows when a rule of `launch doctor` finds something while the job runs. `set`: dotted keys of its config,
    with the values that restart-with starts it anew with."""

    rule: str  # default: every rule that has none of its own
    policy: Literal["log", "notify", "checkpoint-and-stop", "restart-with"] = "notify"
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tell:
    """Who is told by the node what becomes of a job. The address of a webhook is a secret; here is its name."""

    kind: Literal["slack", "discord", "webhook", "command"]
    secret: str = ""
    command: tuple[str, ...] = ()  # gets one JSON object on stdin
    on: tuple[str, ...] = ("end", "failure", "stall", "finding")


@dataclass(frozen=True)
class JobSpec:
    """One job. `argv` is a list until the very last moment; nothing in it is ever interpreted.

    torchrun: argv is `[module-or-script, arg…]`, started once per rank; python: the same in one process;
    command: the program and its arguments. With `pass_config` the path of the resolved config.yaml is appended.
    """

    id: str
    token: str
    stage: str  # "command" for `launch submit -- CMD`
    kind: Kind
    argv: tuple[str, ...]
    node: str
    name: str | None = None
    pass_config: bool = False
    env: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()  # names only; values are in <workdir>/.launch/secrets.env on the node
    python: PythonEnv = PythonEnv()
    cwd: str | None = None  # None: the snapshot in code/; relative: a directory of it
    nodes: int = 1  # machines that are one torchrun world
    hosts: tuple[str, ...] = ()  # their names in cluster.yaml, `node` first; SLURM chooses its own
    joins: tuple[tuple[str, ...], ...] = ()  # for each of `hosts`: how the others reach its agent; empty: they cannot
    slurm: Slurm | None = None  # None: no scheduler
    after: tuple[After, ...] = ()
    group: Group | None = None
    gpus: int = 0  # on each node
    gpu_choice: tuple[int, ...] | None = None  # indices the node's entry in cluster.yaml allows; None: all
    gpu_share: bool = False  # its one GPU may be that of other jobs which share too
    procs: int = 1  # ranks on each node when gpus is 0
    time_s: float | None = None  # SLURM: of one allocation, the job goes on in the next; elsewhere: of the job
    grace_s: float | None = None  # None: max(60, 3x the last measured save)
    resume: str = "auto"  # auto | never | absolute path on the node
    resume_rule: ResumeRule = ResumeRule()
    restart: RestartPolicy = RestartPolicy()
    progress: dict[str, str] = field(default_factory=dict)  # name -> regular expression with one group
    share: Literal["private", "group"] = "private"
    guards: tuple[Guard, ...] = ()
    notify: tuple[Tell, ...] = ()
    cost: Cost | None = None  # None: nobody can say
    preflight: str | None = None  # the schema of its run file, which `jobs.preflight` knows; None: nothing to look at
    code: CodeRef = CodeRef()
    config_digest: str | None = None
    submitted_at: float = 0.0  # unix seconds
    submitted_by: str = ""  # user@host
    version: int = SPEC_VERSION

    @property
    def place(self) -> str:
        """Where it goes, as a person says it: gpu05; gpu01,gpu02; lab:low."""
        where = self.slurm and (self.slurm.nodelist or self.slurm.partition)
        return ",".join(self.hosts) or (f"{self.node}:{where}" if where else self.node)

    @property
    def ranks(self) -> int:
        """Processes that count as ranks on one node."""
        return (self.gpus or self.procs) if self.kind == "torchrun" else 1

    @property
    def world(self) -> int:
        """Ranks on all nodes together."""
        return self.ranks * self.nodes

    def host(self, node: int) -> str:
        """What cluster.yaml calls its node `node`."""
        return self.hosts[node] if self.hosts else self.node

    def token_on(self, node: int) -> str:
        """LAUNCH_TOKEN of the processes on node `node`: what is left there is ended without those of the others."""
        return f"{self.token}.{node}" if node else self.token

    def to_json(self) -> bytes:
        """Canonical: sorted keys, no spaces that vary, ASCII (arguments need not be valid UTF-8). The same spec is
        always the same bytes."""
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, raw: bytes) -> JobSpec:
        """Raises BadSpec: not JSON, another version, an unknown or missing field."""
        try:
            value = json.loads(raw)
        except ValueError as error:
            raise BadSpec(f"not JSON: {error}") from None
        if not isinstance(value, dict) or value.get("version") != SPEC_VERSION:
            raise BadSpec(f"spec version {value.get('version') if isinstance(value, dict) else '?'}, "
                          f"this launch reads version {SPEC_VERSION}")
        return _build(cls, value)


def digest(content: bytes) -> str:
    import hashlib  # loads OpenSSL; a node never needs it

    return hashlib.sha256(content).hexdigest()


def _build(cls: type, value: dict[str, Any]) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(value) - known):
        raise BadSpec(f"unknown field {unknown[0]!r} in {cls.__name__}")
    try:
        return cls(**{name: _convert(name, item) for name, item in value.items()})
    except TypeError as error:
        raise BadSpec(f"{cls.__name__}: {error}") from None


def _convert(name: str, value: Any) -> Any:
    part = _PARTS.get(name)
    if part is None or value is None:
        return _tuples(value)
    return tuple(_build(part, item) for item in value) if isinstance(value, list) else _build(part, value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_PARTS: dict[str, type] = {
    "python": PythonEnv, "resume_rule": ResumeRule, "restart": RestartPolicy, "code": CodeRef, "slurm": Slurm,
    "after": After, "group": Group, "cost": Cost, "guards": Guard,
    "notify": Tell,
}
