"""What the verbs of `launch` do, as typed functions for programs. A verb is parse, one of these, and a view.

    from launcher import api
    from launcher.stages import Request
    [job] = api.submit(Request(Path.cwd(), stage="phase3", config="demo"))
    [ended] = api.wait([job.id])

A job is named by its id, a unique beginning of it, its name, or `@last`. Everything raises LaunchError,
ClusterError or ConfigError, each with an `exit_code`; nothing here prints or ends the process. `start` is the
directory that relative paths, configs/ and the code to copy are looked for in: the current one if not given.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.index import open_index
from launcher.jobs import JobStatus, find, status_of
from launcher.reconcile import ASK_S, rescan, settle_leftovers
from launcher.status import Statuses, status as _status

if TYPE_CHECKING:
    from launcher.adopt import Adopted
    from launcher.again import Again
    from launcher.census import NodeReport
    from launcher.check import Checked
    from launcher.check_groups import CheckedGroup
    from launcher.compare import Comparison
    from launcher.control import Killed
    from launcher.doctor import Diagnosis
    from launcher.groups import GroupDraft
    from launcher.index import Index
    from launcher.init import Initialised
    from launcher.logs import LogReader, Which
    from launcher.prune import Pruned
    from launcher.pull import Progress, Pulled
    from launcher.restart import Restarted, RestartPlan
    from launcher.stages import Request
    from launcher.submit import Draft, Submitted

__all__ = ["Details", "JobStatus", "Statuses", "adopt", "advance", "check", "command_lines", "compare", "diagnose",
           "draft", "kill", "known", "logs", "pending", "plan_restart", "prune", "pull", "remember", "report",
           "restart", "send", "send_group", "show", "status", "submit", "wait", "with_token"]


@dataclass(frozen=True)
class Details:
    """Everything known about one job. The dictionaries are the node's own records."""

    status: JobStatus
    spec: dict[str, Any] | None  # None: started by hand
    config: str | None
    attempts: list[dict[str, Any]]
    events: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    skipped_lines: int  # of the journals, that could not be read
    code: dict[str, Any]  # git_sha, dirty, untracked, patch: of the snapshot, or of the directory of --cwd
    inputs: list[dict[str, Any]]  # what it took over from other jobs: reference, path, fingerprint, job, step
    config_of: int | None = None  # the attempt that ran with `config` and made the newest steps; None: the newest


def draft(request: Request, carry: bool = False) -> Draft | GroupDraft:
    """Resolve and check a submit, asking its nodes, without starting anything (`--dry-run`).

    A sweep or a pipeline is a GroupDraft. `carry`: this client will see to what no machine can wait for (`follow`).
    """
    from launcher import groups

    with open_index() as index:
        settle_leftovers(index, request.start)
        return groups.draft_any(index, request, carry)


def command_lines(ready: Draft) -> list[list[str]]:
    """What a drafted job would run on its node."""
    from launcher.reconcile import backend_of

    return backend_of(ready.node).render(ready.spec)


def send(ready: Draft) -> Submitted:
    """Start a drafted job. Returns when its supervisor lives; Unreachable: see `launcher.submit.send`."""
    from launcher import submit as submitting

    with open_index() as index:
        return submitting.send(index, ready)


def send_group(ready: GroupDraft) -> list[Submitted]:
    """Start a sweep or a pipeline: all of it or none. -> those that are submitted now, in the order of the group."""
    from launcher import groups, held

    with open_index() as index:
        return groups.send_sweep(index, ready) if ready.kind == "sweep" else held.send(index, ready)


def submit(request: Request) -> list[Submitted]:
    """Start a stage or a command; a sweep or a pipeline is several jobs."""
    ready = draft(request)
    return [send(ready)] if hasattr(ready, "spec") else send_group(ready)


def advance() -> list[str]:
    """Go on with what an earlier command began and this computer still has to submit -> words about it."""
    with open_index() as index:
        submitted, notes = _advance(index)
        return [*submitted, *notes]


def _advance(index: Index) -> tuple[list[str], list[str]]:
    if not index.held():
        return [], []
    from launcher import held

    result = held.advance(index)
    return [f"{one.id} is submitted to {one.node} now" for one in result.submitted], result.notes


