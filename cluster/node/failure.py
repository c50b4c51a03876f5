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

_CUDA_OOM = re.compile(r"CUDA out of memory|CUDA error: out of memory|torch\.(cuda\.)?OutOfMemoryError|"
                       r"CUBLAS_STATUS_ALLOC_FAILED")
_HOST_OOM = re.compile(r"\bMemoryError\b|DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory")
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|\[Errno (28|122)\]")
_COMMUNICATION = re.compile(
    r"NCCL (error|WARN)|ncclInternalError|ncclSystemError|ncclRemoteError|DistNetworkError|DistStoreError|DistBackendError|"
    r"Rendezvous\w*Error|ProcessGroupNCCL.{0,200}[Tt]imeout|collective operation timeout|gloo.{0,300}(closed|reset|refused|"
    r"[Tt]imed out)|[Cc]onnection (closed|reset) by peer|Connection was likely closed|Broken pipe|Socket [Tt]imeout|"
    r"(EADDRINUSE|[Aa]ddress already in use)|connectFullMesh|ConnectionResetError|ConnectionRefusedError", re.DOTALL)
# The trailer of a failed torchrun, and the line it logs for the first failure it sees.
_ROOT_CAUSE = re.compile(r"Root Cause \(first observed failure\):.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)
_EXIT_CODE = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+)")
_RANK_PREFIX = re.compile(r"^\[(?:default|rank)?\d+\]:\s?", re.MULTILINE)
_EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*)(?::\s?(.*))?$")
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
    agent: str | None = None  # end of torchrun's own output; None: there was no torchrun of ours
    progress: Progress = field(default_factory=Progress)
    oom_kills: int = 0  # processes the kernel killed for memory while the attempt ran


@dataclass(frozen=True)
class Verdict:
    reason: Reason
    detail: str
    retry: Retry = Retry.NEVER


def judge(facts: Facts) -> Verdict:
    """Why the attempt ended, in words, and whether a retry can help."""
    if facts.exit_code == 0:
        return _judge_exit_0(facts)
    rank, code = first_failure(facts)
    words = _words(facts, rank)
    reason, detail = _classify(facts, rank, code, words)
    return Verdict(reason, detail[:_DETAIL_MAX], Retry.NEVER if _is_user_error(code, words) else _RETRY[reason])


def _judge_exit_0(facts: Facts) -> Verdict:
    now = facts.progress
    if not facts.ours or now.complete:
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
        return not self.for_people and bool(_COMMUNICATION.search(self.text))


def first_failure(facts: Facts) -> tuple[int, int]:
    """-> (rank that failed first, its exit code), as torchrun saw it."""
    codes = {int(rank): int(code) for rank, code in _EXIT_CODE.findall(facts.agent or "")}
    if root := _ROOT_CAUSE.search(facts.agent or ""):
        return int(root[1]), int(root[2])
    return next(iter(codes.items()), (0, facts.exit_code))


def _words(facts: Facts, first: int) -> Words | None:
    """What explains the end: a real error before that of a rank that merely lost its peer, the first failed rank's
    before the others', then torchrun's own."""
    said = [words for rank in sorted(facts.logs, key=lambda r: (r != first, r))
            if (words := last_words(facts.logs[rank], rank))]
    real = [words for words in said if not words.lost_a_peer]
    chosen = next(iter([*real, *said]), None)
    if chosen or facts.agent is None:
        return chosen
    return last_words(facts.agent, first)


def last_words(log: str, rank: int = 0) -> Words | None:
    """The last `error: ` line, else the exception of the last traceback that is not just a consequence."""
    text = _RANK_PREFIX.sub("", log)
    errors = re.findall(r"^error: (.+)$", text, re.MULTILINE)
    if errors:
        return Words(rank, errors[-1].strip(), True)
    found = [said for block in text.split("Traceback (most recent call last):\n")[1:] if (said := _exception(block))]
    real = [said for said in found if not _COMMUNICATION.search(said)]
    return Words(rank, (real or found)[-1], False) if found else None


def _exception(block: str) -> str | None:
    """The exception line that ends a traceback: the first line after the frames that is not indented.

    What torch says about a DataLoader worker contains the worker's own traceback, which is the next block.
    """
    for line in block.splitlines():
        if not line.startswith((" ", "\t")) and line.strip():
            match = _EXCEPTION.match(line)
            if match is None or match[1].rsplit(".", 1)[-1] in _CONSEQUENCES:
                return None
            return line.strip()
    return None


def _classify(facts: Facts, rank: int, code: int, words: Words | None) -> tuple[Reason, str]:
    text = words.text if words else ""
    who = f"rank {words.rank if words else rank}: " if len(facts.logs) > 1 else ""
    if code < 0 and (words is None or words.lost_a_peer or code == -signal.SIGKILL):
        return _by_signal(facts, -code, who if words is None else f"rank {rank}: " if len(facts.logs) > 1 else "")
    everything = text or (facts.logs.get(rank) or "")[-4000:]
    for pattern, reason in ((_CUDA_OOM, Reason.CUDA_OOM), (_DISK_FULL, Reason.DISK_FULL), (_HOST_OOM, Reason.HOST_OOM)):
        if pattern.search(everything):
            return reason, f"{who}{text or _last_line(everything)}"
    if code in (126, 127) and words is None or words and words.text.startswith("cannot start"):
        return Reason.CANNOT_START, f"{who}{text or _last_line(everything) or f'exit code {code}'}"
    if code == EXIT_NON_FINITE and facts.ours:
        return Reason.NON_FINITE, f"{who}{text or 'the loss or the gradients were not finite'}"
    if words and words.lost_a_peer or words is None and _COMMUNICATION.search(everything):
        return Reason.COMMUNICATION, f"{who}{text or _last_line(everything)}"
    return Reason.ERROR, f"{who}{text or f'exit code {code}: {_last_line(everything)}'.removesuffix(': ')}"


def _by_signal(facts: Facts, number: int, who: str) -> tuple[Reason, str]:
    name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
    if number == signal.SIGKILL and facts.oom_kills:
        return Reason.HOST_OOM, f"{who}killed by the kernel because memory ran out"
    if number in _FROM_OUTSIDE:
        return Reason.SIGNAL, f"{who}ended by {name}, sent by somebody else than launch"
    return Reason.ERROR, f"{who}crashed with {name}"


def _is_user_error(code: int, words: Words | None) -> bool:
    """The program itself said what a person has to change."""
    return code == EXIT_USER_ERROR or bool(words and words.for_people)


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
