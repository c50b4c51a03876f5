"""Asking many nodes at once."""
from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from tests.bench.measure import PYTHON, CommandFailed, Spent, in_turn, spend, typical
from tests.bench.places import ALIASES, Client, Places, Remote
from tests.bench.table import Row

_GROUP = """\
import sys
from fabric import Config, ThreadingGroup
config = Config(runtime_ssh_path=sys.argv[1])
with ThreadingGroup(*sys.argv[3:], config=config) as group:
    print(len(group.run(sys.argv[2], hide=True, in_stream=False)))
"""


@dataclasses.dataclass(frozen=True)
class Asked:
    spent: Spent
    answered: int


def fifty_nodes(places: Places) -> Iterator[Row]:
    """`launch status` that asks 50 nodes (five sshd with ten addresses each) beside a cold fabric group."""
    remote = places.remote()
    client = dataclasses.replace(remote.client, state=places.folder / "fifty")
    with ThreadPoolExecutor(3) as pool:
        jobs = list(pool.map(lambda alias: _job(client, alias), ALIASES))
    client.launch("wait", *jobs)
    ours, group, starting = in_turn(4, lambda: _status(client), lambda: _fabric(remote, "cat /proc/loadavg"),
                                    lambda: _fabric(remote, f"{PYTHON} -I -S -c 'import json'"))
    mine, theirs = typical([one.spent for one in ours]), typical([one.spent for one in group])
    ratio = mine.wall_s / theirs.wall_s
    least = min(one.answered for one in ours)
    yield Row("status of 50 nodes, cold", str(mine), f"fabric, cat: {theirs}", ratio, "<= 1.1x", ratio <= 1.1)
    yield Row("  answered in the worst round", f"{least} of {len(ALIASES)}", goal="all",
              met=least == len(ALIASES))
    # All 50 nodes are on the cores of this machine, so what an agent costs there is in the figure 50 times.
    python = typical([one.spent for one in starting])
    yield Row("  the same beside 50 Pythons that start", str(mine), f"fabric, python: {python}",
              mine.wall_s / python.wall_s)


def _job(client: Client, alias: str) -> str:
    return client.submit("--node", alias, "--cwd", "/tmp", "--", "true")


def _status(client: Client) -> Asked:
    """With all 50 jobs made to look as if their end was not known, so that every node is asked."""
    with closing(sqlite3.connect(client.state / "index.sqlite")) as db, db:
        db.execute("UPDATE jobs SET ended = 0")
    spent = client.launch("status", "--all", "--json", codes=(0, 3))
    answered = sum(one["last_seen_s"] <= spent.wall_s for one in json.loads(spent.stdout))
    return Asked(spent, answered)


def _fabric(remote: Remote, command: str) -> Asked:
    spent = spend([*remote.client.prefix, PYTHON, "-c", _GROUP, remote.ssh_config, command, *ALIASES])
    answered = int(spent.stdout)
    if answered != len(ALIASES):
        raise CommandFailed(f"the fabric group reached {answered} of {len(ALIASES)} nodes")
    return Asked(spent, answered)
