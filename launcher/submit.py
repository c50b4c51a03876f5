"""Starting a job: check everything, note the intent, then ask the node; a lost answer is asked for again."""
from __future__ import annotations

import io
import os
import re
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cluster.errors import ClusterError, Unreachable, Unusable
from cluster.inventory import Node
from cluster.spec import JobSpec, digest
from launcher import check, clients, estimates, jobs, reconcile, stages, targets, team
from launcher.control import whoami
from launcher.errors import LaunchError, Refused, Wrong
from launcher.index import Index, Intent, Job

if TYPE_CHECKING:
    from launcher.snapshot import Snapshot

ANY_S = 5.0  # `--node any`: who has not answered by then is passed over
PEERS_S = 30.0
AT_ONCE_S = 60.0  # clocks differ, and SLURM looks at its queue now and then
_CHECKPOINTS = "launch show JOB lists the checkpoints of a job; --resume never begins anew"
_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"  # nothing that is mistaken for something else


@dataclass(frozen=True)
class Draft:
    """A job that could be submitted now: everything is resolved and checked, nothing has happened yet."""

    spec: JobSpec
    node: Node
    code: Snapshot | None
    config: str | None  # config.yaml, with paths of the node
    have_code: bool  # the node has this snapshot already
    script: str | None = None  # what sbatch would be given
    notes: tuple[str, ...] = ()  # for the person: which nodes were passed over, and why
    others: tuple[Node, ...] = ()  # the other machines of the same job
    no_wait: bool = False
    force: bool = False
    known: estimates.Known = estimates.Known(None, 0.0)  # of jobs like it
    prepared: dict[str, Any] = field(default_factory=dict)  # what its node answered

    @property
    def unset_secrets(self) -> list[str]:
        """Names of the job's secrets that this environment has no value for."""
        return [name for name in self.spec.secrets if not os.environ.get(name)]


@dataclass(frozen=True)
class Submitted:
    id: str
    node: str
    run_dir: str
    pid: int | None  # of its supervisor
    attempt: int
    slurm_id: str | None = None
    place: str = ""  # gpu01,gpu02 or lab:low, where `node` alone does not say it


def draft(index: Index, request: stages.Request) -> Draft:
    """Resolve a request and ask its node whether it can take the job.

    Raises ConfigError, Wrong, TooBig and ClusterError: everything that a person can have got wrong; Refused when no
    node can take it now (`--node any`).
    """
    stages.check_request(request)
    check_name(index, request.name, request.start)
    resume = _resume_of(index, request)
    if request.node == targets.ANY:
        return _first_that_can(request, resume)
    ready = _draft_on(targets.resolve(request.node, request.start), request, resume, _Trees(), request.no_wait)
    return replace(ready, no_wait=request.no_wait)


def examined(index: Index, request: stages.Request, sure: check.Sure) -> Draft:
    """`draft` for `launch check`: what is wrong with it goes to `sure`, which may go on all the same."""
    stages.check_request(request)
    resume = sure(_resume_of, index, request) or _Resume("never")
    return _draft_on(targets.resolve(request.node, request.start), request, resume, _Trees(), sure=sure)


