"""What the processes of a job that stands still are doing: looked at before anybody ends or restarts it.

A stack is taken where that harms nobody: by a signal that the program itself waits for, or by py-spy from outside. Of
all other processes /proc says what they wait for. Runs in a process of its own beside the supervisor, and ends in time.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.contract import STACK_SIGNAL, AttemptDir, write_atomically
from cluster.errors import ClusterError
from cluster.node import sockets
from cluster.node.process import Proc, command_of, environment_of, send
from cluster.node.stopping import Identity, foreign_ranks, signed_in
from cluster.node.tail import last_bytes

ALL_S = 8.0  # for everything
_STACK_S = 1.5  # for one stack by a signal
_SPY_S = 4.0  # for one by py-spy
_SETTLED_S = 0.1  # a stack that did not grow for so long is whole
_GPUS_S = 3.0
_OTHERS_S = 5.0  # for the other nodes of a job, which see that it stands still at about the same time
_POLL_S = 0.1
_MOST = 48  # processes
_STACK_BYTES = 64 << 10
_LAST_LINES = 15
_FRAME = re.compile(r'^\s+File "(?P<file>.+?)", line (?P<line>\d+) in (?P<name>.+)$'
                    r"|^\s+(?P<spied>\S+) \((?P<place>.+?):(?P<at>\d+)\)$")
_MAIN = re.compile(r'^(Current thread |Thread \S+ \(.*\): "MainThread")')
_THREAD = re.compile(r"^(Current thread|Thread) ")
_LIBRARIES = ("/lib/python", "/site-packages/", "/dist-packages/", "<frozen")
_COLLECTIVE = ("torch/distributed/", "torch/nn/parallel/")


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} ({self.file}:{self.line})"


@dataclass
class Seen:
    """One process."""

    who: Proc
    rank: int | None
    command: str
    facts: list[str] = field(default_factory=list)  # state, what it waits for, sockets
    stack: str = ""
    by: str = ""  # what took the stack; without one: why there is none
    frames: tuple[Frame, ...] = ()  # of the main thread, the innermost first

    @property
    def own(self) -> Frame | None:
        """The innermost frame of the program's own code, else of any."""
        own = (frame for frame in self.frames if not any(part in frame.file for part in _LIBRARIES))
        return next(own, self.frames[0] if self.frames else None)

    @property
    def waits_for_others(self) -> bool:
        return any(part in frame.file for frame in self.frames for part in _COLLECTIVE)


@dataclass(frozen=True)
class Stand:
    """Where a rank is: `frame` as a person reads it."""

    rank: int
    frame: str
    waits: bool  # for other ranks, in a collective
    host: str = ""  # of a job on several nodes


def collect(attempt: AttemptDir, processes: Sequence[Proc], gpus: Sequence[str], nodes: int = 1) -> tuple[str, str]:
    """Look at `processes`, the job's on this node -> (which rank is where, in a sentence; the whole report).

    `gpus`: UUIDs of those it has; `nodes`: of the job. What the others find, the first one tells too."""
    until = time.monotonic() + ALL_S
    seen = _ranks_first(attempt, processes)
    for one in seen:
        one.facts = _facts(one.who.pid)
    for one in seen:
        if one.command:  # a kernel thread or one that ended meanwhile has none
            _take_stack(one, until)
    said = summary(seen) if nodes == 1 else _told_together(attempt, nodes, seen) or summary(seen)
    parts = [said, *_gpu_lines(gpus, until), *map(_block, seen), *_last_words(attempt)]
    return said, "\n\n".join(part for part in parts if part) + "\n"


def _ranks_first(attempt: AttemptDir, processes: Sequence[Proc]) -> list[Seen]:
    own = {identity: rank for rank, identity in signed_in(attempt).items()}
    foreign = {one.identity: _rank_of(one.pid) for one in foreign_ranks(processes)}
    ranks = own if any(one.identity in own for one in processes) else foreign
    if len(ranks) <= 1 and len(own) == 1:
        ranks = {**own, **foreign}
    seen = [Seen(one, ranks.get(one.identity), " ".join(command_of(one.pid))[:200]) for one in processes]
    return sorted(seen, key=lambda one: (one.rank is None, one.rank or 0, one.who.pid))[:_MOST]


def _rank_of(pid: int) -> int | None:
    word = environment_of(pid).get(b"RANK", b"")
    return int(word) if word.isdigit() else None


