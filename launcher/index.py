"""What this computer remembers about jobs, so that `status` is instant. The nodes hold the truth.

    jobs     one row per job: where it is, whether it is known to have ended, the last answer and its time
    intents  submits whose outcome is not known yet: written before the node is asked, removed with its answer
    held     jobs of a group that are not submitted yet: the next command goes on with what a client began

One SQLite file; deleting it loses nothing that `launch status --rescan` does not bring back. A damaged one is moved
aside, what can be read of it is kept, and the next `launch status` asks every node for the rest. A rollback journal,
never WAL: homes are on NFS.
"""
from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from cluster.inventory import client_state_dir
from launcher import clients
from launcher.errors import Failed

_VERSION = 2
_BUSY_S = 10.0
_INCOMPLETE = 1  # the application_id of a file that was begun anew and misses what the nodes know
_SCHEMA = """
CREATE TABLE jobs(
  key TEXT PRIMARY KEY, id TEXT NOT NULL, name TEXT, node TEXT NOT NULL, run_dir TEXT NOT NULL,
  ended INTEGER NOT NULL, submitted_at REAL NOT NULL, asked_at REAL NOT NULL, view TEXT NOT NULL,
  grouped TEXT);
CREATE INDEX jobs_by_group ON jobs(grouped, submitted_at) WHERE grouped IS NOT NULL;
CREATE INDEX jobs_by_id ON jobs(id);
CREATE INDEX jobs_by_name ON jobs(name, submitted_at) WHERE name IS NOT NULL;
CREATE INDEX jobs_by_time ON jobs(submitted_at);
CREATE INDEX jobs_active ON jobs(submitted_at) WHERE ended = 0;
CREATE TABLE intents(
  token TEXT PRIMARY KEY, id TEXT NOT NULL, name TEXT, node TEXT NOT NULL, workdir TEXT NOT NULL,
  pid INTEGER NOT NULL, created_at REAL NOT NULL);
CREATE TABLE held(
  token TEXT PRIMARY KEY, position INTEGER NOT NULL, grouped TEXT NOT NULL, node TEXT NOT NULL, start TEXT NOT NULL,
  spec TEXT NOT NULL, config TEXT, code TEXT, needs TEXT NOT NULL, pid INTEGER NOT NULL, created_at REAL NOT NULL);
"""
_COLUMNS = "key, id, name, node, run_dir, ended, submitted_at, asked_at, view, grouped"


@dataclass(frozen=True)
class Job:
    """The last that was heard about a job. `view` is the node's answer, `asked_at` when it was given."""

    key: str  # its token, or node and run directory for a job that was started by hand
    id: str
    name: str | None
    node: str  # the node of cluster.yaml through which it is asked
    run_dir: str
    ended: bool
    submitted_at: float  # unix seconds
    asked_at: float  # unix seconds of this computer
    view: dict[str, Any]
    group: str | None = None  # the id of the sweep or pipeline it is one of


@dataclass(frozen=True)
class Held:
    """A job that this client submits as soon as it can. `needs` and `spec` are JSON: see launcher/held.py."""

    token: str
    position: int  # in the group: those before it go first
    group: str
    node: str
    start: str  # the directory of the person
    spec: str
    config: str | None
    code: str | None  # the packed snapshot, a file of this computer
    needs: str
    client: int  # that is at work on it: see launcher/clients.py
    created_at: float


@dataclass(frozen=True)
class Intent:
    """A submit that was begun. `client` began it: see launcher/clients.py."""

    token: str
    id: str
    name: str | None
    node: str
    workdir: str
    client: int
    created_at: float


