"""What a person waits for who only asks."""
from __future__ import annotations

import json
import time
from collections.abc import Iterator

from launcher.index import Job, open_index
from tests.bench.measure import PYTHON, Spent, in_turn, ms, spend, typical
from tests.bench.places import Client, Places
from tests.bench.table import Row

_ROUNDS = 15
_DEAD = "gpu01"


def help_page(places: Places) -> Iterator[Row]:
    """`launch --help` beside an empty Python."""
    client = places.local("help")
    ours, bare = in_turn(_ROUNDS, lambda: client.launch("--help"), _bare_python)
    yield _beside_python("launch --help", typical(ours), typical(bare), 5)


def status_with_history(places: Places) -> Iterator[Row]:
    """`launch status` when nothing runs, with 1,000 and with 100,000 ended jobs in the index."""
    few, many = places.local("status-few"), places.local("status-many")
    _fill(few, 1_000)
    _fill(many, 100_000)
    short, long, bare = in_turn(
        _ROUNDS, lambda: few.launch("status"), lambda: many.launch("status"), _bare_python)
    before, after, python = typical(short), typical(long), typical(bare)
    yield _beside_python("status, 100,000 ended jobs", after, python, 8)
    ratio = after.wall_s / before.wall_s
    yield Row("status, 100,000 beside 1,000 ended jobs", str(after), f"1,000 ended: {before}", ratio,
              "flat (<= 1.2x)", ratio <= 1.2)


def status_with_a_dead_node(places: Places) -> Iterator[Row]:
    """`launch status` when the node of a running job has lost its power."""
    remote = places.remote()
    client = remote.client
    job = client.submit("--node", _DEAD, "--cwd", "/tmp", "--", "sleep", "600")
    alive = [client.launch("status", codes=(0,)) for _ in range(3)]
    with remote.bed.power_cut(_DEAD):
        runs = [client.launch("status", "--json", codes=(0, 3)) for _ in range(3)]
        table = client.launch("status", codes=(0, 3))
    found = next((one for one in json.loads(runs[-1].stdout) if one["id"] == job), None)
    marked = bool(found and found["last_seen_s"] > 1 and job in table.stdout)
    spent = typical(runs)
    yield Row("status, node without power", str(spent), f"alive: {typical(alive)}", None, "<= 3.5 s",
              spent.wall_s <= 3.5)
    seen = f"{found['state']}, seen {found['last_seen_s']:.0f} s ago" if found else "the job is missing"
    yield Row("  and the job is marked stale", seen, goal="yes", met=marked)
    client.launch("status", codes=(0, 1, 3))  # the node is back: the job's end becomes known


def _bare_python() -> Spent:
    return spend([PYTHON, "-c", "pass"])


def _beside_python(what: str, spent: Spent, python: Spent, limit: float) -> Row:
    ratio = spent.wall_s / python.wall_s
    beside = f"python -c pass: {ms(python.wall_s)}"
    return Row(what, str(spent), beside, ratio, f"<= {limit:g}x", ratio <= limit)


def _fill(client: Client, count: int) -> None:
    now = time.time()
    with open_index(client.state / "index.sqlite") as index:
        index.put_all([_ended_job(number, now - 60 * (count - number)) for number in range(count)])


def _ended_job(number: int, ended_at: float) -> Job:
    name, run_dir = f"phase3-{number:06d}", f"/home/alice/launch/runs/phase3-{number:06d}"
    view = {
        "id": name, "name": f"experiment {number}", "stage": "phase3", "node": "gpu05",
        "gpus": ["GPU-8f6b1a52-0000-1111-2222-333344445555"], "state": "COMPLETED", "reason": None,
        "detail": "", "attempt": 0, "step": 10000, "total": 10000, "loss": 0.0123, "it_s": 1.7, "eta_s": None,
        "submitted_at": ended_at - 7000, "started_at": ended_at - 6990, "ended_at": ended_at,
        "heard_at": ended_at, "run_dir": run_dir, "token": f"{number:032x}", "checkpoint_step": 10000,
        "resume_step": 0, "grace_s": None, "retry_at": None, "by_hand": False, "peak_rss_mb": 4100.0,
        "backend": "host"}
    return Job(view["token"], name, view["name"], "gpu05", run_dir, True, ended_at - 7000, ended_at, view)
