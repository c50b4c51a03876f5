"""Why an attempt ended: from exit codes, the last words of its ranks and what the kernel counted. Pure functions."""
from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from cluster.events import Reason
from cluster.node.progress import Progress

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
_DETAIL_MAX = 500
_LAST_CHARS = 4000  # of a log without an exception: where the reason may stand
_TRACEBACK = "Traceback (most recent call last):\n"

# Texts, compiled when they are needed first: most attempts end well.
_CUDA_OOM = (r"CUDA out of memory|CUDA error: out of memory|torch\.(cuda\.)?OutOfMemoryError|"
             r"CUBLAS_STATUS_ALLOC_FAILED")
_HOST_OOM = r"\bMemoryError\b|DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory"
_WORKER_GONE = r"DataLoader worker .{0,80}(killed by signal: Killed|exited unexpectedly)"
_DISK_FULL = r"No space left on device|Disk quota exceeded|\[Errno (28|122)\]"
_COMMUNICATION = (
    r"(?s)NCCL (error|WARN)|ncclInternalError|ncclSystemError|ncclRemoteError|"
    r"DistNetworkError|DistStoreError|DistBackendError|Rendezvous\w*Error|"
    r"ProcessGroupNCCL.{0,200}[Tt]imeout|collective operation timeout|gloo.{0,300}(closed|reset|refused|[Tt]imed out)|"
    r"[Cc]onnection (closed|reset) by peer|Connection was likely closed|Broken pipe|Socket [Tt]imeout|"
    r"(EADDRINUSE|[Aa]ddress already in use)|connectFullMesh|ConnectionResetError|ConnectionRefusedError")
# The trailer of a failed torchrun, and the line it logs for the first failure it sees.
_ROOT_CAUSE = r"(?s)Root Cause \(first observed failure\):.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)"
_EXIT_CODE = r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+)"
_RANK_PREFIX = r"(?m)^\[(?:default|rank)?\d+\]:\s?"
_EXCEPTION = r"^([A-Za-z_][\w.]*)(?::\s?(.*))?$"
_CONSEQUENCES = ("ChildFailedError", "SignalException", "SystemExit")  # of torchrun: never the cause
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
                 signal.SIGUSR2, signal.SIGALRM, signal.SIGXCPU}


class Retry(Enum):
    """Whether another attempt can end better. IF_PROGRESS: only when this one got further than those before it."""

    NEVER = "never"
    IF_PROGRESS = "if it made progress"
    ALWAYS = "always"


_RETRY: dict[Reason, Retry] = {
    Reason.ERROR: Retry.IF_PROGRESS, Reason.CUDA_OOM: Retry.IF_PROGRESS, Reason.HOST_OOM: Retry.ALWAYS,
    Reason.SIGNAL: Retry.ALWAYS, Reason.COMMUNICATION: Retry.ALWAYS, Reason.DISK_FULL: Retry.NEVER,
    Reason.NON_FINITE: Retry.NEVER, Reason.BAD_EXIT: Retry.NEVER, Reason.CANNOT_START: Retry.NEVER,
    Reason.DONE: Retry.NEVER,
}


@dataclass(frozen=True)
class Facts:
    """What is known when the last process of an attempt is gone and nobody had asked it to stop."""

    exit_code: int  # of the program, or of torchrun; negative: the signal that ended it
    ours: bool = False  # it writes our metrics and checkpoints, so it is complete only at its last step
    logs: Mapping[int, str] = field(default_factory=dict)  # rank -> end of its output
    agent: str | None = None  # end of torchrun's output, ours or one inside a command; None: there was none
    progress: Progress = field(default_factory=Progress)
    oom_kills: int = 0  # processes the kernel killed for memory while the attempt ran
    disk_full: bool = False  # nothing more could be written into its run directory, its own words neither


@dataclass(frozen=True)
class Verdict:
    """Why an attempt ended, and whether another one can end better."""

    reason: Reason
    detail: str
    retry: Retry = Retry.NEVER


def judge(facts: Facts) -> Verdict:
    """Why the attempt ended, in words, and whether a retry can help."""
    if facts.exit_code == 0:
        return _judge_exit_0(facts)
    if facts.ours and facts.progress.done:  # a rank that stumbles on its way out has nothing left to lose
        return Verdict(Reason.DONE, f"step {facts.progress.step}; then it ended with exit code {facts.exit_code}")
    first = first_failure(facts)
    words = _words(facts, first.rank or 0)
    reason, detail = _classify(facts, first, words)
    known = first.code == EXIT_USER_ERROR or facts.ours and words is not None and words.for_people
    return Verdict(reason, detail[:_DETAIL_MAX], Retry.NEVER if known else _RETRY[reason])


def _judge_exit_0(facts: Facts) -> Verdict:
    now = facts.progress
    if not facts.ours or now.complete or now.done:  # validation may end a run before its last step
        return Verdict(Reason.DONE, "" if now.step is None else f"step {now.step}")
    if now.stopped is not None:
        detail = f"it was told to stop at step {now.stopped}, not by launch"
        return Verdict(Reason.SIGNAL, detail, Retry.ALWAYS)
    if now.step is None:
        return Verdict(Reason.BAD_EXIT, "it exited with code 0 and never wrote a line of metrics")
    return Verdict(Reason.BAD_EXIT, f"it exited with code 0 at step {now.step} of {now.total or '?'}")