class Index:
    """Open with `open_index()`. A method is one transaction: two clients at once only wait for each other."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def close(self) -> None:
        self._db.close()

    @property
    def incomplete(self) -> bool:
        """It was damaged, and the nodes have not been asked since."""
        return self._db.execute("PRAGMA application_id").fetchone()[0] == _INCOMPLETE

    def complete(self) -> None:
        with self._db:
            self._db.execute("PRAGMA application_id = 0")

    def put(self, job: Job) -> None:
        self.put_all([job])

    def put_all(self, jobs: list[Job]) -> None:
        with self._db:
            self._insert(jobs)

    def started(self, *jobs: Job) -> None:
        """A submit was answered: the jobs are known and their intents are done with, in one step."""
        with self._db:
            self._insert(list(jobs))
            for table in ("intents", "held"):
                self._db.executemany(f"DELETE FROM {table} WHERE token = ?", [(job.key,) for job in jobs])

    def replace_nodes(self, nodes: list[str], jobs: list[Job]) -> None:
        """`jobs` is all there is on these nodes: they were asked for every run directory."""
        with self._db:
            self._db.executemany("DELETE FROM jobs WHERE node = ?", [(node,) for node in nodes])
            self._insert(jobs)

    def _insert(self, jobs: list[Job]) -> None:
        rows = [(job.key, job.id, job.name, job.node, job.run_dir, int(job.ended), job.submitted_at,
                 job.asked_at, json.dumps(job.view), job.group) for job in jobs]
        self._db.executemany(f"INSERT OR REPLACE INTO jobs({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)", rows)

    def forget(self, job: Job) -> None:
        with self._db:
            self._db.execute("DELETE FROM jobs WHERE key = ?", (job.key,))

    def active(self) -> list[Job]:
        """Jobs not known to have ended, oldest first."""
        return self._select("WHERE ended = 0 ORDER BY submitted_at")

    def untold(self) -> list[Job]:
        """Jobs that have ended, of which somebody has still to be told: their nodes are asked once more."""
        return self._select("WHERE ended = 1 AND view LIKE ?", '%"untold": true%')

    def all(self) -> list[Job]:
        return self._select("ORDER BY submitted_at")

    def last(self) -> Job | None:
        return next(iter(self._select("ORDER BY submitted_at DESC LIMIT 1")), None)

    def with_key(self, key: str) -> Job | None:
        return next(iter(self._select("WHERE key = ?", key)), None)

    def with_id(self, job_id: str) -> list[Job]:
        return self._select("WHERE id = ? ORDER BY submitted_at LIMIT 20", job_id)

    def with_prefix(self, prefix: str) -> list[Job]:
        """At most 20: enough to say that a prefix is not unique."""
        return self._select("WHERE id >= ? AND id < ? ORDER BY id LIMIT 20", prefix, prefix + "\U0010ffff")

    def with_name(self, name: str) -> list[Job]:
        """Newest first, at most 20."""
        return self._select("WHERE name = ? ORDER BY submitted_at DESC LIMIT 20", name)

    def in_group(self, group: str) -> list[Job]:
        """The jobs of every sweep or pipeline of that name, oldest first."""
        return self._select("WHERE grouped = ? ORDER BY submitted_at, id", group)

    def any_ended(self) -> bool:
        return self._db.execute("SELECT 1 FROM jobs WHERE ended = 1 LIMIT 1").fetchone() is not None

    def recent_names(self, count: int = 200) -> list[str]:
        """Ids and names of the latest jobs: what a mistyped one was probably meant to be."""
        rows = self._db.execute("SELECT id, name FROM jobs ORDER BY submitted_at DESC LIMIT ?", (count,))
        return [word for row in rows for word in row if word]

    def add_intent(self, intent: Intent) -> None:
        self.add_intents([intent])

    def add_intents(self, intents: list[Intent]) -> None:
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO intents(token, id, name, node, workdir, pid, created_at) "
                                 "VALUES (?,?,?,?,?,?,?)", [astuple(intent) for intent in intents])

    def drop_intent(self, token: str) -> None:
        self.drop_intents([token])

    def drop_intents(self, tokens: list[str]) -> None:
        with self._db:
            self._db.executemany("DELETE FROM intents WHERE token = ?", [(token,) for token in tokens])

    def intents(self) -> list[Intent]:
        return [Intent(*row) for row in
                self._db.execute("SELECT token, id, name, node, workdir, pid, created_at FROM intents")]

    def hold(self, rows: list[Held]) -> None:
        with self._db:
            self._db.executemany("INSERT INTO held VALUES (?,?,?,?,?,?,?,?,?,?,?)", [astuple(row) for row in rows])

    def held(self) -> list[Held]:
        return [Held(*row) for row in self._db.execute("SELECT * FROM held ORDER BY created_at, position")]

    def claim(self, row: Held) -> bool:
        """Make this process the one that is at work on it; False: another one was faster."""
        with self._db:
            return self._db.execute("UPDATE held SET pid = ? WHERE token = ? AND pid = ?",
                                    (clients.me(), row.token, row.client)).rowcount == 1

    def let_go(self, tokens: list[str]) -> None:
        """These are not to be submitted any more."""
        with self._db:
            self._db.executemany("DELETE FROM held WHERE token = ?", [(token,) for token in tokens])

    def _select(self, where: str, *values: object) -> list[Job]:
        return [Job(*row[:5], bool(row[5]), row[6], row[7], json.loads(row[8]), row[9])
                for row in self._db.execute(f"SELECT {_COLUMNS} FROM jobs {where}", values)]


@contextmanager
def open_index(path: Path | None = None) -> Iterator[Index]:
    """The index of this computer; made when there is none, moved aside and begun anew when it is damaged.

    Raises Failed when its directory cannot be written.
    """
    path = path or client_state_dir() / "index.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        index = Index(_connect(path))
    except (OSError, sqlite3.Error) as error:
        raise Failed(f"the index cannot be opened ({error})", str(path),
                     "set LAUNCH_HOME to a directory that you can write") from None
    try:
        yield index
    except sqlite3.OperationalError as error:
        raise Failed(f"the index cannot be used ({error})", str(path),
                     "set LAUNCH_HOME to a directory that you can write") from None
    except sqlite3.DatabaseError:
        index.close()
        db, said = _renew(path)
        db.close()
        raise Failed(f"it was damaged: {said}", str(path), "give the command again") from None
    finally:
        index.close()


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=_BUSY_S)
    try:
        _prepare(db)
        return db
    except sqlite3.OperationalError:  # locked, read-only, disk full: the file itself is whole
        db.close()
        raise
    except sqlite3.DatabaseError:
        db.close()
    db, said = _renew(path)
    print(f"launch: {path} was damaged, or of another version: {said}", file=sys.stderr)
    return db


def _renew(path: Path) -> tuple[sqlite3.Connection, str]:
    """A new file in the place of a damaged one, with what can be read of that -> it, and words about it."""
    aside = _move_aside(path)
    db = sqlite3.connect(path, timeout=_BUSY_S)
    _prepare(db)
    with db:
        kept = {table: _salvage(aside, table, db) for table in ("jobs", "intents", "held")}
        db.execute(f"PRAGMA application_id = {_INCOMPLETE}")
    return db, (f"it is {aside.name} now, {kept['jobs']} job{'' if kept['jobs'] == 1 else 's'} could be read; "
                "launch status asks every node for the rest")


def _salvage(aside: Path, table: str, db: sqlite3.Connection) -> int:
    """Copy the rows before and behind what is damaged -> how many."""
    old = sqlite3.connect(f"{aside.absolute().as_uri()}?mode=ro", uri=True)
    for order in ("ASC", "DESC"):
        try:
            for row in old.execute(f"SELECT * FROM {table} ORDER BY rowid {order}"):
                db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({','.join('?' * len(row))})", row)
        except sqlite3.Error:  # as far as it goes
            continue
    old.close()
    return db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def _prepare(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == _VERSION:
        db.execute("SELECT key FROM jobs LIMIT 1").fetchone()
        return
    if version:
        raise sqlite3.DatabaseError(f"version {version}")
    with db:
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:  # no other client was faster
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {_VERSION}")


def _move_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    os.replace(path, aside)
    journal = path.with_name(path.name + "-journal")
    journal.unlink(missing_ok=True)
    return aside
