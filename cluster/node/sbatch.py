"""Brings jobs into SLURM's queue, and knows them again.

A job's SLURM ids are in its slurm.json, written as soon as sbatch has answered. One whose submit was cut off before
that is found by its name and the token in its comment.
"""
from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import RunDir, write_atomically
from cluster.errors import ClusterError, NodeFailure, Refused, Unreachable, Unusable, error_of
from cluster.node import slurm_tools, waiting
from cluster.node.machines import machines
from cluster.node.refusals import last_words, refusal
from cluster.node.sbatch_options import Options, environment, mark, options_of
from cluster.spec import JobSpec

SUBMIT_S = 180.0  # of sbatch and submitit together: a controller that is busy answers late
_ASK_S = 30.0
Names = dict[str, "list[tuple[str, str]] | ClusterError"]  # name -> what SLURM says of it: (id, comment)
_STARTS = re.compile(r"Job \S+ to start at (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d) .*?on nodes? (\S+)")


@dataclass(frozen=True)
class Forecast:
    """What SLURM would do with a job now."""

    script: str  # what sbatch would be given
    starts_in_s: float | None  # None: it does not say
    nodes: str  # where, in SLURM's words


def queue(run: RunDir, spec: JobSpec, agent: Sequence[str], dependency: str | None = None,
          held: Sequence[int] = ()) -> str:
    """Submit the job in `run` -> its SLURM id, which is in its slurm.json then. `agent` is the agent's command line;
    `held` are open files that stay open until sbatch has answered, whatever becomes of this process.

    Raises ClusterError; only with Unreachable it is not known whether the job was queued: see `adopt`.
    """
    options = options_of(spec, str(run.path), machines(), dependency or dependency_of(spec))
    known = ids_of(run)
    _write(run, known, asked=True)
    try:
        [found] = _ask(agent, "submit", run.path / "slurm", options, [_supervisor(run, agent)], held=held)["ids"]
    except Unreachable:
        raise
    except ClusterError:
        _write(run, known)
        raise
    record(run, found)
    return found


def queue_array(runs: Sequence[RunDir], specs: Sequence[JobSpec], agent: Sequence[str], parallel: int = 0,
                held: Sequence[int] = ()) -> list[str]:
    """Submit jobs that differ only in what they run as one array, `parallel` of them at a time (0: all)."""
    if len(runs) == 1:
        return [queue(runs[0], specs[0], agent, held=held)]
    first, workdir = specs[0], runs[0].path.parent.parent
    name = array_name(first)
    options = options_of(first, str(workdir), machines(), dependency_of(first)) | {"job-name": name}
    for index, run in enumerate(runs):
        _write(run, [], {"name": name, "token": first.token, "index": index})
    folder = workdir / ".launch" / "slurm" / name
    lines = [_supervisor(run, agent) for run in runs]
    ids = _ask(agent, "submit", folder, options, lines, parallel, held)["ids"]
    for run, found in zip(runs, ids):
        record(run, found)
    return ids


def forecast(spec: JobSpec, workdir: Path, agent: Sequence[str]) -> Forecast:
    """Ask SLURM whether it would take the job, and when it could start; nothing is queued. Raises ClusterError."""
    run = RunDir(workdir / "runs" / (spec.id or "job"))
    options = options_of(spec, str(run.path), machines())
    answer = _ask(agent, "test", run.path / "slurm", options, [_supervisor(run, agent)])
    said = _STARTS.search(answer["said"])
    starts = time.mktime(time.strptime(said[1], "%Y-%m-%dT%H:%M:%S")) - time.time() if said else None
    return Forecast(answer["script"], starts, said[2] if said else "")


def dependency_of(spec: JobSpec) -> str | None:
    """What SLURM itself waits for, of the jobs this one comes after. The supervisor waits for the others.

    Raises Refused: one of them ended in a way that lets this one never begin.
    """
    words = []
    for one, seen in zip(spec.after, waiting.see(spec.after)):
        look = waiting.judge(one, seen)
        if look.verdict:
            raise Refused(f"it would never begin: {look.verdict.detail}",
                          hint=f"launch restart {one.id}, or --after {one.id}:any")
        if look.text and not one.peer and (ids := ids_of(RunDir(Path(one.run_dir)))):
            words.append(f"after{'any' if one.any else 'ok'}:{ids[-1]}")
    return ",".join(words) or None


# --- what is known of a job's SLURM ids ---------------------------------------------------------------------

def ids_of(run: RunDir) -> list[str]:
    """The newest last; none: it was never queued, or its submit was cut off. Raises NodeFailure."""
    return [str(found) for found in _read(run).get("ids", [])]


def record(run: RunDir, found: str) -> None:
    """Make `found` the newest SLURM id of the job."""
    _write(run, [one for one in ids_of(run) if one != found] + [found])