def pending(group: str) -> list[str]:
    """Tokens of the jobs of a group that are not submitted yet."""
    with open_index() as index:
        return [row.token for row in index.held() if row.group == group]


def with_token(token: str) -> JobStatus | None:
    """A job by what it is for certain, once it is submitted."""
    with open_index() as index:
        job = index.with_key(token)
        return status_of(job) if job else None


def status(jobs: Sequence[str] = (), *, all_jobs: bool = False, ask_all_nodes: bool = False,
           keep: Sequence[str] = (), start: Path | None = None, timeout_s: float = ASK_S) -> Statuses:
    """Jobs not known to have ended and those that just did; `all_jobs`: ended ones too; or just these `jobs`.

    `ask_all_nodes` first asks every node of cluster.yaml for every run directory it has (`--rescan`).
    `keep`: ids of ended jobs to show as well.
    """
    until = time.monotonic() + timeout_s
    with open_index() as index:
        start = start or Path.cwd()
        found = rescan(index, start) if ask_all_nodes or index.incomplete else None
        if found:
            index.complete()
        return _status(index, jobs, all_jobs, start, until, keep, found)


def logs(job: str, which: Which, *, tell: Callable[[str], None] = lambda text: None,
         start: Path | None = None) -> LogReader:
    """A reader of a job's logs: iterate over it; with `which.follow` it ends when the job has ended."""
    from launcher.control import node_and_backend
    from launcher.logs import LogReader

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        found = find(index, job)
    return LogReader(node_and_backend(found, start)[1], found.run_dir, which, tell)


def kill(jobs: Sequence[str], *, grace_s: float | None = None, now: bool = False,
         start: Path | None = None) -> list[Killed]:
    """Let jobs write a checkpoint, stop them, and verify that nothing of them is left."""
    from launcher import control

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        return control.kill(index, jobs, grace_s, now, start)


def plan_restart(job: str, *, sets: Sequence[str] = (), fresh_code: bool = False, node: str | None = None,
                 gpus: int | None = None, time_s: float | None = None, command: Sequence[str] = (),
                 anew: bool = False, start: Path | None = None) -> Again:
    """What a restart with these changes would be, without doing it: of a job with what follows from it, or a group.
    `anew`: not from its checkpoints."""
    from launcher import again
    from launcher.restart import Elsewhere

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        return again.plan(index, job, sets, fresh_code, start, Elsewhere(node, gpus, time_s), command, anew)


def restart(plan: RestartPlan, *, grace_s: float | None = None,
            progress: Progress = lambda here, total, path: None) -> Restarted:
    """Carry out one planned restart; returns when the next attempt has begun. `grace_s`: to save what runs."""
    from launcher import restart as restarting

    with open_index() as index:
        return restarting.restart(index, plan, grace_s, progress)


def wait(jobs: Sequence[str], *, tell: Callable[[str], None] = lambda text: None,
         start: Path | None = None) -> list[JobStatus]:
    """Block until all of these jobs have ended -> their last states, in the order given.

    What this computer holds until some of them have ended is submitted then, with a word to `tell`.
    """
    from launcher import control

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        while True:
            ended = control.wait(index, jobs, start)
            submitted, notes = _advance(index)
            for text in [*submitted, *notes]:
                tell(text)
            if not submitted:
                return ended


def show(job: str, *, start: Path | None = None) -> Details:
    """Everything its node knows about a job."""
    from launcher import control
    from launcher.past_configs import told_config, with_changes

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        found = find(index, job)
        shown = control.node_and_backend(found, start)[1].show(found.run_dir)
        now = control.heard(index, found, shown["view"])
    recorded = (shown["spec"] or {}).get("code") or {}
    config, config_of = told_config(shown)
    return Details(now, shown["spec"], config, with_changes(shown["attempts"], shown["configs"]), shown["events"],
                   shown["checkpoints"], shown["skipped_lines"], {**recorded, **(shown.get("code") or {})},
                   shown.get("inputs") or [], config_of)


