"""Questions about jobs on several nodes: start the supervisor of a node, or again that of one that was restarted."""
from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from cluster.contract import RunDir
from cluster.errors import NodeFailure, Unusable
from cluster.node import environment, lingering, process
from cluster.node.restart import one_at_a_time
from cluster.node.submit import START_S, agent_of, last_words, start_supervisor
from cluster.node.view import read_view
from cluster.states import ENDED_WORDS

_POLL_S = 0.005


def join(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Start the supervisor of this node's part of a job, if it does not live -> {pid, hostname, started}. It comes to
    that of node 0 by itself.

    Raises Unusable: this node does not see the run directory.
    """
    run, node = RunDir(Path(request["run_dir"])), int(request["node"])
    if not run.spec.is_file():
        raise Unusable(f"{process.hostname()} does not see {run.path}",
                       hint="the nodes of one job need one workdir, on a file system that all of them see")
    living = _living(run, node)
    pid = living or _start(run, node, agent_of(request))
    return {"pid": pid, "hostname": process.hostname(), "started": living is None}


def revive(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """Go on with a job whose node was restarted while it ran -> {revived, state, attempt}."""
    run = RunDir(Path(request["run_dir"]))
    view = read_view(run)
    if not view.get("revivable"):
        return {"revived": False, "state": view["state"], "attempt": view["attempt"]}
    with one_at_a_time(run, view["id"]):
        attempts = run.attempts()
        number = attempts[-1].number + 1 if attempts else 0
        if read_view(run).get("revivable"):  # nobody else did it meanwhile
            start_supervisor(run, "policy", agent_of(request), number)
    view = read_view(run)
    return {"revived": view["state"] not in ENDED_WORDS, "state": view["state"], "attempt": number}


def _start(run: RunDir, node: int, agent: list[str]) -> int:
    group = run.path.stat().st_mode & 0o040
    errors = run.path / f"member-{node}.err"
    with open(errors, "ab") as log:
        done = lingering.run(
            [*agent, "supervise", str(run.path), "--node", str(node)], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=log, cwd="/", env=environment.clean(os.environ),
            start_new_session=True, umask=0o027 if group else 0o077)
    if done.returncode:
        raise NodeFailure(f"the supervisor could not be started: {last_words(errors)}")
    pid = int(done.stdout)
    deadline = time.monotonic() + START_S
    while (found := _living(run, node)) is None:
        if process.start_time(pid) is None:
            if found := _living(run, node):  # another one was faster
                return found
            raise NodeFailure(f"the supervisor ended at once: {last_words(errors)}")
        if time.monotonic() > deadline:
            return pid  # a slow node: it lives
        time.sleep(_POLL_S)
    return found


def _living(run: RunDir, node: int) -> int | None:
    try:
        said = json.loads(run.member(node).read_bytes())
        here = (said["hostname"], said["boot_id"]) == (process.hostname(), process.boot_id())
        return said["pid"] if here and process.alive(said["pid"], said["pid_started"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