def _told_together(attempt: AttemptDir, nodes: int, seen: Sequence[Seen]) -> str:
    """Every node writes where its ranks are, and the first one reads what the others have written."""
    own = stands(seen, os.uname().nodename)
    if attempt.node:
        write_atomically(attempt.evidence / _ranks_of(attempt.node), json.dumps([asdict(one) for one in own]).encode())
        return sentence(own)
    return sentence([*own, *_of_others(attempt.evidence, {_ranks_of(node) for node in range(1, nodes)})])


def _ranks_of(node: int) -> str:
    return f"node-{node}.ranks.json"


def _of_others(evidence: Path, expected: set[str]) -> list[Stand]:
    """What the supervisors of the other nodes have found, as far as they tell it in time."""
    until = time.monotonic() + _OTHERS_S
    while not expected <= set(os.listdir(evidence)) and time.monotonic() < until:  # a list is what NFS shows fresh
        time.sleep(_POLL_S)
    found = [json.loads((evidence / name).read_bytes()) for name in expected & set(os.listdir(evidence))]
    return sorted((Stand(**one) for told in found for one in told), key=lambda one: one.rank)


# --- stacks -------------------------------------------------------------------------------------------------

def _take_stack(one: Seen, until: float) -> None:
    if time.monotonic() >= until:
        one.by = "no stack: no time was left for it"
        return
    stack, why = _by_signal(one.who.identity, min(_STACK_S, until - time.monotonic()))
    if stack:
        one.stack, one.by = stack, f"by {STACK_SIGNAL.name}, which it listens to"
    elif not _is_python(one.who.pid):
        one.by = "no stack: it is no Python"
    else:
        one.stack, spied = _by_spy(one.who.pid, min(_SPY_S, until - time.monotonic()))
        one.by = "by py-spy" if one.stack else f"no stack: {why}; {spied}"
    one.frames = frames(one.stack)


def catches(pid: int) -> bool:
    """Whether this process handles the stack signal and does not hold it back."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    masks = dict(re.findall(r"^(Sig(?:Cgt|Blk)):\s*([0-9a-f]+)$", status, re.MULTILINE))
    bit = 1 << (STACK_SIGNAL - 1)
    return bool(int(masks.get("SigCgt", "0"), 16) & bit) and not int(masks.get("SigBlk", "0"), 16) & bit


def _by_signal(who: Identity, limit_s: float) -> tuple[str, str]:
    """-> (what it then wrote to its stderr, why there is nothing)."""
    if not catches(who[0]):
        return "", f"it does not listen to {STACK_SIGNAL.name}"
    try:
        output = Path(os.readlink(f"/proc/{who[0]}/fd/2"))
        before = output.stat().st_size
    except OSError:
        return "", "its stderr is no file"
    if not output.is_file() or not send(who, STACK_SIGNAL):
        return "", "its stderr is no file"
    until, size, grew_at = time.monotonic() + limit_s, before, time.monotonic()
    while time.monotonic() < until and (size == before or time.monotonic() - grew_at < _SETTLED_S):
        time.sleep(0.01)
        now = output.stat().st_size
        if now != size:
            size, grew_at = now, time.monotonic()
    with open(output, "rb") as file:
        file.seek(before)
        said = file.read(_STACK_BYTES).decode(errors="replace")
    start = next((match.start() for match in re.finditer(_THREAD.pattern, said, re.MULTILINE)), None)
    return ("", "it wrote no stack in time") if start is None else (said[start:].rstrip(), "")


def _is_python(pid: int) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
    except OSError:
        return False


def _by_spy(pid: int, limit_s: float) -> tuple[str, str]:
    """-> (the stack, why there is none). py-spy of the job's environment, else of this one."""
    places = os.fsdecode(environment_of(pid).get(b"PATH", b"")) + os.pathsep + os.environ.get("PATH", "")
    program = shutil.which("py-spy", path=places)
    if program is None:
        return "", "py-spy is not installed (pip install py-spy, in the job's environment)"
    try:
        done = subprocess.run([program, "dump", "--nonblocking", "--pid", str(pid)], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, errors="replace", timeout=max(0.1, limit_s))
    except subprocess.TimeoutExpired:
        return "", f"py-spy did not answer in {limit_s:.0f} s"
    except OSError as error:
        return "", f"{program}: {error.strerror}"
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.rstrip(), ""
    words = (done.stderr or done.stdout).strip().splitlines()
    return "", f"py-spy was refused: {words[0] if words else f'exit code {done.returncode}'}{_why_refused()}"