def _draft_on(target: targets.Target, request: stages.Request, resume: _Resume, trees: _Trees,
              now: bool = False, sure: check.Sure = check.at_once) -> Draft:
    """The job on one node; `now`: raises Refused unless it could begin at once. `sure` calls each check."""
    node, given = target.node, request
    resume = sure(_resume_on, resume, node, request) or _Resume("never")
    here = {option: stages.nearest_existing(Path(path))
            for option, path in (("--resume", resume.from_here), ("--cwd", _cwd_from_here(request))) if path}
    request = replace(request, resume=resume.value, cwd=_cwd_from_here(request) or request.cwd)
    plan = stages.plan(request, node)
    code = trees.take(plan)
    paths = stages.NO_PATHS
    if plan.run and plan.stage:
        sure(stages.check_data, plan.run, node)
        paths = stages.paths_of(plan.run, plan.stage, node, request.start, told=True)
    absolute = [resume.value] if resume.value.startswith("/") else []
    spec = replace(targets.aimed(plan.spec, target), id=new_id(plan.spec.stage), token=os.urandom(16).hex(),
                   submitted_at=time.time(), submitted_by=whoami(), code=code.code if code else plan.spec.code)
    volume = estimates.volume(plan, request)

    def asked(slurm: JobSpec | None) -> dict[str, Any]:
        return reconcile.backend_of(node).prepare(
            code_digest=code.code.digest if code else None,
            stat=[*paths.asked(), *map(str, here.values()), *absolute],
            python=spec.python, cwd=spec.cwd if request.cwd else None, slurm=slurm,
            busy=("shared" if spec.gpu_share else "alone") if now or sure is not check.at_once else "",
            cost=estimates.question(plan, volume, paths), force=request.force,
            check=check.question(plan, paths, given, resume.value if absolute else ""),
            secrets=[tell.secret for tell in spec.notify if tell.secret and not os.environ.get(tell.secret)])

    prepared = sure(asked, spec if spec.slurm else None) or asked(None)  # a job that SLURM refuses may lack more
    for option, place in here.items():
        sure(stages.check_seen, option, place, prepared["stats"], node)
    if absolute:
        sure(_check_resume, resume.value, prepared["stats"], node)
    sure(stages.check_paths, paths, prepared["stats"], node)
    sure(check_prepared, spec, prepared, node)
    warnings = sure(check.refuse, prepared.get("found", ()), node, given) or ()
    if target.peers:
        sure(_check_peers, spec, target)
        spec = sure(team.checked, spec, node, target.peers) or spec
    if now:
        _check_now(spec, prepared, node)
    config = stages.config_text(plan.run, paths.values, prepared["home"]) if plan.run else None
    cost, known = estimates.answered(plan, volume, paths, prepared)
    spec = replace(spec, resume=stages.expand(spec.resume, prepared["home"]), cost=cost,
                   config_digest=digest(config.encode()) if config is not None else None)
    return Draft(spec, node, code, config, bool(prepared.get("have_code")),
                 script=prepared["slurm"]["script"] if prepared.get("slurm") else None,
                 notes=(*warnings, *_unheard(spec, prepared, node)),
                 others=target.peers, known=known, force=request.force, prepared=prepared)


def _unheard(spec: JobSpec, prepared: dict[str, Any], node: Node) -> list[str]:
    """Who of cluster.yaml will not be told: neither this environment nor the node knows their address."""
    unknown = prepared.get("unknown_secrets", ())
    return [f"warning: notify: {tell.kind} will not be told: {tell.secret} is not set here, and {node.name} does not "
            f"know it\n  export {tell.secret}=https://…, then submit (or launch restart) gives it to the node"
            for tell in spec.notify if tell.secret in unknown]


def _check_resume(path: str, stats: dict[str, Any], node: Node) -> None:
    if stats.get(path) is None:
        raise Wrong(f"--resume: there is no {path} on this node", node.name, _CHECKPOINTS)


def _first_that_can(request: stages.Request, resume: _Resume) -> Draft:
    """All nodes are asked at once. Raises Refused with what each of them said."""
    found, trees = targets.candidates(request.start), _Trees()
    trees.take(stages.plan(request, found[0].node))  # it may take longer than nodes are given to answer
    questions = {target.node.name: lambda target=target: _draft_on(target, request, resume, trees, now=True)
                 for target in found}
    answers = reconcile.ask_all(questions, ANY_S)
    passed: list[str] = []
    for target in found:
        answer = answers[target.node.name]
        if isinstance(answer, Draft):
            return replace(answer, notes=(*passed, *answer.notes))
        passed.append(f"{target.node.name} cannot take it now: {answer.what}")
    raise Refused("no node can take this job now", hint="\n  ".join(passed))


def send(index: Index, ready: Draft) -> Submitted:
    """Start a drafted job. The intent is on disk before the node is asked, so no job is ever lost from sight.

    Raises Unreachable when twice no answer came; the next command finds out what became of it.
    """
    spec = ready.spec
    index.add_intent(Intent(spec.token, spec.id, spec.name, ready.node.name, ready.node.workdir, clients.me(),
                            time.time()))
    try:
        answer = _ask_twice(ready)
    except Unreachable as error:
        raise Unreachable(error.what, error.node, f"whether {spec.id} was started is not known; "
                          "launch status finds out as soon as the node answers") from None
    except (ClusterError, LaunchError):  # the node said no: nothing was started, nothing is to be found later
        index.drop_intent(spec.token)
        raise
    index.started(as_job(spec, ready.node, answer))
    return Submitted(answer["id"], ready.node.name, answer["run_dir"], answer.get("pid"),
                     answer.get("attempt", 0), answer.get("slurm_id"), spec.place)


