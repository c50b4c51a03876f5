"""What a job waits for: the jobs that `--after` names, and how it will know that they have ended."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.inventory import Node
from cluster.node import handover, waiting
from cluster.spec import After
from launcher import reconcile, ways
from launcher.errors import Refused, Wrong
from launcher.index import Index, Job
from launcher.jobs import find_all

_ANY = ":any"


@dataclass(frozen=True)
class Need:
    """A job that must have ended first. `way.carried`: only a client can see to that."""

    key: str  # of the job: its token
    label: str  # what `${label.…}` in the config calls it
    any: bool
    way: ways.Way

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Need:
        way = ways.Way(tuple(raw["way"]["peer"]), raw["way"]["carried"])
        return cls(raw["key"], raw["label"], raw["any"], way)

    def after(self, job: Job) -> After:
        return After(job.id, job.run_dir, self.any, self.label, self.way.peer)


def of_words(index: Index, words: Sequence[str], node: Node, start: Path) -> list[Need]:
    """The needs of a job on `node` with these `--after`. Raises Wrong, and Refused for one that can never be met."""
    from launcher.nodes import node_named

    needs: dict[str, Need] = {}
    for word in words:
        name, any_end = (word.removesuffix(_ANY), True) if word.endswith(_ANY) else (word, False)
        jobs = find_all(index, name)
        reconcile.refresh(index, [job for job in jobs if not job.ended], start)
        for job in jobs:
            label = name if len(jobs) == 1 and name != "@last" else job.name or job.id
            now = index.with_key(job.key) or job
            _check_possible(now, any_end, word)
            way = ways.between(node_named(job.node, start), node, f"{job.run_dir}/spec.json")
            needs[job.key] = Need(job.key, label, any_end, way)
    return list(needs.values())


def _check_possible(job: Job, any_end: bool, word: str) -> None:
    look = waiting.judge(After(job.id, job.run_dir, any_end), job.view)
    if look.verdict:
        raise Refused(f"--after {word}: it would never begin: {look.verdict.detail}",
                      hint=f"launch restart {job.id}, or --after {word}{_ANY}")


def check_carried(what: str, needs: Sequence[Need], names: dict[str, str], carry: bool) -> None:
    """Raises Refused for an edge that no machine can hold, unless this client is told to carry it.

    `names`: what the needed jobs are called, by their keys.
    """
    for need in needs:
        if need.way.carried and not carry:
            raise Refused(f"{what} cannot wait for {names[need.key]} with this computer switched off: "
                          f"{need.way.carried}",
                          hint="--follow: this computer carries it while it runs, and the next launch command goes "
                               "on with it")


def check_references(config: str | None, needs: Sequence[Need]) -> None:
    """Raises Wrong for a `${label.…}` of a job that is not waited for."""
    labels = [need.label for need in needs]
    for label, what in handover.references(config or ""):
        if label not in labels:
            raise Wrong(f"${{{label}.{what}}}: the job waits for no job called {label!r}",
                        hint=f"it waits for {', '.join(labels)}" if labels else f"add: --after {label}")
