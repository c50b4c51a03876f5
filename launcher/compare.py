"""What differs between jobs, and how well each did: from their configs, code, environments, inputs and metrics, as
their nodes have them.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import NO_VALUE
from configs.load import ABSENT, diff, look_up
from configs.yaml12 import parse
from launcher import compare_facts, control
from launcher.compare_code import Code, CodeDiff, Ran, code_diffs
from launcher.compare_facts import Facts
from launcher.compare_learned import BASELINES, Learned, learned
from launcher.errors import Wrong, nearest
from launcher.index import Index, Job
from launcher.jobs import JobStatus, find_all
from launcher.plots import Curve
from launcher.reconcile import ask_all
from launcher.views import point

if TYPE_CHECKING:
    from cluster.backends.base import Backend

_POINTS = 400  # of a curve
_PANELS = 6
_DRAWN = ("loss", "val/psnr", "val/loss", "psnr", "val/ssim", "val/lpips", "lr")
_ANSWER_S = 120.0  # a node that reads the metrics of many long runs
_NAMED = 12  # metrics that a message names


@dataclass(frozen=True)
class Spent:
    """What a job took; seconds, None: nobody knows. `wall`: from its first start to its end, or until now, without the
    time in which it had ended and nobody had restarted it yet."""

    wall_s: float | None = None
    gpu_s: float | None = None  # of all its attempts, each with the GPUs that it held
    parts: dict[str, float] = field(default_factory=dict)  # cluster.node.goodput

    @property
    def useful(self) -> float | None:
        """The share of the wall time in which it did steps that were kept; None: its program does not tell."""
        return min(1.0, self.parts["useful"] / self.wall_s) if "useful" in self.parts and self.wall_s else None


@dataclass(frozen=True)
class Goal:
    """A value that a metric is to reach, from below when most jobs began below it."""

    key: str
    value: float
    upwards: bool
    # Of each job: {step, value, wall_s, gpu_s} where it got there; None: never.
    cost: tuple[dict[str, Any] | None, ...]


@dataclass(frozen=True)
class Compared:
    job: JobStatus
    config: dict[str, Any]  # of the attempt that made its newest steps; empty: it has none
    learned: Learned
    code: Code = Code()
    attempts: int = 0
    curves: dict[str, Curve] = field(default_factory=dict)  # of each metric
    spent: Spent = Spent()
    environment: Facts = field(default_factory=dict)
    inputs: Facts = field(default_factory=dict)
    argv: tuple[str, ...] = ()  # of a command; a stage's is its own affair
    reached: dict[str, dict[str, Any]] = field(default_factory=dict)  # cluster.node.comparing.reached


@dataclass(frozen=True)
class Comparison:
    """`config`: dotted key -> its value in each job, of the keys that differ (ABSENT: it is not there)."""

    jobs: tuple[Compared, ...]
    config: dict[str, tuple[Any, ...]]
    code: tuple[CodeDiff, ...] = ()  # from the first job's
    goals: tuple[Goal, ...] = ()


def compare(index: Index, words: Sequence[str], start: Path,
            reach: Sequence[tuple[str, float]] = ()) -> Comparison:
    """Jobs, or all of a sweep or pipeline by its name. Raises Wrong, Unreachable."""
    found = {job.key: job for word in words for job in find_all(index, word)}
    backends = {job.node: control.node_and_backend(job, start)[1] for job in found.values()}
    answers = _ask(found, backends, reach)
    jobs = tuple(_compared(control.heard(index, found[key], answer["view"]), answer)
                 for key, answer in answers.items())
    ran = [Ran(job.id, job.run_dir, one.code, backends[job.node]) for job, one in zip(found.values(), jobs)]
    goals = tuple(_goal(jobs, key, value) for key, value in reach)
    return Comparison(jobs, differences([one.config for one in jobs]), code_diffs(ran, start), goals)


def _ask(jobs: Mapping[str, Job], backends: Mapping[str, Backend],
         reach: Sequence[tuple[str, float]]) -> dict[str, dict[str, Any]]:
    """Every node once, all at the same time -> in the order of the jobs."""
    there = {name: [job for job in jobs.values() if job.node == name] for name in backends}
    answers = ask_all({name: lambda name=name: backends[name].compare([job.run_dir for job in there[name]], _POINTS,
                                                                      reach) for name in there}, _ANSWER_S)
    by_key: dict[str, dict[str, Any]] = {}
    for name, said in answers.items():
        if isinstance(said, Exception):
            raise said
        by_key |= {job.key: one for job, one in zip(there[name], said)}
    return {key: by_key[key] for key in jobs}


def _compared(status: JobStatus, answer: Mapping[str, Any]) -> Compared:
    spec, text = answer["spec"] or {}, answer["config"] or ""
    config = parse(text, f"config.yaml of {status.id}").data if text.strip() else {}
    return Compared(
        status, config if isinstance(config, dict) else {},
        learned(answer["lines"], answer["skipped"], answer["curves"]),
        Code.of(spec, answer["code"] or {}), answer["attempts"], answer["curves"],
        Spent(answer["wall_s"], answer["gpu_s"], answer["goodput"]),
        compare_facts.environment(answer["environment"], spec),
        compare_facts.inputs(answer["inputs"], answer["provenance"], answer["began_from"]),
        tuple(spec.get("argv") or ()) if spec.get("kind") == "command" else (), answer["reached"])


def _goal(jobs: Sequence[Compared], key: str, value: float) -> Goal:
    """Raises Wrong: none of them wrote such a metric."""
    began = [one.reached[key]["first"] for one in jobs if key in one.reached]
    if not began:
        known = {name: None for one in jobs for name in one.curves}
        close = nearest(key, known)
        listed = ", ".join(list(known)[:_NAMED]) + (", …" if len(known) > _NAMED else "")
        raise Wrong(f"none of these jobs has written the metric {key!r}",
                    hint=(f"nearest: {close}; " if close else "") + f"they wrote: {listed or 'none'}")
    upwards = 2 * sum(first < value for first in began) >= len(began)
    way = "up" if upwards else "down"
    return Goal(key, value, upwards, tuple((one.reached.get(key) or {}).get(way) for one in jobs))


def panels(jobs: Sequence[Compared]) -> dict[str, dict[str, Curve]]:
    """What a drawing shows: metric -> {what a job is called: its curve}, of the metrics worth comparing."""
    found: dict[str, dict[str, Curve]] = {}
    for one in jobs:
        name = point((one.job.group or {}).get("point") or {}) or one.job.name or one.job.id
        for key, curve in one.curves.items():
            if (key.startswith("val/") or key in _DRAWN) and not key.endswith(BASELINES):
                found.setdefault(key, {})[f"{one.job.id}  {name}" if name != one.job.id else name] = curve
    order = sorted(found, key=lambda key: (_DRAWN.index(key) if key in _DRAWN else len(_DRAWN), key))
    return {key: found[key] for key in order[:_PANELS]}


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The leaves in which any two differ."""
    keys = {key: None for other in configs[1:] for key, _, _ in diff(configs[0], other)}
    return {key: tuple(_leaf(config, key) for config in configs) for key in keys}


def _leaf(config: dict[str, Any], key: str) -> Any:
    value = look_up(config, tuple(key.split(".")))
    return ABSENT if value is NO_VALUE else value
