"""What is running where: the index, brought up to date by the nodes that have something to say."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import reconcile
from launcher.index import Index, Job
from launcher.jobs import JobStatus, find_all, status_of


@dataclass(frozen=True)
class Statuses:
    """The jobs asked for, oldest first, and what else a person should know."""

    jobs: list[JobStatus]
    unreachable: dict[str, str]  # node -> why it could not be asked
    notes: list[str]
    more_ended: bool  # there are ended jobs that are not in `jobs`


def status(index: Index, words: Sequence[str], all_jobs: bool, start: Path,
           until: float | None = None, keep: Sequence[str] = (),
           found: reconcile.Refreshed | None = None) -> Statuses:
    """Jobs not known to have ended, those whose ending was only heard of now, and those of `keep`.

    Only nodes with a job not known to have ended are asked; none when a rescan has `found` what there is.
    `words`: these jobs, ended or not. `all_jobs`: every job. `keep`: ids of ended jobs to show as well. `until`
    (time.monotonic): when the answers are wanted.
    """
    asked = [job for word in words for job in find_all(index, word)] if words else index.active()
    result = found or reconcile.refresh(
        index, [*(job for job in asked if not job.ended), *index.untold()], start, until)
    if words:
        shown = [index.with_key(job.key) or job for job in asked]
    elif all_jobs:
        shown = index.all()
    else:
        shown = _with_just_ended(index, result.ended, keep)
    return Statuses([status_of(job, job.node in result.unreachable) for job in shown], result.unreachable,
                    result.notes + _held(index), not words and not all_jobs and index.any_ended())


def _held(index: Index) -> list[str]:
    if not index.held():
        return []
    from launcher import held

    return held.told(index)


def _with_just_ended(index: Index, ended: list[Job], keep: Sequence[str]) -> list[Job]:
    kept = [job for job_id in keep for job in index.with_id(job_id) if job.ended]
    jobs = {job.key: job for job in [*index.active(), *ended, *kept]}
    return sorted(jobs.values(), key=lambda job: job.submitted_at)
