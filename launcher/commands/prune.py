"""launch prune: give disk back."""
from __future__ import annotations

from collections.abc import Sequence

from launcher import api, views
from launcher.commands._common import here, parser, positive, tell
from launcher.prune import Pruned
from launcher.pull import size_of

_KEPT = """
Kept in any case: the newest checkpoint that verifies, the best, what another job begins from, newer ones that do not
verify, artifacts and logs, and everything of a job that has not ended or of which no checkpoint verifies. Only
checkpoints of launch's own form go; those of other programs are left alone.
"""


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    done = api.prune(args.jobs, keep_last=args.keep_last, dry_run=args.dry_run, start=here())
    for job in done:
        if job.error:
            tell(f"error: {job.error}")
        elif job.note:
            tell(f"{job.id}: {views.visible(job.note)}")
    if args.json:
        print(views.as_json([_as_object(job) for job in done]))
    else:
        print(_said(done, args.dry_run))
    return max((job.error.exit_code if job.error else int(job.failed) for job in done), default=0)


def _said(done: Sequence[Pruned], dry_run: bool) -> str:
    freed = [job for job in done if job.removed]
    if not freed:
        return "nothing to free"
    would = "would free" if dry_run else "freed"
    total = sum(job.bytes for job in freed)
    return "\n".join([*(_line(job, would) for job in freed),
                      f"{would} {size_of(total)} ({total} bytes) of {len(freed)} job{'' if len(freed) == 1 else 's'}"])


def _line(job: Pruned, would: str) -> str:
    count = len(job.removed)
    kept = "".join(f"\n  keeps {one['name']}: {views.visible(one['why'])}" for one in job.kept)
    names = f"{job.removed[0]['name']}" + (f" … {job.removed[-1]['name']}" if count > 1 else "")
    return (f"{job.id} on {job.node}: {would} {size_of(job.bytes)}: "
            f"{count} checkpoint{'' if count == 1 else 's'} ({views.visible(names)}){kept}")


def _as_object(job: Pruned) -> dict:
    return {"id": job.id, "node": job.node, "bytes": job.bytes, "removed": job.removed, "kept": job.kept,
            "note": job.note, "failed": job.failed, "error": str(job.error) if job.error else None}


def _parser():
    p = parser("prune", "Give disk back: remove old checkpoints of jobs that have ended.")
    p.epilog = _KEPT
    p.add_argument("jobs", nargs="*", metavar="JOB",
                   help="an id, the beginning of one, a name, @last; default: every job that has ended")
    p.add_argument("--keep-last", type=positive, default=1, metavar="N",
                   help="how many of the newest that verify stay; default: 1")
    p.add_argument("--dry-run", action="store_true", help="only say what would be freed")
    p.add_argument("--json", action="store_true", help="a list of objects")
    return p