def _ask_twice(ready: Draft) -> dict[str, Any]:
    """The same token again is the same job, so a submit whose answer was lost may be repeated."""
    try:
        return _ask(ready)
    except Unreachable:
        return _ask(ready)


def _ask(ready: Draft) -> dict[str, Any]:
    backend = reconcile.backend_of(ready.node)
    with packed(None if ready.have_code else ready.code) as payload:
        answer = backend.submit(ready.spec, ready.config, secret_values(ready.spec), payload, ready.no_wait,
                                ready.force)
    try:
        team.join(ready.others, answer["run_dir"])
    except (ClusterError, LaunchError):  # all of them take part or none
        backend.kill(answer["run_dir"], whoami(), now=True)
        raise
    return answer


class _Trees:
    """Looks at each tree once, also when several nodes are asked at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[tuple[Path, tuple[str, ...] | None], Snapshot] = {}

    def take(self, plan: stages.Plan) -> Snapshot | None:
        if plan.tree is None:
            return None
        from launcher import snapshot  # loads what packing takes; a job with --cwd does without

        with self._lock:
            key = (plan.tree, plan.only)
            if key not in self._taken:
                self._taken[key] = snapshot.take(plan.tree, plan.only)
            return self._taken[key]


def packed(code: Snapshot | None) -> BinaryIO:
    """What travels with a request: the code, or nothing."""
    return io.BytesIO() if code is None else code.pack()


def secret_values(spec: JobSpec) -> dict[str, str]:
    """What this environment knows of a job's secrets. They stand in no file of the job."""
    names = (*spec.secrets, *(tell.secret for tell in spec.notify if tell.secret))
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def new_id(stage: str) -> str:
    """`phase3-7kq2x9`; the node takes another ending when this one is taken."""
    stem = re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")[:40] or "job"
    return f"{stem}-{''.join(_ALPHABET[byte % len(_ALPHABET)] for byte in os.urandom(6))}"


def check_name(index: Index, name: str | None, start: Path) -> None:
    """Raises Wrong for a name that a job which has not ended has, or that is mistaken for something else."""
    if name is None:
        return
    if not name.strip() or name.startswith(("@", "-")):
        raise Wrong(f"--name {name!r}: a name begins with neither @ nor - and is not empty")
    holders = [job for job in index.with_name(name) if not job.ended]
    if holders:
        reconcile.refresh(index, holders, start)
        for job in holders:
            now = index.with_key(job.key)
            if now and not now.ended:
                raise Wrong(f"--name {name!r} is taken by {job.id} on {job.node}, which has not ended",
                            hint=f"take another name, or: launch kill {job.id}")


def check_prepared(spec: JobSpec, prepared: dict[str, Any], node: Node) -> None:
    if problem := prepared.get("env_problem"):
        raise Unusable(problem["what"], node.name, problem["hint"])
    if spec.slurm:
        return  # SLURM itself was asked about everything else
    there = _allowed(spec, prepared)
    if spec.gpus > len(there):
        asked = f"{spec.gpus} GPU{'' if spec.gpus == 1 else 's'}"
        raise Wrong(f"the job asks for {asked}, the node has {len(there) or 'none'}", node.name,
                    f"--gpus {len(there)}" + ("" if there else ": on the CPU"))


def _check_peers(spec: JobSpec, target: targets.Target) -> None:
    """The other machines of a job on several: each must be able to take its part."""
    questions = {node.name: lambda node=node: reconcile.backend_of(node).prepare(python=spec.python)
                 for node in target.peers}
    answers = reconcile.ask_all(questions, PEERS_S)
    for node in target.peers:
        answer = answers[node.name]
        if isinstance(answer, Exception):
            raise answer
        check_prepared(replace(spec, gpu_choice=None if node.gpus == "auto" else tuple(node.gpus)), answer, node)


