"""Takes a program that was started without launch under a supervisor: what it is, where it runs, what it writes."""
from __future__ import annotations

import os
import re
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, NodeFailure, Refused, Unusable
from cluster.node import environment, process, submit, trees
from cluster.node.process import Proc
from cluster.spec import JobSpec, RestartPolicy

# What most programs print about their progress: `step 12/600`, `iter: 12`, tqdm's ` 12/600 [00:03<…`, `loss=0.12`.
_STEP_WORD = r"\b(?:global[_ ]?)?(?:step|iter(?:ation)?)s?\]?[\"']?\s*[:=#]?\s*"
PROGRESS = {
    "step": rf"(?i)(?:{_STEP_WORD}(?=\d)|(?<![\d.,/])(?=\d[\d,]*/\d[\d,]* \[))(\d[\d,]*)(?![\d,]*(?:%|\.\d))",
    "total": rf"(?i)(?:{_STEP_WORD}\d[\d,]*\s*(?:/|of)\s*|(?<![\d.,/])\d[\d,]*/(?=\d[\d,]* \[))(\d[\d,]*)",
    "loss": r"(?i)(?:\b|_)loss[\"']?\s*[:=]?\s*([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|nan|inf))",
}
_SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:(?:API|ACCESS|SECRET|PRIVATE|AUTH)?_?KEYS?|TOKENS?|SECRETS?|PASS(?:WORD|WD|PHRASE)?|CREDENTIALS?|"
    r"AUTH|COOKIES?)(?:_|$)|APIKEY")
_SECRET_VALUE = re.compile(r"^(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abp]-|AKIA)|://[^/@:]*:[^/@]+@")
# Of the login that started it: nothing of these is the program's.
_OF_A_LOGIN = ("_", "PWD", "OLDPWD", "SHLVL", "TERM", "TERMCAP", "WINDOWID", "DISPLAY", "WAYLAND_DISPLAY", "MAIL",
               "TMUX", "TMUX_PANE", "STY", "WINDOW", "LS_COLORS", "PS1", "PROMPT_COMMAND", "DBUS_SESSION_BUS_ADDRESS",
               "SYSTEMD_EXEC_PID", "INVOCATION_ID", "JOURNAL_STREAM", "HISTFILE")
_OF_A_LOGIN_TOO = ("SSH_", "XDG_", "VSCODE_", "LC_TERMINAL", "ITERM_", "BASH_FUNC_")
_SHOWN_GPUS = "CUDA_VISIBLE_DEVICES"


def adopt(request: dict[str, Any], payload: object) -> dict[str, Any]:
    """Make a job of process `pid` -> what submit says, and {root, argv, cwd, log, processes, gpus, secrets, notes}.

    Raises Unusable and Refused: it is not there, not this user's, or somebody answers for it already.
    """
    table = process.process_table()
    root = _checked(int(request["pid"]), table)
    workdir = Path(request["workdir"]).expanduser()
    argv, cwd = _command(root), _directory(root)
    log, notes = _log(root, cwd, request.get("log"))
    own, secrets = separated(_environment(root))
    gpus = _gpus(trees.Tree(root.identity).living(), notes)
    if gpus:
        own.pop(_SHOWN_GPUS, None)  # a restart is given the same ones, by its number and choice
    kept = _keep_secrets(workdir, secrets, notes)
    spec = JobSpec(
        id=request["id"], token=request["token"], stage="command", kind="command", argv=tuple(argv),
        node=request["node"], name=request["name"], env=own, secrets=tuple(sorted(kept)), cwd=cwd, gpus=len(gpus),
        gpu_choice=tuple(sorted(gpus.values())) or None, restart=RestartPolicy(0),
        progress={**PROGRESS, **request["progress"]} if log else {}, share=request["share"],
        submitted_at=request["t"], submitted_by=request["by"])
    taken = {"pid": root.pid, "started": root.started, "log": log, "gpus": list(gpus)}
    made = submit.submit({**request, "spec": asdict(spec), "config": None, "secrets": kept, "adopted": taken}, payload)
    return {**made, "root": root.pid, "argv": argv, "cwd": cwd, "log": log, "secrets": sorted(kept),
            "processes": len(trees.Tree(root.identity).living()), "gpus": sorted(gpus.values()), "notes": notes}


