"""Jobs that this client still has to submit: the stages of a pipeline on their way, and what no machine can wait for.

Written down before the first of them is sent. A client that goes on, and every later `launch` command, submits what
can be submitted by then; a job whose wait only a client can carry goes when the other one has ended, with what it
takes over.
"""
from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, Unreachable
from cluster.inventory import Node, client_state_dir
from cluster.node import handover, waiting
from cluster.spec import After, JobSpec
from launcher import clients, reconcile
from launcher.errors import LaunchError, Refused
from launcher.groups import GroupDraft
from launcher.index import Held, Index, Intent, Job
from launcher.needs import Need
from launcher.submit import Submitted, as_job, packed, secret_values

if TYPE_CHECKING:
    from launcher.snapshot import Snapshot


@dataclass
class Advanced:
    """What came of going on: in words for a person, and as answers."""

    notes: list[str] = field(default_factory=list)
    submitted: list[Submitted] = field(default_factory=list)


def hold(index: Index, ready: GroupDraft) -> list[Held]:
    """Write down all of a group before anything of it is sent. Its code follows: what no row names, another client
    forgets.
    """
    now = time.time()
    rows = [Held(member.spec.token, position, ready.id, member.draft.node.name, str(ready.start),
                 member.spec.to_json().decode(), member.draft.config, _place_of(member.draft.code),
                 json.dumps([need.to_json() for need in member.needs]), clients.me(), now)
            for position, member in enumerate(ready.members)]
    index.hold(rows)
    with ExitStack() as undo:
        undo.callback(index.let_go, [row.token for row in rows])
        for row, member in zip(rows, ready.members):
            if row.code and member.draft.code:
                _keep(member.draft.code, Path(row.code))
        undo.pop_all()
    return rows


def _place_of(code: Snapshot | None) -> str | None:
    return None if code is None else str(client_state_dir() / "held" / f"{code.code.digest}.tar")


