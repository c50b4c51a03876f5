"""Asking many nodes at once."""
from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from tests.bench.measure import PYTHON, CommandFailed, Spent, in_turn, ms, spend, typical
from tests.bench.places import ALIASES, Client, Places, Remote
from tests.bench.table import Row

_GROUP = """\
import sys
from fabric import Config, ThreadingGroup
config = Config(runtime_ssh_path=sys.argv[1])
with ThreadingGroup(*sys.argv[2:], config=config) as group:
    print(len(group.run("cat /proc/loadavg", hide=True, in_stream=False)))
"""


def fifty_nodes(places: Places) -> Iterator[Row]:
    """`launch status` that has to ask 50 nodes (five sshd under ten names each) beside a cold fabric ThreadingGroup."""
    remote = places.remote()
    client = Client(remote.client.project, places.folder / "fifty", remote.client.cluster, remote.client.prefix)
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda alias: client.submit("--node", alias, "--cwd", "/tmp", "--", "true"), ALIASES))
    client.launch("wait", *jobs)
    ours, group = in_turn(5, lambda: _status(client), lambda: _fabric(remote))
    mine, theirs = typical(ours), typical(group)
    ratio = mine.wall_s / theirs.wall_s
    yield Row("status of 50 nodes, cold", str(mine), f"fabric group: {ms(theirs.wall_s)} (cpu {ms(theirs.cpu_s)})",
              ratio, "<= 1.1x", ratio <= 1.1)


def _status(client: Client) -> Spent:
    """With all 50 jobs made to look as if their end was not known, so that every node is asked."""
    with closing(sqlite3.connect(client.state / "index.sqlite")) as db, db:
        db.execute("UPDATE jobs SET ended = 0")
    spent = client.launch("status", "--all", "--json")
    ages = [one["last_seen_s"] for one in json.loads(spent.stdout)]
    if len(ages) != len(ALIASES) or max(ages) > spent.wall_s + 1:
        raise CommandFailed(f"{len(ages)} jobs, the oldest answer {max(ages, default=0):.0f} s old: not all were asked")
    return spent


def _fabric(remote: Remote) -> Spent:
    spent = spend([*remote.client.prefix, PYTHON, "-c", _GROUP, remote.ssh_config, *ALIASES])
    if spent.stdout.strip() != str(len(ALIASES)):
        raise CommandFailed(f"the fabric group reached {spent.stdout.strip()} of {len(ALIASES)} nodes")
    return spent
