"""What is known about a job, as one typed value, and how a job is found by what a person calls it."""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import Wrong, nearest
from launcher.index import Index, Job

ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"})


_AS_ANSWERED = ("reason", "attempt", "step", "total", "loss", "health", "submitted_at", "started_at",
                "ended_at", "it_s", "eta_s", "checkpoint_step", "resume_step", "retry_at", "peak_rss_mb")


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
    health: str | None
    submitted_at: float | None
    started_at: float | None
    ended_at: float | None
    last_seen_s: float  # age of this answer, in seconds
    run_dir: str
    detail: str = ""  # the first exception of the rank that failed first, or what was freed
    it_s: float | None = None
    eta_s: float | None = None
    checkpoint_step: int | None = None  # newest verified checkpoint
    resume_step: int | None = None  # where the current attempt went on from
    retry_at: float | None = None
    peak_rss_mb: float | None = None
    by_hand: bool = False  # no supervisor: started without launch
    stale: bool = False  # its node could not be asked just now

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_view(view: dict[str, Any], node: str, asked_at: float) -> Job:
    """A node's answer as a row of the index."""
    key = view.get("token") or f"{node}:{view['run_dir']}"
    return Job(key, view["id"], view.get("name"), node, view["run_dir"], is_over(view),
               view.get("submitted_at") or view.get("started_at") or 0.0, asked_at, view)


def is_over(view: dict[str, Any]) -> bool:
    """Nothing more will happen to this job by itself, so that its node need not be asked again."""
    return view.get("state") in ENDED


def status_of(job: Job, stale: bool = False) -> JobStatus:
    """`stale`: its node was asked just now and did not answer."""
    view = job.view
    return JobStatus(
        id=job.id, name=job.name, node=job.node, run_dir=job.run_dir,
        stage=view.get("stage") or "", backend=view.get("backend") or "host",
        gpus=tuple(view.get("gpus") or ()), state=view.get("state") or "PENDING",
        detail=view.get("detail") or "", by_hand=bool(view.get("by_hand")),
        last_seen_s=round(max(0.0, time.time() - job.asked_at), 1),
        **{key: view.get(key) for key in _AS_ANSWERED},
        stale=stale and not job.ended)


def find(index: Index, word: str) -> Job:
    """The job of that id, name (of one not ended first) or unique prefix; `@last` is the newest.

    Raises Wrong with the nearest id or name.
    """
    if word == "@last":
        if job := index.last():
            return job
        raise Wrong("no job is known on this computer yet",
                    hint="launch status --rescan asks every node for its jobs")
    named = index.with_name(word)
    running = [job for job in named if not job.ended]
    for found in (index.with_id(word), running, index.with_prefix(word) if word else []):
        if len(found) == 1:
            return found[0]
        if found:
            raise Wrong(f"{word!r} is not unique", hint="it could be: " + ", ".join(map(_told, found)))
    if named:
        return named[0]
    raise Wrong(f"no such job: {word!r}", hint=_unknown_hint(index, word))


def _told(job: Job) -> str:
    return f"{job.id} on {job.node}" + (f" ({job.name})" if job.name else "")


def _unknown_hint(index: Index, word: str) -> str:
    close = nearest(word, index.recent_names())
    return (f"nearest: {close}; " if close else "") + "launch status --rescan asks every node for its jobs"
