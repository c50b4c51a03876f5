"""One page about a job: gathers what its node knows and the pictures it made into a file that needs nothing else."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cluster.errors import explain
from launcher import api, control, report_page
from launcher.doctor import Diagnosis, diagnose
from launcher.errors import Failed
from launcher.index import open_index
from launcher.jobs import find
from launcher.reconcile import settle_leftovers

if TYPE_CHECKING:
    from cluster.backends.base import Backend

POINTS = 500  # of a curve: more cannot be told apart on a screen
_BYTES = 3_300_000  # of pictures: a page stays below 5 MB
_ONE = 2_000_000  # of one picture
_VALIDATIONS = 6  # pictures of evaluations, evenly over the run
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
         ".mp4": "video/mp4", ".webm": "video/webm"}


@dataclass(frozen=True)
class Picture:
    path: str  # below the run directory
    kind: str  # MIME
    content: bytes


@dataclass(frozen=True)
class Report:
    diagnosis: Diagnosis
    details: api.Details
    pictures: list[Picture]
    left_out: list[str]  # words about pictures that are too large


def write(word: str, out: Path | None, start: Path) -> Path:
    """The page of a job, as `out` or `<job id>.html` in `start`. Raises Wrong, Unreachable; Failed: not writable."""
    found = gather(word, start)
    path = start / (out or f"{found.diagnosis.job.id}.html")
    try:
        path.write_text(report_page.page(found), encoding="utf-8")
    except OSError as error:
        raise Failed(explain(error, f"{path} cannot be written")[0]) from None
    return path


def gather(word: str, start: Path) -> Report:
    with open_index() as index:
        settle_leftovers(index, start)
        job = find(index, word)
        diagnosis = diagnose(index, job.id, start, POINTS)
        backend = control.node_and_backend(job, start)[1]
    details = api.show(job.id, start=start)
    chosen, left_out = choose(diagnosis.pictures, job.id)
    return Report(diagnosis, details, _fetched(backend, job.run_dir, chosen), left_out)


def choose(there: Sequence[Sequence[Any]], job: str) -> tuple[list[tuple[str, int]], list[str]]:
    """(path, bytes) of the pictures that a page shows: artifacts, then evaluations, as far as there is room."""
    known = [(str(path), int(size)) for path, size in there if PurePosixPath(path).suffix.lower() in KINDS]
    made = [one for one in known if one[0].startswith("artifacts/")]
    evaluated = sorted((one for one in known if one not in made), key=lambda one: PurePosixPath(one[0]).name)
    count = min(_VALIDATIONS, len(evaluated))
    spread = [evaluated[(i + 1) * len(evaluated) // count - 1] for i in range(count)]
    chosen: list[tuple[str, int]] = []
    left_out = []
    for path, size in [*made, *reversed(spread)]:
        if size <= _ONE and size + sum(other for _, other in chosen) <= _BYTES:
            chosen.append((path, size))
        else:
            left_out.append(f"{path} ({size / 1e6:.1f} MB): launch pull {job} {path}")
    return chosen, left_out


def _fetched(backend: Backend, run_dir: str, chosen: Sequence[tuple[str, int]]) -> list[Picture]:
    """Their bytes; one that changed or went meanwhile is left out."""
    content = [bytearray() for _ in chosen]
    whole: set[int] = set()
    if chosen:
        with closing(backend.pull(run_dir, [[path, 0, size] for path, size in chosen])) as frames:
            for header, body in frames:
                if "end" in header:
                    break
                if "file" in header and "problem" not in header:
                    content[header["file"]] += body
                    whole |= {header["file"]} if "sha256" in header else set()
    return [Picture(path, KINDS[PurePosixPath(path).suffix.lower()], bytes(content[i]))
            for i, (path, _) in enumerate(chosen) if i in whole]