def _keep(code: Snapshot, path: Path) -> None:
    """The packed code as a file: the work tree may look otherwise when the job is submitted."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with packed(code) as content, open(aside, "wb") as file:
        content.seek(0)
        while block := content.read(1 << 20):
            file.write(block)
    aside.replace(path)


def send(index: Index, ready: GroupDraft) -> list[Submitted]:
    """Submit a group: what cannot be submitted yet stays held. When a node says no, what was started is ended again.

    Raises what `submit.send` raises.
    """
    tokens = [row.token for row in hold(index, ready)]
    try:
        return advance(index, tokens).submitted
    except (LaunchError, ClusterError) as error:
        index.let_go(tokens)
        begun = [job.id for token in tokens if (job := index.with_key(token))]
        if begun:
            from launcher import control

            control.kill(index, begun, None, True, ready.start)
            error.hint = "; ".join(filter(None, (error.hint, f"nothing goes on: {', '.join(begun)} ended again")))
        raise
    finally:
        _forget_code(index)


def advance(index: Index, only: Collection[str] = ()) -> Advanced:
    """Submit what can be submitted now; `only`: of these tokens, and the first LaunchError or ClusterError is raised
    instead of a note.
    """
    result = Advanced()
    rows = [row for row in index.held() if not _in_other_hands(row) and (not only or row.token in only)]
    if not rows:
        return result
    _look_at_carried(index, rows)
    for row in rows:
        if row.client != clients.me() and not index.claim(row):
            continue
        try:
            _advance_one(index, row, result)
        except (LaunchError, ClusterError) as error:
            if only:
                raise
            if not isinstance(error, Unreachable):
                index.let_go([row.token])
            result.notes.append(f"{_spec(row).id} was not submitted: {error}")
    _forget_code(index)
    return result


def names(index: Index) -> set[str]:
    """What a person may call the jobs that are held: their ids, names and groups."""
    return {name for row in index.held() for name in _names(row)}


def drop(index: Index, words: Sequence[str]) -> list[str]:
    """Give up what these words name -> the ids."""
    dropped = [row for row in index.held() if _names(row) & set(words)]
    index.let_go([row.token for row in dropped])
    _forget_code(index)
    return [_spec(row).id for row in dropped]


def _names(row: Held) -> set[str]:
    spec = _spec(row)
    return {name for name in (spec.id, spec.name, row.group) if name}


def told(index: Index) -> list[str]:
    """One line for each job that is held here."""
    lines = []
    for row in index.held():
        jobs = [index.with_key(need.key) for need in _needs(row)]
        names = ", ".join(f"{job.id} ({job.view.get('state')})" for job in jobs if job and not job.ended)
        lines.append(f"{_spec(row).id} is not submitted yet: this computer holds it"
                     + (f" until {names} has ended" if names else "") + "; any launch command goes on with it")
    return lines


def _advance_one(index: Index, row: Held, result: Advanced) -> None:
    spec, needs = _spec(row), _needs(row)
    waits_on = {one.token for one in index.held()}
    jobs: list[tuple[Need, Job]] = []
    for need in needs:
        job = index.with_key(need.key)
        if job is None and need.key in waits_on:
            return
        if job is None:
            _give_up(index, row, result, f"{need.label} was not submitted")
            return
        look = waiting.judge(After(job.id, job.run_dir, need.any), job.view)
        if need.way.carried and look.verdict:
            _give_up(index, row, result, look.verdict.detail)
            return
        if need.way.carried and look.text:
            return
        jobs.append((need, job))
    config = _carry(row, [(need, job) for need, job in jobs if need.way.carried])
    after = tuple(need.after(job) for need, job in jobs if not need.way.carried)
    result.submitted.append(_submit(index, row, replace(spec, after=after), config))


def _give_up(index: Index, row: Held, result: Advanced, why: str) -> None:
    index.let_go([row.token])
    result.notes.append(f"{_spec(row).id} was not submitted: {why}")


def _submit(index: Index, row: Held, spec: JobSpec, config: str | None) -> Submitted:
    """The same token again is the same job, so a lost answer is asked for again; the intent stays when none came."""
    from launcher.nodes import node_named

    node = node_named(row.node, Path(row.start))
    index.add_intent(Intent(spec.token, spec.id, spec.name, node.name, node.workdir, clients.me(), time.time()))
    try:
        answer = _ask_twice(row, node, spec, config)
    except Unreachable:
        raise
    except (ClusterError, LaunchError):
        index.drop_intent(spec.token)
        raise
    index.started(as_job(spec, node, answer))
    return Submitted(answer["id"], node.name, answer["run_dir"], answer.get("pid"), answer.get("attempt", 0),
                     answer.get("slurm_id"))


def _ask_twice(row: Held, node: Node, spec: JobSpec, config: str | None) -> dict[str, Any]:
    backend = reconcile.backend_of(node)
    try:
        code = open(row.code or os.devnull, "rb")
    except FileNotFoundError:  # whoever held it was cut off before that
        raise Refused("its code was not kept", hint="submit it again") from None
    with code:
        try:
            return backend.submit(spec, config, secret_values(spec), code)
        except Unreachable:
            return backend.submit(spec, config, secret_values(spec), code)


def _carry(row: Held, jobs: Sequence[tuple[Need, Job]]) -> str | None:
    """Bring what the job takes over from these to its node -> its config with the places there."""
    from launcher.nodes import node_named

    labels = {need.label: job for need, job in jobs}
    paths: dict[tuple[str, str], str] = {}
    for label, what in handover.references(row.config or ""):
        if job := labels.get(label):
            giver = reconcile.backend_of(node_named(job.node, Path(row.start)))
            taker = reconcile.backend_of(node_named(row.node, Path(row.start)))
            with tempfile.TemporaryFile() as spool:
                for header, body in giver.fetch(job.run_dir, what):
                    spool.write(json.dumps(header).encode() + b"\n" + body)
                paths[label, what] = taker.place(spool)
    return None if row.config is None else handover.filled(row.config, paths)


def _look_at_carried(index: Index, rows: Sequence[Held]) -> None:
    """The ends of jobs that only this client looks at."""
    keys = {need.key for row in rows for need in _needs(row) if need.way.carried}
    jobs = [job for key in keys if (job := index.with_key(key)) and not job.ended]
    if jobs:
        reconcile.refresh(index, jobs, Path(rows[0].start))


def _in_other_hands(row: Held) -> bool:
    return row.client != clients.me() and clients.alive(row.client)


def _spec(row: Held) -> JobSpec:
    return JobSpec.from_json(row.spec.encode())


def _needs(row: Held) -> list[Need]:
    return [Need.from_json(raw) for raw in json.loads(row.needs)]


def _forget_code(index: Index) -> None:
    kept = {row.code for row in index.held()}
    for path in (client_state_dir() / "held").glob("*.tar"):
        if str(path) not in kept:
            path.unlink(missing_ok=True)