def separated(env: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What a program was started with -> (its environment, what of it looks like a secret)."""
    own = {name: value for name, value in environment.clean(env).items()
           if name not in _OF_A_LOGIN and not name.startswith((*_OF_A_LOGIN_TOO, "SLURM_"))}
    secrets = {name: value for name, value in own.items()
               if value and (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))}
    return {name: value for name, value in own.items() if name not in secrets}, secrets


def _checked(pid: int, table: dict[int, Proc]) -> Proc:
    """The first process of the program that `pid` is a part of."""
    here = process.hostname()
    if pid not in table:
        raise Unusable(f"there is no process {pid} on {here}", hint="what runs there: launch ps")
    owner = trees.owner(pid)
    if owner != os.getuid():
        from cluster.node.gpu_users import user_name

        raise Unusable(f"process {pid} on {here} belongs to {user_name(owner or 0)}; only your own can be adopted")
    ours = trees.above(os.getpid(), table)
    root = trees.root_of(pid, table, but=ours)
    tree = trees.Tree(root.identity)
    if job := trees.job_of(pid, table, trees.adopted_pids(table)):
        raise Refused(f"process {pid} on {here} belongs to the job {job} already",
                      hint=f"see it with: launch status {job}")
    if root.pid in ours or os.getpid() in {one.pid for one in tree.living()}:
        raise Refused(f"process {pid} on {here} is part of what runs this launch: process {root.pid}",
                      hint="a job cannot watch what waits for this command: give it in another terminal")
    return root


def _command(root: Proc) -> list[str]:
    words = process.command_of(root.pid)
    if words in ([], [""]):
        raise Unusable(f"process {root.pid} ({root.name}) shows no command line: it is the kernel's, or has ended")
    return words


def _directory(root: Proc) -> str:
    try:
        path = os.readlink(f"/proc/{root.pid}/cwd")
    except OSError as error:
        raise NodeFailure(f"the directory of process {root.pid} cannot be read: {error.strerror}") from None
    return path.removesuffix(" (deleted)")


def _environment(root: Proc) -> dict[str, str]:
    return {os.fsdecode(name): os.fsdecode(value) for name, value in process.environment_of(root.pid).items()}


def _log(root: Proc, cwd: str, given: str | None) -> tuple[str | None, list[str]]:
    """The file that its output goes to: the one that a person names, else that of its stdout or stderr."""
    if given:
        path = Path(cwd, Path(given).expanduser())
        if not path.is_file():
            raise Unusable(f"--log {given}: there is no such file on {process.hostname()}",
                           hint="a relative path is below the program's own directory, " + cwd)
        return str(path), []
    for descriptor in (1, 2):
        link = f"/proc/{root.pid}/fd/{descriptor}"
        try:
            if stat.S_ISREG(os.stat(link).st_mode) and os.path.exists(path := os.readlink(link)):
                return path, []
        except OSError:
            continue
    return None, ["its output goes to no file: no log and no progress; --log FILE names one, if there is one"]


def _gpus(living: list[Proc], notes: list[str]) -> dict[str, int]:
    """UUID -> index, of the GPUs that these processes use."""
    from cluster.node import gpu_users, gpus
    if not gpus.has_driver():
        return {}
    try:
        pids = {one.pid for one in living}
        used = {one.uuid for one in gpu_users.gpu_users() if one.pid in pids}
        return {gpu.uuid: gpu.index for gpu in gpus.list_gpus() if gpu.uuid in used}
    except ClusterError as error:
        notes.append(f"which GPUs it uses is not known: {error.what}")
        return {}


def _keep_secrets(workdir: Path, found: dict[str, str], notes: list[str]) -> dict[str, str]:
    """What the node does not know under these names yet is kept there; a job of launch may use another value."""
    known, _ = environment.read_secrets(workdir, tuple(found))
    if other := sorted(name for name, value in found.items() if known.get(name, value) != value):
        notes.append(f"{', '.join(other)}: the node knows another value than the program was started with; "
                     "a restart takes the node's")
    return {name: known.get(name, value) for name, value in found.items()}

