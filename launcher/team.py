"""Jobs on several machines that ssh reaches: all of them take part or none, and who went missing is brought back.

The supervisor of the first machine leads; the client's part is to have one started on each of the others, at a
submit and whenever one is missing (`missing` in the job's view), and to say which of them reach each other.
"""
from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.backends.base import Backend
from cluster.errors import ClusterError, Unreachable
from cluster.inventory import Node
from cluster.spec import JobSpec
from launcher import reconcile, ways
from launcher.errors import Refused
from launcher.index import Job
from launcher.jobs import from_view

JOIN_S = 60.0


def checked(spec: JobSpec, first: Node, others: Sequence[Node]) -> JobSpec:
    """The job with what its machines can do among themselves. Raises Refused: they do not see the same workdir."""
    answers = reconcile.ask_all({node.name: lambda node=node: ways.between(first, node) for node in others}, JOIN_S)
    for node in others:
        answer = answers[node.name]
        if isinstance(answer, Exception):
            raise answer
        if answer != ways.HERE:
            raise Refused(f"{node.name} does not see {first.workdir} of {first.name}", node.name,
                          "the machines of one job need one `workdir:`, on a file system that all of them see")
    return replace(spec, joins=_joins(first, others))


def _joins(first: Node, others: Sequence[Node]) -> tuple[tuple[str, ...], ...]:
    """For each machine how the others reach it; empty where they do not."""
    nodes = [first, *others]
    if not any(node.peers for node in nodes):
        return ()
    found = reconcile.ask_all({node.name: lambda node=node: _reached(node, others[0] if node is first else first)
                               for node in nodes if node.peers}, JOIN_S)
    commands = [found.get(node.name, ()) for node in nodes]
    return tuple(() if isinstance(command, Exception) else command for command in commands)


def _reached(node: Node, by: Node) -> tuple[str, ...]:
    command = ways.command_to(node)
    return () if reconcile.backend_of(by).reach(command) else command


def join(others: Sequence[Node], run_dir: str) -> None:
    """Start the supervisors of the machines after the first. Raises what the first of them said that could not."""
    answers = reconcile.ask_all({node.name: lambda node=node, number=number: _join(node, run_dir, number)
                                 for number, node in enumerate(others, 1)}, JOIN_S)
    for node in others:
        answer = answers[node.name]
        if isinstance(answer, Exception):
            raise answer


def revived(backend: Backend, answer: dict[str, Any]) -> dict[str, Any]:
    """Go on with the jobs whose machine was restarted -> its answer about all of them, as they are now.

    `revived`: their run directories; `notes`: what a person should know about it as well.
    """
    back, notes = [], []
    for view in answer["jobs"]:
        if not view.get("revivable"):
            continue
        try:
            backend.revive(view["run_dir"])
        except ClusterError as error:
            notes.append(f"{view['id']}: {error}")
        else:
            back.append(view["run_dir"])
            notes.append(f"it was restarted; {view['id']} goes on")
    now = {view["run_dir"]: view for view in backend.status(back)["jobs"]} if back else {}
    jobs = [now.get(view["run_dir"], view) for view in answer["jobs"]]
    return {**answer, "jobs": jobs, "revived": back, "notes": [*answer.get("notes", ()), *notes]}


def told_by_others(jobs: Sequence[Job], start: Path, timeout_s: float) -> list[Job]:
    """What the other machines say of jobs whose first one cannot be asked: they see the same run directory."""
    from launcher.nodes import node_named

    answers = reconcile.ask_all(
        {f"{job.key} {name}": lambda job=job, name=name: reconcile.backend_of(node_named(name, start)).status(
            [job.run_dir]) for job in jobs for name in job.view["hosts"][1:]}, timeout_s)
    found: dict[str, Job] = {}
    for job in jobs:
        for name in job.view["hosts"][1:]:
            answer = answers[f"{job.key} {name}"]
            if not isinstance(answer, Exception) and answer["jobs"]:
                found[job.key] = from_view(answer["jobs"][0], job.node, job.asked_at)
    return list(found.values())


def rejoin(jobs: Sequence[Job], revived: Container[str], start: Path, timeout_s: float) -> list[str]:
    """Bring back the machines that are missing, and all others of the jobs that were `revived` (run directories).

    -> what a person should know about it. One that is still off says nothing; the next command tries again.
    """
    from launcher.nodes import node_named

    questions: dict[str, Callable[[], dict[str, Any]]] = {}
    for job in jobs:
        hosts = list(job.view.get("hosts") or ())
        missing = hosts[1:] if job.run_dir in revived else job.view.get("missing") or ()
        for number, name in enumerate(hosts):
            if name in missing:  # those of a cluster have no hosts: its scheduler brings them back
                questions[f"{job.id}: {name}"] = lambda job=job, name=name, number=number: _join(
                    node_named(name, start), job.run_dir, number)
    notes = []
    for who, answer in reconcile.ask_all(questions, timeout_s).items():
        if not isinstance(answer, Exception):
            notes += [f"{who} takes part again"] if answer["started"] else []
        elif not isinstance(answer, Unreachable):
            notes.append(f"{who}: {answer}")
    return notes


def _join(node: Node, run_dir: str, number: int) -> dict[str, Any]:
    return reconcile.backend_of(node).join(run_dir, number)
