"""Asking many nodes at once."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from launcher.index import Job, open_index
from tests.bench.measure import PYTHON, CommandFailed, Spent, in_turn, spend, typical
from tests.bench.places import ALIASES, GPU_NODES, USER, Client, Places, Remote
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
    jobs = [one for node in GPU_NODES for one in _jobs(remote, client, node)]
    ours, group, starting = in_turn(
        4, lambda: _status(client, jobs), lambda: _fabric(remote, "cat /proc/loadavg"),
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


def _jobs(remote: Remote, client: Client, node: str) -> list[Job]:
    """One job that has ended on the node, and a copy of it for each further name of the node."""
    job = client.submit("--node", node, "--cwd", "/tmp", "--", "true")
    client.wait(job)
    with open_index(client.state / "index.sqlite") as index:
        (known,) = index.with_id(job)
        index.forget(known)
    copies = []
    for alias in (alias for alias, at in ALIASES.items() if at == node):
        token, run_dir = f"{alias:f>32}", f"{known.run_dir}-{alias}"
        remote.bed.sh(node, 'cp -a "$1" "$2"; sed -i "s/$3/$4/" "$2/spec.json"', known.run_dir, run_dir,
                      known.key, token, user=USER)
        copies.append(dataclasses.replace(known, key=token, node=alias, run_dir=run_dir, ended=False))
    return copies


def _status(client: Client, jobs: list[Job]) -> Asked:
    """With jobs whose end is not known to the client, so that every node is asked."""
    with open_index(client.state / "index.sqlite") as index:
        index.put_all([dataclasses.replace(job, asked_at=0) for job in jobs])
    spent = client.launch("status", "--all", "--json", codes=(0, 3))
    answered = sum(one["last_seen_s"] <= spent.wall_s for one in json.loads(spent.stdout))
    return Asked(spent, answered)


def _fabric(remote: Remote, command: str) -> Asked:
    spent = spend([*remote.client.prefix, PYTHON, "-c", _GROUP, remote.ssh_config, command, *ALIASES])
    answered = int(spent.stdout)
    if answered != len(ALIASES):
        raise CommandFailed(f"the fabric group reached {answered} of {len(ALIASES)} nodes")
    return Asked(spent, answered)
