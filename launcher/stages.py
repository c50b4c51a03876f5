"""What to run: a stage file, a run file, the --set values and a node become a JobSpec and its config."""
from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.inventory import Node
from cluster.spec import Guard, JobSpec, RestartPolicy, ResumeRule, Slurm
from launcher.errors import Wrong

if TYPE_CHECKING:
    from configs.load import Resolved, Stage

COMMAND = "command"  # the stage of `launch submit -- CMD`
PROGRESS = ("step", "total", "loss")  # what --progress says how to read
PACKAGES = ("launcher", "cluster", "jobs", "models", "configs")


@dataclass(frozen=True)
class Request:
    """What a person asked for; None means "as the stage file says". `start` is their current directory."""

    start: Path
    stage: str | None = None
    argv: tuple[str, ...] = ()  # a command instead of a stage
    node: str = "local"  # a node, a cluster, cluster:partition, N1,N2,…, any
    nodes: int | None = None  # machines that are one torchrun world
    gpus: int | None = None  # on each node
    share: bool = False  # one GPU, with other jobs that share it
    no_wait: bool = False  # refuse rather than wait
    force: bool = False  # also where there is little room
    no_check: bool = False  # nobody looks at its inputs before it starts
    config: str | None = None
    sets: tuple[str, ...] = ()
    name: str | None = None
    resume: str = "auto"  # auto | never | a job | a path
    max_restarts: int | None = None
    time_s: float | None = None
    grace_s: float | None = None
    cwd: str | None = None  # a directory of the node: nothing is copied
    progress: tuple[str, ...] = ()  # of a command: step=RE, total=RE, loss=RE
    after: tuple[str, ...] = ()  # JOB or JOB:any
    sweeps: tuple[str, ...] = ()  # a.b=v1,v2
    parallel: int | None = None  # points of a sweep at a time
    works: tuple[tuple[str, str], ...] = ()  # label -> Cost.work of the stages of a pipeline before this one


@dataclass(frozen=True)
class Plan:
    """A job before its node was asked: no id, token, code digest or config yet."""

    spec: JobSpec
    stage: Stage | None = None
    run: Resolved | None = None
    tree: Path | None = None  # what is copied; None: nothing
    only: tuple[str, ...] | None = None  # of that tree


def plan(request: Request, node: Node) -> Plan:
    """Raises ConfigError and Wrong for every mistake that can be seen from here."""
    check_request(request)
    return _plan_stage(request, node) if request.stage else _plan_command(request, node)


def check_request(request: Request) -> None:
    """Raises Wrong for words that do not go together."""
    if bool(request.stage) == bool(request.argv):
        raise Wrong("either a stage or a command after `--` is needed" if not request.stage
                    else "a stage and a command after `--` cannot be given together",
                    hint="launch submit phase3 …   or   launch submit --name X -- python train.py …")
    if request.argv and (request.config or request.sets):
        raise Wrong("--config and --set belong to a stage; a command is run as it stands")
    if request.argv and request.resume not in ("auto", "never"):
        raise Wrong("--resume belongs to a stage, whose file says how; a command is run as it stands")
    if request.stage and request.progress:
        raise Wrong("--progress belongs to a command; how a stage prints its progress its file says",
                    hint=f"progress: in configs/stages/{request.stage}.yaml")
    if request.stage and request.cwd:
        raise Wrong("--cwd belongs to a command; a stage runs in its own copy of the code")
    if request.no_wait and (request.after or request.sweeps or "," in request.node):
        raise Wrong("--no-wait is for one job on one machine, and --after, --sweep and --node N1,N2 wait for others")
    for text in (*request.argv, request.name or "", request.cwd or "", *request.sets):
        if "\0" in text or not _is_text(text):
            raise Wrong(f"{text!r} is not UTF-8 text")


