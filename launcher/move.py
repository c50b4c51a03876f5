"""`restart --node N`: the same job goes on on another machine.

Where that machine sees the run directory (it reads a token that the old one wrote there) nothing travels. Elsewhere
this computer carries what goes with the job from one node to the other; see cluster/node/move.py.
"""
from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import NodeFailure, Unreachable
from cluster.inventory import Node
from cluster.node import handover
from cluster.spec import JobSpec, digest
from launcher import reconcile, stages, targets
from launcher.control import whoami
from launcher.errors import Refused, Wrong
from launcher.index import Index, Job
from launcher.jobs import ENDED, from_view
from launcher.submit import check_prepared

if TYPE_CHECKING:
    from cluster.backends.base import Backend
    from launcher.restart import RestartPlan

Progress = Callable[[int, int, str], None]  # bytes that are there, bytes in all, the file that travels


@dataclass(frozen=True)
class Move:
    """Where a job is to go on. `shares`: its run directory is seen there."""

    to: Node
    shares: bool

    def told(self) -> str:
        return f"{self.to.name} sees its run directory: nothing travels" if self.shares else \
            "its spec, code, attempts and last verified checkpoint travel there"


def plan(job: Job, shown: dict[str, Any], spec: JobSpec, old: Node, word: str,
         start: Path) -> tuple[Move, JobSpec, str | None]:
    """-> the move, and the job's spec and config as they are there. Raises Wrong, Refused and ClusterError."""
    to = _single(word, spec, old, start)
    shares = _shares(reconcile.backend_of(old), reconcile.backend_of(to), job.run_dir)
    if not shares and (shown["inputs"] or handover.references(shown["config"] or "")):
        raise Refused(f"{spec.id} takes over what other jobs left on {old.name}, which {to.name} does not see",
                      hint="submit it there anew, with the paths of copies of it")
    env = {name: value for name, value in spec.env.items() if old.env_vars.get(name) != value} | to.env_vars
    config = None if shares else _with_data(shown["config"], old, to)
    spec = replace(spec, node=to.name, python=to.python, env=env, share=to.share,
                   gpu_choice=None if to.gpus == "auto" else tuple(to.gpus), after=spec.after if shares else (),
                   config_digest=digest(config.encode()) if config else spec.config_digest)
    origin = spec.resume if spec.resume.startswith("/") and shown["view"]["checkpoint_step"] is None else None
    _check(spec, config or shown["config"], origin, to, start)
    return Move(to, shares), spec, config


def _single(word: str, spec: JobSpec, old: Node, start: Path) -> Node:
    found = targets.resolve(word, start)
    if spec.nodes > 1 or found.peers:
        raise Wrong("restart --node moves a job from one machine to one other; this one takes several",
                    hint="submit it anew: launch submit … --node N1,N2 --resume PATH")
    if "slurm" in (old.via, found.node.via):
        raise Wrong("restart --node moves a job between machines that ssh reaches; SLURM chooses its own",
                    hint=f"submit it anew: launch submit {spec.stage} --node {word} --resume PATH")
    if found.node.name == old.name:
        raise Wrong(f"{spec.id} is on {old.name} already", hint=f"launch restart {spec.id}")
    return found.node


def _shares(old: Backend, new: Backend, run_dir: str) -> bool:
    token = os.urandom(12).hex()
    path = old.leave_token(run_dir, token)
    try:
        return bool(new.sees({path: token}))
    finally:
        old.sees({}, forget=path)


def _with_data(config: str | None, old: Node, to: Node) -> str | None:
    """What lies in the data directory of one node lies in that of the other."""
    if not (config and old.data and to.data):
        return config
    return config.replace(f"{old.data.rstrip('/')}/", f"{to.data.rstrip('/')}/")


def _check(spec: JobSpec, config: str | None, origin: str | None, to: Node, start: Path) -> None:
    """`origin`: the checkpoint that a job without one of its own begins from. Raises Wrong and Unusable: that node has
    not what the job needs.
    """
    paths = stages.NO_PATHS if config is None else _paths(spec, config, to, start)
    cwd = spec.cwd if spec.cwd and spec.cwd.startswith(("/", "~")) else None
    asked = [*paths.asked(), *([origin] if origin else [])]
    prepared = reconcile.backend_of(to).prepare(stat=asked, python=spec.python, cwd=cwd)
    check_prepared(spec, prepared, to)
    stages.check_paths(paths, prepared["stats"], to)
    if origin and prepared["stats"][origin] is None:
        raise Wrong(f"{spec.id} begins from {origin}, and there is no such path on this node", to.name)


def _paths(spec: JobSpec, config: str, to: Node, start: Path) -> stages.Paths:
    """What the config names; none where the stage is not known: a person may stand elsewhere."""
    from configs.errors import ConfigError
    from configs.load import load_stage, resolve_text

    try:
        stage = load_stage(spec.stage, start)
        return stages.paths_of(resolve_text(stage, config, f"config.yaml of {spec.id}", []), stage, to, start)
    except ConfigError:
        return stages.NO_PATHS


