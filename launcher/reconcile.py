"""Brings the index up to date with the nodes: answers about jobs, and submits whose outcome was never heard.

Every node is asked once, all at the same time. What one does not say in time stays as it was, and is marked.
"""
from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import ClusterError, Unreachable
from launcher import clients
from launcher.errors import LaunchError
from launcher.index import Index, Intent, Job
from launcher.jobs import from_view

if TYPE_CHECKING:
    from cluster.backends.base import Backend
    from cluster.inventory import Node

ASK_S = 2.8  # what a person waits for who asks a node that is off, less the time to say so
MEND_S = 2.0  # for machines that are missing, when the answers have taken all the time there was
LULL_S = 0.2  # when no node has answered for so long, there is time to write down what the others said
_ASKING = "ask "  # so the names of the threads begin
_SETTLE_AFTER_S = 60.0  # a node may still be at work on a submit whose client died this recently

T = TypeVar("T")
_backends: dict[str, Backend] = {}
_connecting = threading.Lock()


@dataclass
class Refreshed:
    """What came of asking."""

    unreachable: dict[str, str] = field(default_factory=dict)  # node -> why
    notes: list[str] = field(default_factory=list)  # for a person: what was found beside the answers
    ended: list[Job] = field(default_factory=list)  # known to have ended only since this question


def ask_all(questions: Mapping[str, Callable[[], T]], timeout_s: float,
            take_in: Callable[[Mapping[str, T]], None] = lambda answers: None,
            ) -> dict[str, T | LaunchError | ClusterError]:
    """Ask every node in a thread of its own; one that takes longer than `timeout_s` counts as unreachable.

    `take_in` is given every answer once: what there is while others are awaited, and the rest at the end.
    """
    answers: queue.SimpleQueue[tuple[str, T | BaseException]] = queue.SimpleQueue()

    def ask(name: str, question: Callable[[], T]) -> None:
        try:
            answers.put((name, question()))
        except BaseException as error:  # for the asking thread, which raises what is not a plain refusal
            answers.put((name, error))

    for name, question in questions.items():
        threading.Thread(target=ask, args=(name, question), name=_ASKING + name, daemon=True).start()
    deadline = time.monotonic() + timeout_s
    found: dict[str, T | LaunchError | ClusterError] = {}
    new: dict[str, T] = {}
    while len(found) < len(questions):
        left_s = max(0.0, deadline - time.monotonic())
        try:
            name, answer = answers.get(timeout=min(left_s, LULL_S) if new else left_s)
        except queue.Empty:
            if not new or left_s <= LULL_S:
                break
            take_in(new)
            new = {}
            continue
        if isinstance(answer, (ClusterError, LaunchError)):
            found[name] = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found[name] = new[name] = answer
    if new:
        take_in(new)
    late = Unreachable(f"no answer in {round(timeout_s, 1):g} s")
    return {name: found.get(name, late) for name in questions}


def still_asking() -> bool:
    """Whether a node that did not answer in time is asked still."""
    return any(thread.name.startswith(_ASKING) for thread in threading.enumerate())


def refresh(index: Index, jobs: Iterable[Job], start: Path, until: float | None = None) -> Refreshed:
    """Ask the nodes of these jobs about them and about leftover submits; write the answers into the index.

    `until` (time.monotonic): when the answers are wanted; ASK_S from now.
    """
    until = time.monotonic() + ASK_S if until is None else until
    by_node: dict[str, list[Job]] = {}
    for job in jobs:
        by_node.setdefault(job.node, []).append(job)
    leftovers: dict[str, list[Intent]] = {}
    for intent in index.intents():
        if not _in_progress(intent):
            leftovers.setdefault(intent.node, []).append(intent)
    names = [*by_node, *(name for name in leftovers if name not in by_node)]
    result, fresh = Refreshed(), []
    if not names:
        return result

    def take_in(answers: Mapping[str, dict[str, Any]]) -> None:
        heard = [job for name, answer in answers.items()
                 for job in _heard(result, name, answer, by_node.get(name, []))]
        if here := [job for job in heard if not job.view.get("moved_to")]:
            index.put_all(here)  # at once: fifty commits would take longer than fifty questions
        fresh.extend(heard)

    questions = {
        name: _question(name, by_node.get(name, []), leftovers.get(name, []), start) for name in names}
    answers = ask_all(questions, until - time.monotonic(), take_in)
    answered = {name: answer for name, answer in answers.items() if not isinstance(answer, Exception)}
    result.unreachable = {name: str(answers[name]) for name in answers if name not in answered}
    _follow_up(index, result, fresh, [job for name in result.unreachable for job in by_node.get(name, [])],
               {run_dir for answer in answered.values() for run_dir in answer.get("revived", ())}, start, until)
    for name, answer in answered.items():
        _settle(index, result, name, answer["found"])
    return result


