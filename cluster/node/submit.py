"""Takes a job onto this node: all of it, or nothing of it. The same token again is the same job."""
from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from cluster.contract import AttemptDir, RunDir, rename_new, write_atomically
from cluster.errors import NodeFailure, Refused, Unreachable, Unusable
from cluster.events import AttemptEnded, AttemptStarted
from cluster.journal import read_journal
from cluster.node import environment, lingering, process, worktree
from cluster.node.agent import checked_workdir
from cluster.spec import BadSpec, JobSpec

if TYPE_CHECKING:
    import tarfile

    from cluster.node.sbatch import Names

START_S = 15.0  # how long a supervisor may take to its first heartbeat
DECIDE_S = 90.0  # who is in the way of a job is known by then
_POLL_S = 0.005
_NAMES = 100  # ids tried when one is taken


# --- questions ----------------------------------------------------------------------------------------------

def submit(request: dict[str, Any], payload: BinaryIO) -> dict[str, Any]:
    """Make the run directory, start its supervisor and wait until that lives; or hand the job to SLURM.

    With `no_wait` it is not taken, and who is in its way is said (Refused), when it could not begin at once.

    -> {id, run_dir, pid, attempt, slurm_id}
    """
    one = request | {"specs": [request["spec"]], "configs": [request.get("config")]}
    return submit_array(one, payload)["jobs"][0]


def submit_array(request: dict[str, Any], payload: BinaryIO) -> dict[str, Any]:
    """Jobs with the same code, all of them or none -> {jobs}. Several are an array of SLURM's, of which `parallel`
    run at a time (0: all).
    """
    specs = [read_spec(spec) for spec in request["specs"]]
    workdir = checked_workdir(request["workdir"], bool(request.get("force")))
    with ExitStack() as locks:
        intents = [locks.enter_context(token_file(workdir, spec.token)) for spec in specs]
        names: Names = {}
        earlier = [_earlier(workdir, intent, names) for intent in intents]
        if all(earlier):
            return {"jobs": [_job(run) for run in earlier if run]}
        snapshot = unpack_code(workdir, specs[0].code.digest, payload, request.get("payload_size", 0))
        made: list[RunDir] = []
        try:
            for number, (spec, intent) in enumerate(zip(specs, intents)):
                made.append(_take_name(workdir, spec))
                write_token(intent, made[-1].path.name)
                specs[number] = dataclasses.replace(spec, id=made[-1].path.name)
                _fill(made[-1], specs[number], request["configs"][number], snapshot)
                if request.get("adopted"):
                    write_atomically(made[-1].adopted, json.dumps(request["adopted"]).encode())
            if request.get("secrets"):
                environment.write_secrets(workdir, request["secrets"])
            _begin(made, specs, request, [intent.fileno() for intent in intents])
        except BaseException as error:
            if not _undecided(specs[0], error):
                _undo(made, intents)
            raise
    return {"jobs": [_job(run) for run in made]}


def _begin(runs: list[RunDir], specs: list[JobSpec], request: dict[str, Any], held: list[int]) -> None:
    if specs[0].slurm is None:
        _begin_here(runs, request)
        return
    from cluster.node import sbatch
    sbatch.queue_array(runs, specs, agent_of(request), request.get("parallel", 0), held)


def _begin_here(runs: list[RunDir], request: dict[str, Any]) -> None:
    """One supervisor each; when one cannot be started, those before it are ended again."""
    begun: list[RunDir] = []
    with ExitStack() as undo:
        undo.callback(_end_again, begun)
        for run in runs:
            start_supervisor(run, "submit", agent_of(request), 0)
            begun.append(run)
        if request.get("no_wait"):
            for run in runs:
                _check_begins(run)
        undo.pop_all()


def _check_begins(run: RunDir) -> None:
    """Raises Refused: it waits, and says for what."""
    deadline = time.monotonic() + DECIDE_S
    while not _has_started(run.attempt(0)):
        beat = process.read_heartbeat(run.attempt(0)) or {}
        if beat.get("gpus"):
            return
        if waits := beat.get("waits"):
            raise Refused(f"the job would have to wait: {waits}",
                          hint="without --no-wait it does; --node any takes a node that can begin now")
        if time.monotonic() > deadline:
            raise NodeFailure(f"whether the job can begin is not known after {DECIDE_S:g} s",
                              hint="the driver of the GPUs may hang: nvidia-smi on the node")
        time.sleep(_POLL_S)


def _has_started(attempt: AttemptDir) -> bool:
    return any(isinstance(event, AttemptStarted | AttemptEnded) for event in read_journal(attempt.journal)[0])