def _check_now(spec: JobSpec, prepared: dict[str, Any], node: Node) -> None:
    """Raises Refused: the job would have to wait, or to share GPUs with others."""
    if spec.slurm:
        starts = prepared["slurm"]["starts_in_s"]
        if starts is None or starts > AT_ONCE_S:
            when = "SLURM does not say when it would start" if starts is None else f"it would start in {_age(starts)}"
            raise Refused(when, node.name)
        return
    if not spec.gpus:
        return
    there = _allowed(spec, prepared)
    busy = prepared["busy"]
    taken = [f"GPU {gpu['index']}: {busy[gpu['uuid']]}" for gpu in there if gpu["uuid"] in busy]
    if (free := len(there) - len(taken)) < spec.gpus:
        raise Refused(f"{free or 'none'} of its {len(there)} GPUs {'is' if free < 2 else 'are'} free, "
                      f"{spec.gpus} asked for; {'; '.join(taken)}", node.name)
    if prepared["line"]:
        raise Refused(f"others come first: {'; '.join(prepared['line'])}", node.name)


def _allowed(spec: JobSpec, prepared: dict[str, Any]) -> list[dict[str, Any]]:
    """The GPUs of a node that its entry in cluster.yaml allows."""
    return [gpu for gpu in prepared.get("gpus", ()) if spec.gpu_choice is None or gpu["index"] in spec.gpu_choice]


def _age(seconds: float) -> str:
    from launcher.views import age

    return age(seconds)


@dataclass(frozen=True)
class _Resume:
    value: str  # auto, never, or a path on the node
    from_here: str | None = None  # the same path when it is one of this computer, which the node must see too
    job: Job | None = None  # whose newest checkpoint is meant; then `value` is its name


def _resume_of(index: Index, request: stages.Request) -> _Resume:
    """What --resume means, before a node is known. Raises Wrong."""
    word = request.resume
    if word in ("auto", "never") or word.startswith(("/", "~")):
        return _Resume(word)
    here = os.path.normpath(request.start / word)
    if os.path.exists(here):
        return _Resume(here, here)
    if "/" in word:
        raise Wrong(f"--resume {word}: there is no such path here",
                    hint=f"give the absolute path on {request.node}, or the id of a job")
    return _Resume(word, job=jobs.find(index, word))


def _resume_on(resume: _Resume, node: Node, request: stages.Request) -> _Resume:
    """With the path of a job's checkpoint. Raises Wrong: it is on another node; Refused: it has none."""
    job = resume.job
    if job is None:
        return resume
    if job.node != node.name:
        raise Wrong(f"--resume {resume.value}: {job.id} ran on {job.node}, this job would run on {node.name}",
                    hint="give the absolute path of the checkpoint if both nodes see it")
    return _Resume(_newest_checkpoint(job, request))


def _cwd_from_here(request: stages.Request) -> str | None:
    """The directory that a relative --cwd means."""
    if request.cwd is None or request.cwd.startswith(("/", "~")):
        return None
    return os.path.normpath(request.start / request.cwd)


def _newest_checkpoint(job: Job, request: stages.Request) -> str:
    from launcher.nodes import node_named

    shown = reconcile.backend_of(node_named(job.node, request.start)).show(job.run_dir)
    good = [found["name"] for found in shown["checkpoints"] if found["verified"] is not False]
    if not good:
        raise Refused(f"--resume {request.resume}: {job.id} has no checkpoint", job.node,
                      f"--resume never begins anew; launch logs {job.id} says why it wrote none")
    return f"{job.run_dir}/checkpoints/{good[0]}"


def as_job(spec: JobSpec, node: Node, answer: dict[str, Any]) -> Job:
    """What is known of a job before it is asked about for the first time."""
    view = {"id": answer["id"], "name": spec.name, "stage": spec.stage, "node": node.name,
            "token": spec.token, "run_dir": answer["run_dir"], "state": "PENDING",
            "detail": "submitted" if spec.slurm else "starting",
            "attempt": answer.get("attempt", 0), "submitted_at": spec.submitted_at,
            "backend": "slurm" if spec.slurm else "host",
            "group": asdict(spec.group) if spec.group else None, "after": [one.run_dir for one in spec.after]}
    return jobs.from_view(view, node.name, time.time())