def _why_refused() -> str:
    try:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip()
    except OSError:
        return ""
    return f" (kernel.yama.ptrace_scope is {scope}: only its parents may look into a process)" if scope != "0" else ""


def frames(stack: str) -> tuple[Frame, ...]:
    """Of the main thread, as faulthandler or py-spy print them; the innermost first."""
    blocks: list[list[str]] = []
    for line in stack.splitlines():
        if _THREAD.match(line):
            blocks.append([line])
        elif blocks:
            blocks[-1].append(line)
    main = next((block for block in blocks if _MAIN.match(block[0])), blocks[-1] if blocks else [])
    found = filter(None, map(_FRAME.match, main))
    return tuple(Frame(match["file"] or match["place"], int(match["line"] or match["at"]), match["name"]
                       or match["spied"]) for match in found)


# --- what the kernel knows ----------------------------------------------------------------------------------

def _facts(pid: int) -> list[str]:
    state, threads = (_first_line(f"/proc/{pid}/status", title) for title in ("State:", "Threads:"))
    wait = _first_line(f"/proc/{pid}/wchan")
    facts = [f"state {state}" if state else "it has ended",
             f"waits in the kernel's {wait}" if wait not in ("", "0") else "",
             f"{threads} threads" if threads not in ("", "1") else ""]
    return [", ".join(filter(None, facts)), *sockets.of(pid)]


def _first_line(path: str, title: str = "") -> str:
    """The rest of the first line that begins with the title; empty when it may not be read."""
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return ""
    return next((line.removeprefix(title).strip() for line in text.splitlines() if line.startswith(title)), "")


def _gpu_lines(uuids: Sequence[str], until: float) -> list[str]:
    if not uuids:
        return []
    from cluster.node import gpus

    try:
        busy = gpus.utilization(max(0.1, min(_GPUS_S, until - time.monotonic())))
    except ClusterError as error:
        return [f"GPUs: {error.what}"]
    return ["\n".join(f"GPU {uuid}: {busy[uuid]} % busy" if uuid in busy else f"GPU {uuid}: utilization unknown"
                      for uuid in uuids)]


# --- words --------------------------------------------------------------------------------------------------

def summary(seen: Sequence[Seen]) -> str:
    """Which rank is where, in a sentence; of several the one that does not take part first."""
    if known := stands(seen):
        return sentence(known)
    one = next((one for one in seen if one.rank is not None), seen[0] if seen else None)
    if one is not None and one.own:
        return f"process {one.who.pid} is in {one.own}"
    return f"process {one.who.pid}: {one.facts[0]}" if one else "no process of it was found"


def stands(seen: Sequence[Seen], host: str = "") -> list[Stand]:
    return [Stand(one.rank, str(one.own), one.waits_for_others, host)
            for one in seen if one.rank is not None and one.own]


def sentence(known: Sequence[Stand]) -> str:
    """Those that do not take part in a collective before those that wait for them there."""
    waiting = [one for one in known if one.waits]
    absent = [one for one in known if not one.waits] if waiting else known
    told = ", ".join(f"rank {one.rank}{one.host and f' on {one.host}'} is in {one.frame}" for one in absent[:4])
    if not waiting:
        return told
    named = ", ".join(str(one.rank) for one in waiting[:8])
    waits = (f"rank{'s' * (len(waiting) > 1)} {named} wait{'s' * (len(waiting) == 1)} in a collective, in "
             f"{waiting[0].frame}")
    return f"{told}; {waits}" if absent else waits


def _name(one: Seen) -> str:
    return f"process {one.who.pid}" if one.rank is None else f"rank {one.rank}"


def _block(one: Seen) -> str:
    title = f"{_name(one)}  " + (f"pid {one.who.pid}  " if one.rank is not None else "") + (one.command or one.who.name)
    lines = [*one.facts, f"stack {one.by}" if one.stack else one.by, *one.stack.splitlines()]
    return "\n".join([title, *(f"  {line}" for line in lines if line)])


def _last_words(attempt: AttemptDir) -> list[str]:
    """The ends of its logs, without the stacks that were just written there."""
    found = []
    for path in sorted(attempt.logs.glob("*.log")):
        text = re.split(r"(?m)^(?:Current thread|Thread) 0x", last_bytes(path, 1 << 16))[0]
        last = [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-_LAST_LINES:]
        if last and not path.name.startswith("supervisor"):
            found.append("\n".join([f"the end of logs/{path.name}", *(f"  {line[:400]}" for line in last)]))
    return found