@dataclass(frozen=True)
class Words:
    """The last thing a rank said about its end."""

    rank: int
    text: str
    for_people: bool  # an `error: ` line: the program knew what was wrong

    @property
    def lost_a_peer(self) -> bool:
        return not self.for_people and bool(re.search(_COMMUNICATION, self.text))


@dataclass(frozen=True)
class First:
    """What failed first. `rank` None: torchrun itself."""

    rank: int | None
    code: int


def first_failure(facts: Facts) -> First:
    """By what torchrun saw; a rank that was killed before one that then lost its peer."""
    seen = {int(rank): int(code) for rank, code in re.findall(_EXIT_CODE, facts.agent or "")}
    root = re.search(_ROOT_CAUSE, facts.agent or "")
    if root is None:
        return First(None if facts.agent is not None and len(facts.logs) > 1 else 0, facts.exit_code)
    rank = int(root[1])
    words = last_words(facts.logs.get(rank, ""), rank)
    if words is None or words.lost_a_peer:  # SIGTERM is what torchrun itself sends to the others
        killed = [First(other, code) for other, code in seen.items() if code < 0 and code != -signal.SIGTERM]
        return next(iter(killed), First(rank, int(root[2])))
    return First(rank, int(root[2]))


def _words(facts: Facts, first: int) -> Words | None:
    """What explains the end: a real error before that of a rank that merely lost its peer, the first failed rank's
    before the others', then torchrun's own."""
    said = [words for rank in sorted(facts.logs, key=lambda r: (r != first, r))
            if (words := last_words(facts.logs[rank], rank, facts.ours))]
    real = [words for words in said if not words.lost_a_peer]
    return next(iter([*real, *said]), None) or last_words(facts.agent or "", first)


def last_words(log: str, rank: int = 0, ours: bool = True) -> Words | None:
    """The last `error: ` line, else the exception of the last traceback that is no mere consequence.

    A program of ours writes `error: ` for people and only at its end; another one's counts when no traceback
    follows it.
    """
    text = re.sub(_RANK_PREFIX, "", log)
    *_, last = text.split(_TRACEBACK)
    if errors := re.findall(r"^error: (.+)$", text if ours else last, re.MULTILINE):
        return Words(rank, errors[-1].strip(), True)
    found = [said for block in text.split(_TRACEBACK)[1:] if (said := _exception(block))]
    real = [said for said in found if not re.search(_COMMUNICATION, said)]
    return Words(rank, (real or found)[-1], False) if found else None


def _exception(block: str) -> str | None:
    """The exception line that ends a traceback: the first line after the frames that is not indented.

    What torch says about a DataLoader worker contains the worker's own traceback, which is the next block.
    """
    for line in block.splitlines():
        if not line.startswith((" ", "\t")) and line.strip():
            match = re.match(_EXCEPTION, line)
            if match is None or match[1].rsplit(".", 1)[-1] in _CONSEQUENCES:
                return None
            return line.strip()
    return None


def _classify(facts: Facts, first: First, words: Words | None) -> tuple[Reason, str]:
    code = first.code
    if code < 0 and words and words.lost_a_peer and words.rank != first.rank:
        words = None  # that rank lost the one that crashed
    text = words.text if words else ""
    if -code == signal.SIGKILL or -code in _FROM_OUTSIDE and (words is None or words.lost_a_peer):
        return _by_signal(facts, -code, _who(facts, first.rank))
    log = text or facts.logs.get(first.rank or 0, "")[-_LAST_CHARS:]
    detail = _who(facts, words.rank if words else first.rank) + (text or f"{_code(code)}: {_last_line(log)}")
    if facts.oom_kills and re.search(_WORKER_GONE, log):
        return Reason.HOST_OOM, detail
    for pattern, reason in ((_CUDA_OOM, Reason.CUDA_OOM), (_DISK_FULL, Reason.DISK_FULL), (_HOST_OOM, Reason.HOST_OOM)):
        if re.search(pattern, log):
            return reason, detail
    if text.startswith("cannot start ") or code in (126, 127) and words is None:
        return Reason.CANNOT_START, detail
    if code == EXIT_NON_FINITE and facts.ours:
        return Reason.NON_FINITE, detail
    if words.lost_a_peer if words else re.search(_COMMUNICATION, log):
        return Reason.COMMUNICATION, detail
    if code < 0 and words is None:
        return _by_signal(facts, -code, _who(facts, first.rank))
    if facts.disk_full and words is None:
        return Reason.DISK_FULL, f"{detail.removesuffix(': ')}; no space left for its log"
    return Reason.ERROR, detail.removesuffix(": ")


def _who(facts: Facts, rank: int | None) -> str:
    if len(facts.logs) == 1:
        return ""
    return "torchrun: " if rank is None else f"rank {rank}: "


def _by_signal(facts: Facts, number: int, who: str) -> tuple[Reason, str]:
    name = _code(-number)
    if number == signal.SIGKILL and facts.oom_kills:
        return Reason.HOST_OOM, f"{who}killed by the kernel because memory ran out"
    if number in _FROM_OUTSIDE:
        return Reason.SIGNAL, f"{who}ended by {name}, sent by somebody else than launch"
    return Reason.ERROR, f"{who}crashed with {name}"


def _code(code: int) -> str:
    """`exit code 3`, `SIGABRT`."""
    if code >= 0:
        return f"exit code {code}"
    return getattr(next((known for known in signal.Signals if known == -code), None), "name", f"signal {-code}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def oom_kills() -> int:
    """How many processes this kernel has killed for memory since it booted."""
    try:
        with open("/proc/vmstat", "rb") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(b"oom_kill ")), 0)
    except OSError:
        return 0
