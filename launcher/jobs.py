"""What is known about a job, as one typed value, and how a job is found by what a person calls it."""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import Wrong, nearest
from launcher.index import Index, Job

ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"})


_AS_ANSWERED = ("reason", "attempt", "step", "total", "loss", "health", "submitted_at", "started_at",
                "ended_at", "it_s", "eta_s", "checkpoint_step", "resume_step", "retry_at", "peak_rss_mb",
                "expected_s", "slurm_id")


@dataclass(frozen=True)
class JobStatus:
    """One job, as it was last heard of. Times are unix seconds of the node; None: not known or none."""

    id: str
    name: str | None
    stage: str
    node: str
    backend: str
    gpus: tuple[str | int, ...]  # UUIDs, or indices
    state: str  # one of cluster.states.WORDS
    reason: str | None  # why it ended or waits
    attempt: int | None
    step: int | None
    total: int | None
    loss: float | str | None  # "nan", "inf" as text
    health: str | None  # ok, warning, sick, unknown; None: nobody looked
    submitted_at: float | None
    started_at: float | None
    ended_at: float | None
    last_seen_s: float  # age of this answer, in seconds
    run_dir: str
    detail: str = ""  # the first exception of the rank that failed first, or what was freed
    it_s: float | None = None
    eta_s: float | None = None
    expected_s: float | None = None  # of one that has not begun: so long it takes, by what was measured
    checkpoint_step: int | None = None  # newest verified checkpoint
    resume_step: int | None = None  # where the current attempt went on from
    retry_at: float | None = None
    peak_rss_mb: float | None = None
    by_hand: bool = False  # no supervisor: started without launch
    stale: bool = False  # its node or scheduler could not be asked just now
    place: str = ""  # where it runs; while it waits, where it would: gpu[01-02], lab:gpu
    queue: dict[str, Any] | None = None  # SLURM's: {id, state, reason, words, position, of, starts_at, restarts, …}
    slurm_id: str | None = None  # the newest under which SLURM has or had it
    unasked: str = ""  # why the scheduler could not be asked just now
    group: dict[str, Any] | None = None  # the sweep or pipeline it is one of: cluster.spec.Group

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_view(view: dict[str, Any], node: str, asked_at: float) -> Job:
    """A node's answer as a row of the index."""
    key = view.get("token") or f"{node}:{view['run_dir']}"
    return Job(key, view["id"], view.get("name"), node, view["run_dir"], is_over(view),
               view.get("submitted_at") or view.get("started_at") or 0.0, asked_at, view,
               (view.get("group") or {}).get("id"))


def is_over(view: dict[str, Any]) -> bool:
    """Nothing more will happen to this job by itself, so that its node need not be asked again."""
    return view.get("state") in ENDED and not view.get("revivable")


def status_of(job: Job, stale: bool = False) -> JobStatus:
    """`stale`: its node was asked just now and did not answer."""
    view = job.view
    return JobStatus(
        id=job.id, name=job.name, node=job.node, run_dir=job.run_dir,
        stage=view.get("stage") or "", backend=view.get("backend") or "host",
        gpus=tuple(view.get("gpus") or ()), state=view.get("state") or "PENDING",
        detail=view.get("detail") or "", by_hand=bool(view.get("by_hand")),
        last_seen_s=round(max(0.0, time.time() - _seen_at(job)), 1),
        **{key: view.get(key) for key in _AS_ANSWERED},
        place=view.get("place") or job.node, queue=view.get("queue"), group=view.get("group"),
        unasked=view.get("unasked") or "", stale=bool(stale or view.get("unasked")) and not job.ended)


def _seen_at(job: Job) -> float:
    """When there was the last sign of it. An answer without its scheduler is as old as what that said before."""
    view = job.view
    if not view.get("unasked"):
        return job.asked_at
    signs = ((view.get("queue") or {}).get("asked_at"), view.get("heard_at"), view.get("submitted_at"))
    return min(job.asked_at, max(sign or 0.0 for sign in signs))


def find(index: Index, word: str) -> Job:
    """The job of that id, name (of one not ended first) or unique prefix; `@last` is the newest.

    Raises Wrong with the nearest id or name, and for a sweep or a pipeline: which of its jobs is meant?
    """
    found = find_all(index, word)
    if len(found) == 1:
        return found[0]
    kind = (found[0].view.get("group") or {}).get("kind", "group")
    raise Wrong(f"{word!r} is a {kind} of {len(found)} jobs",
                hint=f"say which: {', '.join(job.name or job.id for job in found[:8])}"
                     + (", …" if len(found) > 8 else ""))


def find_all(index: Index, word: str) -> list[Job]:
    """What `find` finds, or all jobs of the sweep or pipeline of that name, in their order. A name, of an ended job
    too, goes before the ids that begin with it."""
    if word == "@last":
        if job := index.last():
            return group_of(index, job.group) if job.group else [job]
        raise Wrong("no job is known on this computer yet",
                    hint="launch status --rescan asks every node for its jobs")
    named = index.with_name(word)
    running = [job for job in named if not job.ended]
    beginning = index.with_prefix(word) if word else []
    for found, whole in ((index.with_id(word), False), (group_of(index, word), True), (running, False),
                         (named[:1], False), _begins(index, beginning, word)):
        if found and (whole or len(found) == 1):
            return found
        if found:
            raise Wrong(f"{word!r} is not unique", hint="it could be: " + ", ".join(map(_told, found)))
    raise Wrong(f"no such job: {word!r}", hint=_unknown_hint(index, word))


def group_of(index: Index, group: str) -> list[Job]:
    """The jobs of a sweep or pipeline in its order: of the one not ended, or the newest, when several had that name."""
    jobs = index.in_group(group)
    running = [job.submitted_at for job in jobs if not job.ended]
    newest = max(running or [job.submitted_at for job in jobs], default=0.0)
    return sorted((job for job in jobs if job.submitted_at == newest), key=_order)


def _order(job: Job) -> tuple[int, str]:
    return (job.view.get("group") or {}).get("position", 0), job.id


def _begins(index: Index, jobs: list[Job], word: str) -> tuple[list[Job], bool]:
    """Jobs whose ids begin with `word`; whether that is the beginning of one group, which then is meant as a whole."""
    groups = {job.group for job in jobs}
    if len(jobs) > 1 and len(groups) == 1 and (group := groups.pop()) and group.startswith(word):
        return group_of(index, group), True
    return jobs, False


def _told(job: Job) -> str:
    return f"{job.id} on {job.node}" + (f" ({job.name})" if job.name else "")


def _unknown_hint(index: Index, word: str) -> str:
    close = nearest(word, index.recent_names())
    return (f"nearest: {close}; " if close else "") + "launch status --rescan asks every node for its jobs"