def lost(job: Job, error: Unreachable) -> Unreachable:
    """Its node does not answer: what would be lost by going on elsewhere all the same."""
    step, saved = job.view.get("step"), job.view.get("checkpoint_step")
    known = "nothing is known of its progress" if step is None else f"step {step}, which would be lost"
    known += "" if saved is None else f"; its checkpoint at step {saved} is there too"
    return Unreachable(f"{job.node} cannot be reached, and {job.id} is there: {known} ({error.what})", job.node,
                       f"repeat it when {job.node} answers, or begin anew elsewhere: launch submit … --resume never")


# --- carrying it out ----------------------------------------------------------------------------------------

def carry_out(index: Index, asked: RestartPlan, grace_s: float | None,
              progress: Progress) -> tuple[Job, tuple[str, ...]]:
    """End the job where it is, and bring it where it is to go on -> the job there, which has not begun yet, and what of
    it stays behind.
    """
    assert asked.move
    job, to = asked.job, asked.move.to
    old, new = reconcile.backend_of(asked.node), reconcile.backend_of(to)
    _end(job, old, grace_s)
    run_dir, stays = job.run_dir, ()
    if not asked.move.shares:
        bag = old.luggage(run_dir)
        assert asked.spec
        request = {"id": job.id, "token": asked.spec.token, "share": asked.spec.share, "luggage": bag}
        run_dir = new.arrive(request, Carried(old, job, bag["files"], progress))
        old.leave(job.run_dir, {"node": to.name, "run_dir": run_dir, "by": whoami()}, bag["attempts"])
        stays = tuple(bag["stays"])
    there = replace(job, node=to.name, run_dir=run_dir, view=job.view | {"run_dir": run_dir, "node": to.name})
    index.put(there)
    return there, stays


def _end(job: Job, old: Backend, grace_s: float | None) -> None:
    """Also what a supervisor that died has left. Raises Refused: there is nothing to go on with."""
    done = old.kill(job.run_dir, by=whoami(), grace_s=grace_s)
    if done["survivors"]:
        pids = ", ".join(str(one["pid"]) for one in done["survivors"])
        raise NodeFailure(f"{job.id} cannot be ended there: processes {pids} hang", job.node,
                          "a dead file system or driver; move it afterwards")
    if done["state"] == "COMPLETED" and job.view.get("state") not in ENDED:
        raise Refused(f"{job.id} has completed meanwhile: nothing is left to do", job.node)


class Carried(io.RawIOBase):
    """The files of a job as they come from its node, and then their sha256: as a file that is read while they come."""

    def __init__(self, old: Backend, job: Job, files: Sequence[Sequence[Any]], progress: Progress) -> None:
        self._old, self._job, self._files, self._progress = old, job, files, progress
        self._size = sum(size for _, size, *_ in files)
        self._blocks: Iterator[bytes] = iter(())
        self._rest = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """To the end, to know the size, or back to the beginning: then it is asked for again."""
        if whence == os.SEEK_END:
            return self._size + 64 * len(self._files)
        self._blocks, self._rest = self._stream(), b""
        return 0

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._blocks, b"")
        block, self._rest = self._rest[:len(buffer)], self._rest[len(buffer):]
        buffer[:len(block)] = block
        return len(block)

    def _stream(self) -> Iterator[bytes]:
        digests, arrived = [], 0
        for header, body in self._old.pull(self._job.run_dir, [(name, 0, size) for name, size, *_ in self._files]):
            if problem := header.get("problem"):
                raise NodeFailure(f"{self._files[header['file']][0]}: {problem}", self._job.node)
            if body:
                arrived += len(body)
                yield body
            if "file" in header:
                self._progress(arrived, self._size, self._files[header["file"]][0])
            if "sha256" in header:
                digests.append(header["sha256"])
        yield "".join(digests).encode()


# --- jobs that were moved by another client -----------------------------------------------------------------

def followed(jobs: Sequence[Job], start: Path, timeout_s: float) -> list[Job]:
    """These jobs, where they go on now; one whose node this client does not know or reach stays as it was."""
    from launcher.nodes import load_nodes

    known = load_nodes(start)
    gone = {job.key: job.view["moved_to"] for job in jobs if job.view.get("moved_to")}
    questions = {key: lambda to=to: reconcile.backend_of(known[to["node"]]).status([to["run_dir"]])
                 for key, to in gone.items() if to["node"] in known}
    answers = reconcile.ask_all(questions, timeout_s) if questions else {}
    found: dict[str, Job] = {}
    for key, answer in answers.items():
        views = [] if isinstance(answer, Exception) else answer["jobs"]
        if views and views[0].get("token") == key:
            found[key] = from_view(views[0], gone[key]["node"], time.time())
    return [found.get(job.key, job) for job in jobs]