def _end_again(runs: list[RunDir]) -> None:
    from cluster.node.kill import kill_all, supervisor_of
    kill_all({"run_dirs": [str(run.path) for run in runs], "by": "launch", "now": True}, None)
    deadline = time.monotonic() + START_S
    while any(map(supervisor_of, runs)) and time.monotonic() < deadline:  # their directories are removed next
        time.sleep(_POLL_S)


def _undecided(spec: JobSpec, error: BaseException) -> bool:
    """Whether SLURM may have the job all the same: no answer came from it, or nobody waited for one."""
    return spec.slurm is not None and (isinstance(error, Unreachable) or not isinstance(error, Exception))


def _undo(made: list[RunDir], intents: list[IO[str]]) -> None:
    for run, intent in zip(made, intents):
        shutil.rmtree(run.path, ignore_errors=True)
        write_token(intent, "")


def find(request: dict[str, Any], _payload: object) -> dict[str, Any]:
    """The jobs that `tokens` became -> {found}, one for each."""
    workdir = Path(request["workdir"]).expanduser()
    names: Names = {}
    return {"found": [_find(workdir, token, names) for token in request["tokens"]]}


def _find(workdir: Path, token: str, names: Names) -> dict[str, Any]:
    """The job that a token became, after any submit of it that is still going on. `unasked`: why that is not known."""
    nothing = {"run_dir": None, "id": None, "unasked": ""}
    if not _intent_path(workdir, token).exists():
        return nothing
    with token_file(workdir, token) as intent:
        try:
            run = _earlier(workdir, intent, names)
        except Unreachable as error:
            return nothing | {"unasked": error.what}
    return nothing | ({"run_dir": str(run.path), "id": run.path.name} if run else {})


def read_spec(given: dict[str, Any] | str) -> JobSpec:
    """Raises Unusable: this agent cannot read it."""
    try:
        return JobSpec.from_json(json.dumps(given).encode() if isinstance(given, dict) else given.encode())
    except BadSpec as error:
        raise Unusable(f"the job cannot be read: {error}",
                       hint="client and node run different versions") from None


def _job(run: RunDir) -> dict[str, Any]:
    attempts = run.attempts()
    beat = (process.read_heartbeat(attempts[-1]) if attempts else None) or {}
    ids = _slurm_ids(run)
    return {"id": run.path.name, "run_dir": str(run.path), "pid": beat.get("pid"),
            "attempt": attempts[-1].number if attempts else 0, "slurm_id": ids[-1] if ids else None}


def _slurm_ids(run: RunDir) -> list[str]:
    if not run.slurm.exists():
        return []
    from cluster.node import sbatch
    return sbatch.ids_of(run)


# --- one token, one job -------------------------------------------------------------------------------------

def _intent_path(workdir: Path, token: str) -> Path:
    if not token or "/" in token or token.startswith("."):
        raise Unusable(f"{token!r} is no token")
    return workdir / ".launch" / "submits" / token