def pull(job: str, pattern: str | None = None, *, out: Path | None = None, force: bool = False,
         tell: Callable[[str], None] = lambda text: None, progress: Progress = lambda here, total, path: None,
         start: Path | None = None) -> Pulled:
    """Fetch a job's artifacts, or the files of its run directory that fit a pattern, and verify each.

    Into `out`, where files that differ are left alone unless `force`; else into a directory of the job's name.
    """
    from launcher import pull as pulling
    from launcher.control import node_and_backend

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        found = find(index, job)
    return pulling.pull(node_and_backend(found, start)[1], found, pattern, out, force, start, tell, progress)


def prune(jobs: Sequence[str] = (), *, keep_last: int = 1, dry_run: bool = False,
          start: Path | None = None) -> list[Pruned]:
    """Remove old checkpoints of these jobs, or of all that have ended; `dry_run`: only say which."""
    from launcher import prune as pruning

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        return pruning.prune(index, jobs, keep_last, dry_run, start)


def compare(jobs: Sequence[str], *, reach: Sequence[tuple[str, float]] = (),
            start: Path | None = None) -> Comparison:
    """How configs, code, environments and inputs of jobs differ, what each has learned and what it took.

    A sweep's name means all of its points. `reach`: (metric, value) whose cost is wanted.
    """
    from launcher import compare as comparing

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        return comparing.compare(index, jobs, start, reach)


def check(request: Request, *, deep: bool = True) -> Checked | CheckedGroup:
    """What is wrong with a job, or with each of a pipeline or a sweep, before it is started; `deep`: its own Python is
    asked too. Nothing is started."""
    from launcher import check_groups

    with open_index() as index:
        settle_leftovers(index, request.start)
        return check_groups.check_any(index, request, deep)


def diagnose(job: str, *, points: int = 0, start: Path | None = None) -> Diagnosis:
    """What is wrong with a job: findings with numbers, cause and fix, and its curves of so many points at most."""
    from launcher import doctor

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        return doctor.diagnose(index, job, start, points)


def report(job: str, *, out: Path | None = None, start: Path | None = None) -> Path:
    """Write one self-contained HTML page about a job, as `out` or `<job id>.html` in `start` -> its path."""
    from launcher import report as reporting

    return reporting.write(job, out, start or Path.cwd())


def remember(job: str, view: dict[str, Any]) -> JobStatus:
    """Put a node's last word about a job (the end of a followed log) into the index."""
    from launcher import control

    with open_index() as index:
        return control.heard(index, find(index, job), view)


def adopt(process: str, *, name: str | None = None, log: str | None = None, progress: Sequence[str] = (),
          start: Path | None = None) -> Adopted:
    """Make a job of a program that runs without launch. `process` is NODE:PID; `progress`: `step=RE`, …"""
    from launcher import adopt as adopting

    start = start or Path.cwd()
    with open_index() as index:
        settle_leftovers(index, start)
        return adopting.adopt(index, process, name, log, progress, start)


def init(*, start: Path | None = None, output: Path | None = None, ssh_config: str | None = None,
         workdir: str = "~/launch", force: bool = False,
         tell: Callable[[str], None] = lambda text: None) -> Initialised:
    """Try every host that ssh names and write a cluster.yaml. Raises Refused: there is one and `force` is not given."""
    from launcher import init as initialising

    return initialising.init(start or Path.cwd(), output, ssh_config, workdir, force, tell)


def nodes(*, start: Path | None = None, timeout_s: float = ASK_S) -> list[NodeReport]:
    """What there is on every node and who uses it; one that does not answer in time is `problem` and no census."""
    from launcher import census

    with open_index() as index:
        return census.nodes_now(index, start or Path.cwd(), timeout_s)


def processes(node: str, *, start: Path | None = None) -> list[dict[str, Any]]:
    """What is on the GPUs of a node, and what this person runs there: cluster/node/census.py."""
    from launcher import census

    return census.processes_on(node, start or Path.cwd())


def known(job: str) -> JobStatus:
    """What this computer knows of a job, without asking anybody."""
    with open_index() as index:
        return status_of(find(index, job))
