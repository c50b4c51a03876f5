"""From a cold command to the first line of the job."""
from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.measure import PYTHON, Spent, in_turn, median, ms, spend, typical
from tests.bench.places import WORKDIR, Client, Places, Remote, poll, settle
from tests.bench.table import Row

_STAMP = re.compile(r"^(\d{10}\.\d{9})$", re.MULTILINE)
_JOB = ("date", "+%s.%N")  # a job whose first line says when it ran
_SUBMITIT = """\
import sys, submitit
executor = submitit.LocalExecutor(folder=sys.argv[1])
executor.update_parameters(timeout_min=1)
print(executor.submit(submitit.helpers.CommandFunction(sys.argv[2:])).job_id)
"""
_NODE = "gpu02"
_LOG = "attempts/000/logs/rank-0.log"
_BALLAST_BYTES = 2_000_000


@dataclass(frozen=True)
class Submitted:
    """Seconds until the first line of the job, and until the command returned."""

    first_line_s: float
    command: Spent


def local(places: Places) -> Iterator[Row]:
    """A command on this computer beside submitit's LocalExecutor."""
    client, folder = places.local("submit"), places.folder / "submitit"

    def log_of(job: str) -> Path:
        return client.state / "work/runs" / job / _LOG

    ours, packed, theirs = in_turn(
        7, lambda: _submit(client, log_of, "--cwd", client.project), lambda: _submit(client, log_of),
        lambda: _submitit(folder))
    reference = median([run.first_line_s for run in theirs])
    beside = f"submitit: {ms(reference)} (cpu {ms(median([run.command.cpu_s for run in theirs]))})"
    for what, runs in (("--cwd", ours), ("snapshot", packed)):
        ratio = median([run.first_line_s for run in runs]) / reference
        yield Row(f"local, {what}, to the first line", _cost(runs), beside, ratio, "<= .35x", ratio <= 0.35)
        yield Row("  until the job id is printed", str(typical([run.command for run in runs])))


def over_ssh(places: Places) -> Iterator[Row]:
    """A command on a node beside one cold `ssh node true`, and the same with a snapshot to carry."""
    remote = places.remote()
    client, ballast = remote.client, remote.client.project / "ballast.bin"

    def log_of(job: str) -> Path:
        return remote.on_host(_NODE, f"{WORKDIR}/runs/{job}/{_LOG}")

    first = _submit(client, log_of, "--node", _NODE, "--cwd", "/tmp")
    plain, login = in_turn(5, lambda: _submit(client, log_of, "--node", _NODE, "--cwd", "/tmp"),
                           lambda: _timed(remote, "true"))
    floor = median([run.command.wall_s for run in login])
    yield _beside_ssh("ssh, --cwd, to the first line", plain, floor, 0.0)
    yield Row("  until the job id is printed", str(typical([run.command for run in plain])))
    yield Row("  the first time on a node (agent carried)", _cost([first]))

    def packed() -> Submitted:
        ballast.write_bytes(_incompressible(_BALLAST_BYTES))  # new content: nothing of it is on the node yet
        return _submit(client, log_of, "--node", _NODE)

    carried, copied = in_turn(3, packed, lambda: _timed(remote, "cat >/dev/null", ballast))
    transfer_s = max(0.0, median([run.command.wall_s for run in copied]) - floor)
    yield _beside_ssh(f"ssh, new snapshot of {_BALLAST_BYTES / 1e6:.0f} MB", carried, floor, transfer_s)
    ballast.unlink()


def _beside_ssh(what: str, runs: list[Submitted], floor: float, transfer_s: float) -> Row:
    took = median([run.first_line_s for run in runs])
    beside = f"ssh true: {ms(floor)}" + (f" + {ms(transfer_s)} transfer" if transfer_s else "")
    return Row(what, _cost(runs), beside, took / (floor + transfer_s), "<= 1.5x ssh + transfer",
               took <= 1.5 * floor + transfer_s)


def _cost(runs: list[Submitted]) -> str:
    first = median([run.first_line_s for run in runs])
    return f"{ms(first)} (cpu {ms(median([run.command.cpu_s for run in runs]))})"


def _submit(client: Client, log_of: Callable[[str], Path], *options: str | Path) -> Submitted:
    began = time.time()
    spent = client.launch("submit", *options, "--", *_JOB)
    job = spent.stdout.strip()
    stamp = _stamp(log_of(job))
    settle(job)
    return Submitted(stamp - began, spent)


def _submitit(folder: Path) -> Submitted:
    began = time.time()
    spent = spend([PYTHON, "-c", _SUBMITIT, folder, *_JOB])
    stem = f"{spent.stdout.strip()}_0_"
    stamp = _stamp(folder / f"{stem}log.out")
    settle(str(folder))
    return Submitted(stamp - began, spent)


def _timed(remote: Remote, command: str, stdin: Path | None = None) -> Submitted:
    spent = spend(remote.ssh(_NODE, command), stdin=stdin)
    return Submitted(spent.wall_s, spent)


def _stamp(log: Path) -> float:
    def look() -> str | None:
        found = _STAMP.search(log.read_text(errors="replace")) if log.exists() else None
        return found[1] if found else None

    return float(poll(f"first line in {log}", look))


def _incompressible(size: int) -> bytes:
    with open("/dev/urandom", "rb") as file:
        return file.read(size)