def _is_text(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _plan_command(request: Request, node: Node) -> Plan:
    from cluster.node.adopt import PROGRESS as usual  # a status does without

    tree = None if request.cwd else work_tree_or(request.start)
    inside = None if tree is None or tree == request.start else request.start.relative_to(tree).as_posix()
    spec = JobSpec(
        id="", token="", stage=COMMAND, kind="command", argv=request.argv, node=node.name,
        env=dict(node.env_vars), cwd=request.cwd or inside, gpus=request.gpus or 0, gpu_share=request.share,
        nodes=request.nodes or 1, slurm=_slurm(node, {}),
        restart=RestartPolicy(request.max_restarts or 0), progress={**usual, **progress_rules(request.progress)})
    return Plan(_common(spec, request, node), tree=tree)


def progress_rules(rules: Sequence[str]) -> dict[str, str]:
    """`step=RE` … as a dictionary. Raises Wrong."""
    if not rules:
        return {}
    from configs.fields import check_pattern  # most programs do without

    found: dict[str, str] = {}
    for rule in rules:
        name, _, text = rule.partition("=")
        if name not in PROGRESS:
            raise Wrong(f"--progress {rule!r}: begins with one of {', '.join(f'{one}=' for one in PROGRESS)}")
        try:
            check_pattern(f"--progress {name}", text)
        except ValueError as error:
            raise Wrong(str(error)) from None
        found[name] = text
    return found


def _plan_stage(request: Request, node: Node) -> Plan:
    from configs.fields import parse_duration
    from configs.load import load_run

    stage = _stage_named(request.stage or "", request.start)
    run = load_run(stage, request.config, list(request.sets), request.start)
    wanted, retry = run.resources, stage.spec.restart
    share = request.share or wanted.gpus == "shared" and request.gpus is None
    gpus = request.gpus if request.gpus is not None else 1 if wanted.gpus == "shared" else wanted.gpus
    retries = retry.max_restarts if request.max_restarts is None else request.max_restarts
    spec = JobSpec(
        id="", token="", stage=stage.name, kind=stage.spec.kind, argv=stage.spec.argv, node=node.name,
        pass_config=stage.spec.passes_config(bool(run.data)), env={**node.env_vars, **stage.spec.env},
        secrets=stage.spec.secrets, gpus=gpus, gpu_share=share, procs=wanted.procs,
        nodes=request.nodes or wanted.nodes, slurm=_slurm(node, wanted.sbatch),
        time_s=parse_duration(wanted.time) if wanted.time else None,
        grace_s=stage.spec.grace_s, resume_rule=_resume_rule(stage),
        restart=RestartPolicy(retries, retry.backoff_s, retry.backoff_max_s),
        guards=_guards(stage, run, request),
        progress=dict(stage.spec.progress), preflight=None if request.no_check else stage.spec.schema)
    tree, only = code_of(stage, request.start)
    return Plan(_common(spec, request, node), stage, run, tree, only)


def _stage_named(name: str, start: Path) -> Stage:
    """Raises ConfigError, and Wrong for a program that a person took for a stage."""
    from configs.errors import ConfigError
    from configs.load import load_stage

    try:
        return load_stage(name, start)
    except ConfigError:
        if not (start / name).is_file():
            raise
        program = f"python {shlex.quote(name)}" if name.endswith(".py") else f"./{shlex.quote(name)}"
        raise Wrong(f"{name!r} is a file, not a stage",
                    hint=f"a command stands after `--`: launch submit -- {program}") from None


def _slurm(node: Node, options: dict[str, str | int | bool]) -> Slurm | None:
    """The options of the stage go over those of the cluster."""
    return Slurm(node.partition, None, {**node.sbatch, **options}) if node.via == "slurm" else None


def _common(spec: JobSpec, request: Request, node: Node) -> JobSpec:
    scheduled = node.via == "slurm"  # it says itself which GPUs a job gets
    return replace(
        spec, name=request.name, python=node.python, notify=node.notify, share=node.share, resume=request.resume,
        gpu_choice=None if node.gpus == "auto" or scheduled else tuple(node.gpus),
        time_s=spec.time_s if request.time_s is None else request.time_s,
        grace_s=spec.grace_s if request.grace_s is None else request.grace_s)


def _resume_rule(stage: Stage) -> ResumeRule:
    rule = stage.spec.resume
    return ResumeRule(rule) if isinstance(rule, str) else ResumeRule("glob", rule.glob, rule.arg, rule.verify)


def _guards(stage: Stage, run: Resolved, request: Request) -> tuple[Guard, ...]:
    """Raises ConfigError for a value to restart with that the config does not take, Wrong for one that is no scalar."""
    from configs.load import load_run, look_up

    found = []
    for rule, policy in stage.spec.guards.items():
        if isinstance(policy, str):
            found.append(Guard(rule, policy))
            continue
        for key in policy.restart_with.set:
            if not isinstance(look_up(run.data, tuple(key.split("."))), str | int | float | bool):
                raise Wrong(f"guards.{rule}: restart-with sets {key}, and its config has no such value",
                            str(stage.source), "name a key of the run file, as for --set")
        sets = [f"{key}={json.dumps(value)}" for key, value in policy.restart_with.set.items()]
        load_run(stage, request.config, [*request.sets, *sets], request.start)
        found.append(Guard(rule, "restart-with", dict(policy.restart_with.set)))
    return tuple(found)


# --- which code ---------------------------------------------------------------------------------------------

def code_of(stage: Stage, start: Path) -> tuple[Path, tuple[str, ...] | None]:
    """The tree that holds the stage's program -> (its root, which of its entries; None for all).

    Looked for around the current directory, then beside the stage file, then where launch is installed. A
    program that is in none of them (a module of the node's environment) runs beside the current work tree.
    """
    home = work_tree_or(start)
    for tree in dict.fromkeys((home, *_between(start, home), stage.source.parent.parent.parent)):
        if holds(tree, stage):
            return (tree, None) if tree != installed_root() else (tree, installed_only())
    if holds(installed_root(), stage):
        return installed_root(), installed_only()
    return home, None


def work_tree_or(start: Path) -> Path:
    from launcher import snapshot

    return snapshot.work_tree(start) or start


def installed_root() -> Path:
    return Path(__file__).resolve().parent.parent


def installed_only() -> tuple[str, ...] | None:
    """The five packages when launch lies among other installed ones; everything when in a work tree."""
    from launcher import snapshot

    return None if snapshot.work_tree(installed_root()) == installed_root() else PACKAGES


def _between(start: Path, root: Path) -> list[Path]:
    return [above for above in (start, *start.parents) if above.is_relative_to(root)]


def holds(tree: Path, stage: Stage) -> bool:
    """Whether the program of a stage is a file of `tree`. A command runs where its stage file lies."""
    if stage.spec.kind == "command":
        return tree in (stage.source.parent.parent.parent, *stage.source.parents)
    program = stage.spec.argv[0]
    if "/" in program or program.endswith(".py"):
        return (tree / program).is_file()
    module = tree.joinpath(*program.split("."))
    return module.with_name(module.name + ".py").is_file() or (module / "__init__.py").is_file()


# --- which paths --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Paths:
    """The paths of a config as they are on the node, and what the node must be asked about them."""

    values: dict[str, str]  # dotted key -> path on the node (`~` is the home there)
    from_here: dict[str, Path]  # key of a relative --set path -> the nearest thing above it that is here
    inputs: tuple[str, ...]  # dotted keys of paths that must exist
    run_file: Path | None = None

    def asked(self) -> list[str]:
        return list(dict.fromkeys([*(str(path) for path in self.from_here.values()),
                                   *(self.values[key] for key in self.inputs)]))


NO_PATHS = Paths({}, {}, ())


def check_data(run: Resolved, node: Node) -> None:
    """Raises Wrong when a path of the run file is relative and the node has no `data:`."""
    if lost := _without_place(run, node):
        raise Wrong(f"{', '.join(lost)}: relative, and the node has no `data:` directory to look in", node.name,
                    f"add `data:` to its entry in cluster.yaml, or --set {lost[0]}=/path/on/{node.name}")


def _without_place(run: Resolved, node: Node) -> list[str]:
    from configs.load import look_up

    return [key for key in run.path_keys if node.data is None and key not in run.set_path_keys
            and not look_up(run.data, tuple(key.split("."))).startswith(("/", "~"))]


def paths_of(run: Resolved, stage: Stage, node: Node, start: Path, told: bool = False) -> Paths:
    """A relative path of a run file is below the node's `data:`, one of a --set below the current directory.

    Raises Wrong when the node has no `data:`; `told`: that is known, and such paths are left out.
    """
    from configs.load import look_up

    if not told:
        check_data(run, node)
    lost = _without_place(run, node)
    values: dict[str, str] = {}
    from_here: dict[str, Path] = {}
    for key in run.path_keys:
        value = look_up(run.data, tuple(key.split(".")))
        if key in lost:
            continue
        if value.startswith(("/", "~")):
            values[key] = value
        elif key in run.set_path_keys:
            values[key] = os.path.normpath(start / value)
            from_here[key] = nearest_existing(Path(values[key]))
        else:
            values[key] = os.path.join(str(node.data), value)
    return Paths(values, from_here, tuple(values) if stage.spec.schema else (), run.source)


def nearest_existing(path: Path) -> Path:
    return next(above for above in (path, *path.parents) if above.exists())


def check_paths(paths: Paths, stats: dict[str, Any], node: Node) -> None:
    """Raises Wrong for a relative --set path that the node does not see, and for an input it has not."""
    for key, anchor in paths.from_here.items():
        check_seen(f"--set {key}", anchor, stats, node)
    for key in paths.inputs:
        if stats.get(paths.values[key]) is None:
            raise Wrong(f"{key}: there is no {paths.values[key]} on this node", node.name,
                        f"mend {paths.run_file or 'its config'}, or --set {key}=/path/on/{node.name}")


def check_seen(option: str, here: Path, stats: dict[str, Any], node: Node) -> None:
    """Raises Wrong unless the node sees the very file that is here: [inode, size, mtime_ns] are the same."""
    if node.via == "local":
        return
    info, seen = here.stat(), stats.get(str(here))
    if seen is None or list(seen) != [info.st_ino, info.st_size, info.st_mtime_ns]:
        raise Wrong(f"{option}: a relative path means your current directory; {node.name} does not see it",
                    hint=f"give the absolute path on {node.name}")


def config_text(run: Resolved, values: dict[str, str], home: str) -> str:
    """config.yaml as the job reads it: every path absolute on the node."""
    from configs.load import dump, with_values

    return dump(with_values(run.data, {key: expand(value, home) for key, value in values.items()}))


def expand(path: str, home: str) -> str:
    """`~` by the home directory on the node."""
    return home + path[1:] if path == "~" or path.startswith("~/") else path
