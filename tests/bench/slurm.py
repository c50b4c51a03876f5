"""Jobs of a SLURM cluster, from a laptop through its login node, beside SLURM's own commands over ssh."""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.measure import Spent, in_turn, ms, spend, typical
from tests.bench.places import USER, Login, Places
from tests.bench.table import Row
from tests.testbed.slurmbed import LOGIN

_MANY = 500
_SWEEP = 100
_LATER = ("--set", "resources.sbatch.begin=now+1hour")  # in the queue, and nothing runs
_SBATCH = "sbatch --parsable --begin=now+1hour --wrap 'sleep 600'"
_HEARD = f"/home/{USER}/launch/.launch/slurm/queue.json"  # what SLURM said last: a status of the same two seconds
_WITHIN_S = 3.5


def submitted(places: Places) -> Iterator[Row]:
    """A cold submit of a stage to SLURM, until its id is printed, beside `ssh head sbatch`."""
    login = places.login()
    with _emptied(login):
        ours, plain, true = in_turn(
            5, lambda: login.client.launch("submit", "hold", "--node", "lab", *_LATER),
            lambda: spend(login.ssh(LOGIN, _SBATCH)), lambda: spend(login.ssh(LOGIN, "true")))
        beside, floor = typical(plain), typical(true)
        yield _beside("submit to SLURM, until the id", typical(ours), "ssh sbatch", beside)
        yield Row("  the same beside a login", str(typical(ours)), f"ssh true: {ms(floor.wall_s)}",
                  typical(ours).wall_s / floor.wall_s)


def a_sweep(places: Places) -> Iterator[Row]:
    """A sweep of 100 points, which is one array, beside 100 calls of sbatch in one ssh."""
    login = places.login()
    with _emptied(login):
        ours, plain = in_turn(
            2, lambda: _swept(login, _SWEEP),
            lambda: spend(login.ssh(LOGIN, f"for one in $(seq {_SWEEP}); do {_SBATCH}; done")))
        sweep, calls = typical(ours), typical(plain)
        yield _beside(f"sweep of {_SWEEP} points", sweep, f"{_SWEEP} x sbatch", calls)


def status_of_many(places: Places) -> Iterator[Row]:
    """`launch status` with 500 jobs in SLURM's queue, and a kill of all of them by the sweep's name."""
    login = places.login()
    with _emptied(login):
        swept = _swept(login, _MANY)
        yield Row(f"sweep of {_MANY} points", str(swept))
        ours, squeue, true = in_turn(
            4, lambda: _status(login), lambda: spend(login.ssh(LOGIN, "squeue -r")),
            lambda: spend(login.ssh(LOGIN, "true")))
        status, plain, floor = typical(ours), typical(squeue), typical(true)
        yield Row(f"status, {_MANY} jobs in SLURM's queue", str(status), f"ssh squeue: {plain}",
                  status.wall_s / plain.wall_s, f"<= {_WITHIN_S} s", status.wall_s <= _WITHIN_S)
        yield Row("  the same beside a login", str(status), f"ssh true: {ms(floor.wall_s)}",
                  status.wall_s / floor.wall_s)
        shown = sum(one["state"] == "PENDING" and not one["unasked"] for one in json.loads(_status(login, "--json").stdout))
        yield Row("  shown as waiting, and asked", f"{shown} of {_MANY}", goal="all", met=shown == _MANY)
        killed = login.client.launch("kill", swept.stdout.strip())
        yield Row(f"kill of {_MANY} waiting jobs by one name", str(killed))


def status_without_controller(places: Places) -> Iterator[Row]:
    """`launch status` when slurmctld is down; the worst of three."""
    login = places.login()
    with _emptied(login):
        job = login.client.submit("hold", "--node", "lab", *_LATER)
        alive = typical([_status(login) for _ in range(3)])
        with login.bed.controller_down():
            plain = spend(login.ssh(LOGIN, "squeue"), codes=(1,))
            runs = [login.client.launch("status", "--json", codes=(0, 3)) for _ in range(3)]
        worst = max(runs, key=lambda run: run.wall_s)
        yield Row("status, slurmctld down, worst of 3", str(worst), f"ssh squeue: {plain}",
                  worst.wall_s / plain.wall_s, f"<= {_WITHIN_S} s", worst.wall_s <= _WITHIN_S)
        yield Row("  the same with slurmctld up", str(alive))
        found = [one for run in runs for one in json.loads(run.stdout) if one["id"] == job]
        told = [one for one in found if one["state"] == "PENDING" and one["unasked"]]
        yield Row("  the job is still PENDING, and not asked", f"{len(told)} of {len(runs)}", goal="all",
                  met=len(told) == len(runs))


def _beside(what: str, ours: Spent, name: str, plain: Spent) -> Row:
    return Row(what, str(ours), f"{name}: {plain}", ours.wall_s / plain.wall_s)


def _swept(login: Login, points: int) -> Spent:
    values = ",".join(map(str, range(points)))
    return login.client.launch("submit", "hold", "--node", "lab", "--sweep", f"point={values}", *_LATER)


def _status(login: Login, *words: str) -> Spent:
    """One that asks SLURM, whoever asked just before."""
    login.bed.exec(LOGIN, "rm", "-f", _HEARD)
    return login.client.launch("status", *words)


@contextmanager
def _emptied(login: Login) -> Iterator[None]:
    """At the end nothing is in the queue, and the client knows it."""
    try:
        yield
    finally:
        login.bed.slurm("scancel", "-u", USER)
        login.client.launch("status", codes=(0, 3))