def _follow_up(index: Index, result: Refreshed, fresh: list[Job], blind: list[Job], revived: set[str], start: Path,
               until: float) -> None:
    """Ask further, where one answer is not all there is: of jobs that were moved, and of those on several machines.

    `fresh`: what was heard; `blind`: jobs whose node did not answer; `revived`: run directories.
    """
    if any(job.view.get("moved_to") for job in fresh):
        from launcher import move  # few jobs are

        fresh = move.followed(fresh, start, max(MEND_S, until - time.monotonic()))
        result.ended = [job for job in fresh if job.ended and job.key in {one.key for one in result.ended}]
        index.put_all(fresh)
    if team_blind := [job for job in blind if job.view.get("hosts")]:
        from launcher import team

        told = team.told_by_others(team_blind, start, max(MEND_S, until - time.monotonic()))
        index.put_all(told)
        fresh = fresh + told
    if any(job.view.get("missing") or job.run_dir in revived for job in fresh):
        from launcher import team  # most jobs run on one machine that was not restarted

        result.notes += team.rejoin(fresh, revived, start, max(MEND_S, until - time.monotonic()))


def settle_leftovers(index: Index, start: Path) -> None:
    """What every command does first: a look into the index, and a question only when a submit was cut off."""
    refresh(index, [], start)


def rescan(index: Index, start: Path, timeout_s: float = 30.0) -> Refreshed:
    """Ask every node of cluster.yaml for every run directory it has, and forget what is no longer there."""
    from launcher.nodes import load_nodes

    nodes = load_nodes(start)
    questions = {name: lambda node=node: backend_of(node).status(None) for name, node in nodes.items()}
    result = Refreshed()
    answered: dict[str, list[dict[str, Any]]] = {}
    for name, answer in ask_all(questions, timeout_s).items():
        if isinstance(answer, Exception):
            result.unreachable[name] = str(answer)
        else:
            answered[name] = answer["jobs"]
            result.notes += [f"{name}: {one['run_dir']}: {one['why']}" for one in answer["broken"]]
    index.replace_nodes(list(answered), list(_attributed(answered, nodes).values()))
    return result


def backend_of(node: Node) -> Backend:
    """The backend of a node; one connection per node and process, also when several threads ask."""
    from cluster.backends.base import backend_for

    with _connecting:
        if node.name not in _backends or _backends[node.name].node != node:
            _backends[node.name] = backend_for(node)
        return _backends[node.name]


def _question(
    name: str, jobs: list[Job], leftovers: list[Intent], start: Path,
) -> Callable[[], dict[str, Any]]:
    def ask() -> dict[str, Any]:
        from launcher.nodes import node_named

        backend = backend_of(node_named(name, start))
        answer: dict[str, Any] = {"jobs": [], "broken": []}
        found = list(zip(leftovers, backend.find([one.token for one in leftovers]))) if leftovers else []
        run_dirs = [job.run_dir for job in jobs] + [one["run_dir"] for _, one in found if one["run_dir"]]
        if run_dirs:
            answer = backend.status(run_dirs)
            if any(view.get("revivable") for view in answer["jobs"]):
                from launcher import team  # while other machines are still being asked

                answer = team.revived(backend, answer)
        return {**answer, "found": found}

    return ask


def _heard(result: Refreshed, name: str, answer: dict[str, Any], asked: list[Job]) -> list[Job]:
    now = time.time()
    fresh = [from_view(view, name, now) for view in answer["jobs"]]
    known = {job.run_dir for job in asked if not job.ended}
    result.ended += [job for job in fresh if job.ended and job.run_dir in known]
    result.notes += [f"{name}: {one['run_dir']}: {one['why']}" for one in answer["broken"]]
    result.notes += [f"{name}: {note}" for note in answer.get("notes", ())]
    if answer.get("unasked"):  # its scheduler, by the node that was asked
        result.notes.append(f"{name}: {answer['unasked']}")
    return fresh


def _settle(index: Index, result: Refreshed, name: str, found: list[tuple[Intent, dict[str, Any]]]) -> None:
    for intent, job in found:
        if job["unasked"]:
            result.notes.append(f"{name}: whether {intent.id} was started is not known yet: {job['unasked']}")
        elif job["run_dir"]:
            result.notes.append(f"{job['id']} was started on {name}; its submit was cut off")
            index.drop_intent(intent.token)
        elif time.time() - intent.created_at > _SETTLE_AFTER_S:
            index.drop_intent(intent.token)


def _in_progress(intent: Intent) -> bool:
    """Whether the client that began it is still at work; its index is on this computer, so it is too."""
    return intent.client != clients.me() and clients.alive(intent.client)


def _attributed(answered: dict[str, list[dict[str, Any]]], nodes: Mapping[str, Node]) -> dict[str, Job]:
    """Each job once, under the node to ask about it: nodes that share a file system see each other's jobs.

    That is the node it was submitted to, unless that one was asked and does not have it: then the name means
    another machine here.
    """
    now = time.time()
    has = {name: {view["run_dir"] for view in views} for name, views in answered.items()}
    jobs: dict[str, Job] = {}
    for asking, views in answered.items():
        for view in views:
            meant = view.get("node")
            mine = meant == asking and not view.get("moved_to")
            there = meant not in has or view["run_dir"] in has[meant]
            elsewhere = meant in nodes and meant != "local" and there
            job = from_view(view, meant if elsewhere and not mine else asking, now)
            if mine or job.key not in jobs:
                jobs[job.key] = job
    return jobs