def adopt(run: RunDir, spec: JobSpec, names: Names | None = None) -> bool:
    """Whether the job is, or was, in the queue; one of which that was not known is written down. `names` remembers
    what SLURM said: the points of an array have one name.

    Raises ClusterError: SLURM could not be asked.
    """
    known = _read(run)
    if known.get("ids") and not known.get("asked"):
        return True
    array = known.get("array") or {"name": spec.id, "token": spec.token}
    names = {} if names is None else names
    if (name := array["name"]) not in names:
        names[name] = _named(name, spec)
    said = names[name]
    if isinstance(said, ClusterError):
        raise said
    found = _of_token(said, array["token"])
    if "index" in array:
        found = [one for one in found if one.endswith(f"_{array['index']}")]
    for one in found:
        if one not in known.get("ids", ()):
            record(run, one)
    return bool(ids_of(run))


def array_name(spec: JobSpec) -> str:
    """What its points have in common. Not the sweep's own name, which an earlier one may have had: a SLURM that keeps
    no comments could not tell them apart.
    """
    return spec.id.removesuffix(f"-{spec.group.member}") if spec.group else spec.id


def _of_token(said: Sequence[tuple[str, str]], token: str) -> list[str]:
    """Ids of the jobs with that token, oldest first. A SLURM that keeps no comments does not tell them apart."""
    ours = {id for id, comment in said if comment.split(" ")[0] in ("", mark(token))}
    return sorted(ours, key=lambda id: [int(part) for part in re.findall(r"\d+", id)])


def _named(name: str, spec: JobSpec) -> list[tuple[str, str]] | ClusterError:
    """Id and comment of this user's jobs with that name; the error when SLURM could not be asked."""
    user = pwd.getpwuid(os.getuid()).pw_name
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(spec.submitted_at - 3600))
    try:
        said = slurm_tools.run(["squeue", "-h", "-a", "-r", "-t", "all", "-u", user, "-n", name,
                                "-O", "JobArrayID:|,Comment:|"], _ASK_S)
    except slurm_tools.SlurmFailed as error:
        return refusal(error.words or str(error), {})
    try:
        said += slurm_tools.run(["sacct", "-n", "-P", "-X", "-u", user, "--name", name, "-S", since,
                                 "-o", "JobID,Comment"], _ASK_S)
    except slurm_tools.SlurmFailed:
        pass  # no accounting: then squeue is all that there is to ask
    rows = (line.split("|") for line in said.splitlines() if "|" in line)
    return [(row[0].strip(), row[1]) for row in rows]


def _read(run: RunDir) -> dict[str, Any]:
    try:
        return json.loads(run.slurm.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise NodeFailure(f"{run.slurm} cannot be read: {error}") from None


def _write(run: RunDir, ids: Sequence[str], array: dict[str, Any] | None = None, asked: bool = False) -> None:
    """`asked`: sbatch is asked for another id just now, or its answer was lost."""
    more = ({"array": array} if array else {}) | ({"asked": True} if asked else {})
    write_atomically(run.slurm, json.dumps({"ids": list(ids)} | more).encode())


# --- the program that knows submitit ------------------------------------------------------------------------

def _supervisor(run: RunDir, agent: Sequence[str]) -> list[str]:
    program = shutil.which(agent[0])
    if program is None:
        raise Unusable(f"{agent[0]} is not there or not executable", hint="correct `agent_python:` in cluster.yaml")
    return [os.path.abspath(program), *agent[1:], "allocated", str(run.path)]


def _ask(agent: Sequence[str], do: str, folder: Path, options: Options, commands: Sequence[Sequence[str]],
         parallel: int = 0, held: Sequence[int] = ()) -> dict[str, Any]:
    """It needs site-packages, where submitit is. In a session of its own, so that Ctrl-C does not cut it off: then it
    goes on without us, and `held` stays open as long.
    """
    request = {"do": do, "folder": str(folder), "options": options, "commands": commands, "parallel": parallel}
    argv = [word for word in agent if word not in ("-I", "-S")] + ["sbatch"]
    try:
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              errors="replace", cwd="/", env=environment(options), pass_fds=held,
                              start_new_session=True) as process:
            try:
                said, errors = process.communicate(json.dumps(request), timeout=SUBMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # sbatch too: it must not queue what is given up
                raise
    except subprocess.TimeoutExpired:
        raise Unreachable(f"sbatch gave no answer in {SUBMIT_S:g} s",
                          hint="SLURM's controller is busy or down; try again in a minute") from None
    except OSError as error:
        raise NodeFailure(f"{argv[0]}: {error.strerror or error}") from None
    try:
        answer = json.loads(said.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise Unreachable(f"submitting to SLURM failed (exit code {process.returncode}): {last_words(errors)}",
                          hint=f"it ran as: {' '.join(argv)}") from None
    if error := answer.get("error"):
        raise error_of(error)
    return answer