@contextmanager
def token_file(workdir: Path, token: str) -> Iterator[IO[str]]:
    """The file that says which job `token` became, locked: the same submit sent twice waits for the first
    one.
    """
    path = _intent_path(workdir, token)
    path.parent.mkdir(exist_ok=True)
    while True:
        with open(path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue  # the one before us failed and removed it
            file.seek(0)
            try:
                yield file
            finally:
                if os.fstat(file.fileno()).st_size == 0:
                    path.unlink()
            return


def _earlier(workdir: Path, intent: IO[str], names: Names) -> RunDir | None:
    """The job of an earlier submit with this token. What one left that was cut off before its supervisor lived, or
    before SLURM had it, goes. `names`: what SLURM has said before.
    """
    name = intent.read().strip()
    if not name:
        return None
    run = RunDir(workdir / "runs" / name)
    if run.spec.exists() and (run.attempts() or _in_queue(run, names)):
        return run
    shutil.rmtree(run.path, ignore_errors=True)
    return None


def _in_queue(run: RunDir, names: Names) -> bool:
    """Raises Unreachable: SLURM cannot be asked now, so nothing of the job is touched."""
    spec = JobSpec.from_json(run.spec.read_bytes())
    if spec.slurm is None:
        return False
    from cluster.node import sbatch
    return sbatch.adopt(run, spec, names)


def write_token(intent: IO[str], name: str) -> None:
    intent.seek(0)
    intent.truncate()
    intent.write(name)
    intent.flush()


def _take_name(workdir: Path, spec: JobSpec) -> RunDir:
    """Exclusive mkdir: whoever makes the directory owns the id. Taken by another job: the next free one."""
    group = spec.share == "group"
    for number in range(1, _NAMES):
        path = workdir / "runs" / (spec.id if number == 1 else f"{spec.id}-{number}")
        try:
            path.mkdir(mode=0o750 if group else 0o700)
        except FileExistsError:
            continue
        path.chmod(0o2750 if group else 0o700)
        return RunDir(path)
    raise Unusable(f"{_NAMES} jobs are named {spec.id} here", hint="give the job another --name")


def _fill(run: RunDir, spec: JobSpec, config: str | None, snapshot: Path | None) -> None:
    for directory in (run.control, run.checkpoints, run.artifacts, run.path / "attempts"):
        directory.mkdir()
    if snapshot:
        shutil.copytree(snapshot, run.code, symlinks=True)
    elif spec.cwd is not None:
        worktree.record(run, spec.cwd)
    if config is not None:
        write_atomically(run.config, config.encode())
    write_atomically(run.spec, spec.to_json())


# --- code ---------------------------------------------------------------------------------------------------

def unpack_code(workdir: Path, digest: str | None, payload: BinaryIO, size: int) -> Path | None:
    """The snapshot `digest` of this workdir, unpacked from `payload` when it is not there yet.

    Raises NodeFailure: it did not arrive whole, or holds what no snapshot holds.
    """
    if digest is None:
        return None
    target = workdir / ".launch" / "code" / digest
    if target.is_dir():
        return target
    if not size:
        raise NodeFailure(f"the code {digest[:12]} is not on this node any more", hint="submit again")
    import tarfile  # only for code that is new here
    import tempfile

    target.parent.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    aside.chmod(0o755)  # a copy of it becomes code/; who may see that, the run directory says
    try:
        with tarfile.open(fileobj=payload, mode="r|*") as archive:
            _extract(archive, aside)
        rename_new(aside, target)
    except (tarfile.TarError, EOFError) as error:
        raise NodeFailure(f"the code did not arrive whole: {error}", hint="submit again") from None
    except FileExistsError:
        pass  # another submit of the same code was faster
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _extract(archive: tarfile.TarFile, into: Path) -> None:
    """Files, directories and links, nothing outside `into` and nothing through a link."""
    links: set[PurePosixPath] = set()
    for member in archive:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or links & {name, *name.parents}:
            raise NodeFailure(f"the code holds a path that leads out of it: {member.name!r}")
        place = into / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if member.isdir():
            place.mkdir(exist_ok=True)
        elif member.issym():
            links.add(name)
            place.symlink_to(member.linkname)
        elif member.isreg():
            source = archive.extractfile(member)
            with open(place, "xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            place.chmod(0o755 if member.mode & 0o100 else 0o644)
            os.utime(place, (member.mtime, member.mtime))
        else:
            raise NodeFailure(f"the code holds what is neither file, directory nor link: {member.name!r}")


# --- the supervisor -----------------------------------------------------------------------------------------

def start_supervisor(run: RunDir, by: str, agent: list[str], number: int) -> int:
    """Start the supervisor of `run` detached and wait until attempt `number` has begun -> its pid.

    Raises NodeFailure with its last words when it ended before that; nothing of it runs then.
    """
    group = run.path.stat().st_mode & 0o040
    errors = run.path / "supervisor.err"
    with open(errors, "ab") as log:
        done = lingering.run(
            [*agent, "supervise", str(run.path), "--by", by], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=log, cwd="/", env=environment.clean(os.environ),
            start_new_session=True, umask=0o027 if group else 0o077)
    if done.returncode:
        raise NodeFailure(f"the supervisor could not be started: {last_words(errors)}")
    pid = int(done.stdout)
    started = process.start_time(pid)
    attempt = run.attempt(number)
    deadline = time.monotonic() + START_S
    while not begun(attempt):
        if started is None or not process.alive(pid, started):
            if begun(attempt):
                break
            raise NodeFailure(f"the supervisor ended at once: {last_words(errors)}")
        if time.monotonic() > deadline:
            break  # a slow node: it lives, and says more as soon as it can
        time.sleep(_POLL_S)
    return pid


def agent_of(request: dict[str, Any]) -> list[str]:
    """The command line of the agent: a client that calls these functions itself names one, else it is this
    program.
    """
    return request.get("agent") or process.agent_command()


def begun(attempt: AttemptDir) -> bool:
    """Whether a supervisor has given the attempt its first heartbeat, or its ending."""
    if process.read_heartbeat(attempt):
        return True
    events, _ = read_journal(attempt.journal)
    return any(isinstance(event, AttemptEnded) for event in events)


def last_words(errors: Path) -> str:
    from cluster.node import room  # hardly ever needed

    lines = errors.read_text(errors="replace").strip().splitlines()
    if room.is_full(errors):  # so it could not say what is in the way, and what is there is older
        return f"no space left on {errors.parent}; free some and say it again"
    return lines[-1] if lines else "it said nothing"
