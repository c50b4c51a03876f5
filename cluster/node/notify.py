"""Telling people what became of a job, from its node: by a command, Slack, Discord or any webhook.

The journals are the spool: what an event wants told and `notified.jsonl` does not say was told, is told again, first by
the supervisor and, when that has ended before it could, by the next `launch` command that looks at this node
(`untold`). So each is told at least once, and with the same `id` when twice. All that takes time is done aside.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.contract import AttemptDir, RunDir, read_json_lines
from cluster.errors import ClusterError
from cluster.events import AttemptEnded, AttemptStarted, Event, Fired, Launched, Reason
from cluster.journal import read_journal
from cluster.node.aside import Aside, AsideFailed
from cluster.node.process import read_heartbeat
from cluster.spec import JobSpec, Tell
from cluster.states import ENDING, Completed

ONE_S = 10.0  # for telling one
PAUSE_S, PAUSE_MAX_S = 2.0, 600.0  # before it is tried again; doubles
OVERDUE_S = 120.0
GIVE_UP_S = 7 * 86400.0
_FLUSH_S = 5.0  # the journal is written by a thread
_SHORTEST_SECRET = 4  # that is cut out of what is told: shorter ones stand in every text
_LONG_PATH = 12  # of an address: a shorter one is no secret but a word
_TEXT_MAX = 1500
_BY_A_PERSON = (Reason.KILLED, Reason.RESTART_ASKED, Reason.PREEMPTED, Reason.SCHEDULER, Reason.SUPERSEDED)
_VERSION = 1


@dataclass(frozen=True)
class Message:
    """`id` is the same however often it is told."""

    id: str
    kind: str  # end, failure, stall, finding
    t: float
    attempt: int
    text: str
    facts: dict[str, Any]


class Teller:
    """The supervisor's side. Nothing here blocks but `finish`."""

    def __init__(self, run: RunDir, start: Callable[..., Aside]) -> None:
        self._run, self._start = run, start
        # t of the newest event to be told; None: all is told. An earlier supervisor may have left something.
        self._since: float | None = time.time() if run.attempts() and marked(run) else None
        self._told: float | None = None  # the same of what is being told
        self._aside: Aside | None = None
        self._began = self._next = 0.0  # time.monotonic
        self._pause = PAUSE_S
        self._unwritten = False  # it was told, and that could not be written down
        mark(run)

    def tell(self, t: float) -> None:
        """An event of that time is in the journal, or will be at once."""
        self._since, self._next, self._pause = t, 0.0, PAUSE_S

    def step(self) -> None:
        now = time.monotonic()
        if self._aside is not None:
            self._take_in(now)
        elif self._since is not None and now >= self._next:
            self._told, self._began = self._since, now
            self._aside = self._start(deliver, str(self._run.path), self._since)

    def finish(self, wait: Callable[[float], object], limit_s: float) -> None:
        """The job has ended: what is not told within the limit is left to whoever looks here next."""
        until = time.monotonic() + limit_s
        while (self._since is not None or self._aside is not None) and time.monotonic() < until:
            self.step()
            wait(0.1)
        if self._aside is not None:
            self._aside.kill()
        elif self._since is None and not self._unwritten:
            unmark(self._run)

    def _take_in(self, now: float) -> None:
        assert self._aside is not None
        if not self._aside.done():
            if now - self._began > OVERDUE_S:
                self._aside.kill()
                self._again(now)
            return
        try:
            answer = self._aside.result()
        except AsideFailed:
            answer = {"left": 1, "begun": True}
        self._aside, self._unwritten = None, self._unwritten or bool(answer.get("unwritten"))
        if answer["left"] or not answer["begun"]:
            self._again(now)
        elif self._since == self._told:  # nothing new came meanwhile
            self._since = None

    def _again(self, now: float) -> None:
        self._aside = None
        self._next, self._pause = now + self._pause, min(PAUSE_MAX_S, 2 * self._pause)


# --- what is to be told -------------------------------------------------------------------------------------

def messages(run: RunDir, spec: JobSpec, lost: AttemptEnded | None = None) -> list[Message]:
    """What the journals of a job say, oldest first. `lost`: how it ended, when its supervisor could not write that."""
    found: list[Message] = []
    attempts = [(attempt, read_journal(attempt.journal)[0]) for attempt in run.attempts()]
    begun = [one for one in attempts if one[1]] or attempts[-1:]
    for (attempt, events), (_, following) in zip(begun, [*begun[1:], (None, [])]):
        number = attempt.number
        for index, event in enumerate(events):
            if kind := kind_of(event):
                found.append(_message(spec, run, number, f"{number:03d}.{index}", kind, event))
        if said := _lost_before(attempt, events, following) if following else lost:
            found.append(_message(spec, run, number, f"{number:03d}.lost", kind_of(said), said))
    return found


def _lost_before(attempt: AttemptDir, events: Sequence[Event], following: Sequence[Event]) -> AttemptEnded | None:
    """Of an attempt that wrote no ending, though its program ran, and after which another one was begun."""
    again = next((event for event in following if isinstance(event, AttemptStarted)), None)
    if again is None or not any(isinstance(event, Launched) for event in events):
        return None
    if any(isinstance(event, AttemptEnded) for event in events):
        return None
    by_itself = again.by in ("scheduler", "policy")
    reason = Reason.NODE_LOST if by_itself else Reason.SUPERVISOR_LOST
    beat = read_heartbeat(attempt) or {}
    return AttemptEnded(beat.get("t") or events[-1].t, reason, "it wrote no ending", None, beat.get("step"), None,
                        again.resume_step, "retry" if by_itself else "end", None)


def kind_of(event: Event) -> str:
    """Empty: nobody is told of it."""
    match event:
        case Fired(policy="log"):
            return ""
        case Fired():
            return "stall" if event.rule == "stalled" else "finding"
        case AttemptEnded(next="end"):
            return "end" if event.reason in _BY_A_PERSON or ENDING[event.reason] is Completed else "failure"
        case AttemptEnded(next="retry"):
            return "failure"
        case AttemptEnded(next="requeue"):  # the scheduler's own doings are no failure
            return "" if event.reason in (*_BY_A_PERSON, Reason.TIME_LIMIT) else "failure"
    return ""


def _message(spec: JobSpec, run: RunDir, attempt: int, key: str, kind: str, event: Event) -> Message:
    facts = {name: value.value if isinstance(value, Reason) else value for name, value in asdict(event).items()
             if name not in ("t", "survivors")}
    facts |= {"name": spec.name, "stage": spec.stage, "node": spec.place, "host": os.uname().nodename,
              "run_dir": str(run.path)}
    who = f"{spec.name} ({spec.id})" if spec.name else spec.id
    return Message(f"{spec.id}/{key}", kind, getattr(event, "t", 0.0), attempt,
                   f"{who} on {spec.place}: {_words(event)}"[:_TEXT_MAX], facts)


def _words(event: Event) -> str:
    if isinstance(event, Fired):
        then = f"\nso {event.policy}" if event.policy != "notify" else ""
        return f"{event.rule}: {event.what}\nlikely {event.cause}\n{event.fix}{then}"
    assert isinstance(event, AttemptEnded)
    detail = event.detail.strip().split("\n", 1)[0]
    word = "completed" if event.reason is Reason.DONE else event.reason.value
    after = "; it is started again by itself" if event.next in ("retry", "requeue") else ""
    kept = f"; checkpoint at step {event.checkpoint_step}" if event.checkpoint_step is not None else ""
    return word + (f": {detail}" if detail else "") + ("" if event.reason is Reason.DONE else kept) + after


def pending(run: RunDir, spec: JobSpec, lost: AttemptEnded | None = None) -> list[tuple[Tell, Message]]:
    """What nobody has been told yet."""
    told = {(line.get("key"), line.get("to")) for line in read_json_lines(run.notified) if line.get("ok")}
    old = time.time() - GIVE_UP_S
    return [(tell, one) for one in messages(run, spec, lost) for tell in spec.notify
            if one.kind in tell.on and one.t > old and (one.id, address(tell)) not in told]


def address(tell: Tell) -> str:
    """Without a secret."""
    return f"{tell.kind} {tell.secret or shlex.join(tell.command)}"


# --- telling it, aside --------------------------------------------------------------------------------------

def deliver(run_dir: str, since: float | None = None, lost: AttemptEnded | None = None) -> dict[str, Any]:
    """Tell what is pending, each once -> how many are left, and why. `since`: wait until the event of that time is in
    the journal. `unwritten`: how many were told though that cannot be written down, on a full disk; `begun`: whether
    the newest attempt was, which says what became of the one before. Only from the main thread: an alarm interrupts
    it."""
    run = RunDir(Path(run_dir))
    spec = JobSpec.from_json(run.spec.read_bytes())
    with _alone(run) as alone:
        if not alone:
            return {"left": 1, "problem": "another process is telling it", "begun": True}
        if since is not None:
            _await_event(run, since)
        failed: dict[str, str] = {}
        left = unwritten = 0
        for tell, message in pending(run, spec, lost):
            to = address(tell)
            problem, written = (failed[to], True) if to in failed else _tell(run, spec, tell, message)
            if problem:
                failed[to], left = problem, left + 1
            unwritten += not written
    newest = run.attempts()[-1:]
    return {"left": left, "problem": "; ".join(failed.values()), "unwritten": unwritten,
            "begun": bool(newest) and newest[0].journal.exists()}


@contextlib.contextmanager
def _alone(run: RunDir) -> Iterator[bool]:
    """Whether no other process tells the same now."""
    lock = os.open(run.path / ".notify.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)


def _await_event(run: RunDir, t: float) -> None:
    until = time.monotonic() + _FLUSH_S
    while time.monotonic() < until:
        for attempt in reversed(run.attempts()[-2:]):
            if any(event.t >= t for event in read_journal(attempt.journal)[0]):
                return
        time.sleep(0.05)


def _tell(run: RunDir, spec: JobSpec, tell: Tell, message: Message) -> tuple[str, bool]:
    """-> (why it could not be told; empty: it was, whether that is written down)."""
    try:
        known = _secrets(run, (*spec.secrets, *(one.secret for one in spec.notify if one.secret)))
        problem = _send(tell, body(tell, message, known.values()), known)
    except ClusterError as error:
        known, problem = {}, error.what
    problem = redacted(problem, known.values())
    line = {"t": time.time(), "key": message.id, "to": address(tell), "ok": not problem, "problem": problem}
    try:
        with open(run.notified, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
        return problem, True
    except OSError:  # it is not told again and again for that
        return problem, False


def _secrets(run: RunDir, names: tuple[str, ...]) -> dict[str, str]:
    from cluster.node import environment

    return environment.read_secrets(run.path.parent.parent, names)[0]


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Without any of these values; of an address neither with what of it alone lets somebody write there."""
    found = {part for value in secrets for part in (value, *_telling_parts(value)) if len(part) >= _SHORTEST_SECRET}
    for part in sorted(found, key=len, reverse=True):
        text = text.replace(part, "***")
    return text


def _telling_parts(value: str) -> list[str]:
    """`https://user:word@host/path` -> what stands between // and @, and the path."""
    scheme, found, rest = value.partition("://")
    if not found or scheme not in ("http", "https"):
        return []
    host, _, path = rest.partition("/")
    return [host.rpartition("@")[0], path if len(path) >= _LONG_PATH else ""]


def body(tell: Tell, message: Message, secrets: Any) -> bytes:
    """What is sent: for Slack and Discord what they take, else everything."""
    text = redacted(message.text, secrets)
    if tell.kind == "slack":
        return json.dumps({"text": text}).encode()
    if tell.kind == "discord":
        return json.dumps({"content": text, "allowed_mentions": {"parse": []}}).encode()
    facts = {name: redacted(value, secrets) if isinstance(value, str) else value
             for name, value in message.facts.items()}
    return json.dumps({**facts, "version": _VERSION, "id": message.id, "kind": message.kind, "t": message.t,
                       "job": message.id.partition("/")[0], "attempt": message.attempt, "text": text}).encode()


def _send(tell: Tell, content: bytes, secrets: dict[str, str]) -> str:
    with _in_time(ONE_S):
        try:
            if tell.kind == "command":
                return _run(tell.command, content)
            if tell.secret not in secrets:
                return (f"{tell.kind}: the secret {tell.secret} is not known on this node (a submit or restart takes "
                        "it from your environment)")
            from cluster.node import webhook  # loads what a command does without

            return webhook.post(tell.kind, secrets[tell.secret], content, ONE_S)
        except TimeoutError:
            return f"{address(tell)}: no answer in {ONE_S:g} s"


@contextlib.contextmanager
def _in_time(limit_s: float) -> Iterator[None]:
    """Raises TimeoutError in whatever is being done: a server that sends a byte a second keeps no job waiting."""
    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _run(command: Sequence[str], content: bytes) -> str:
    import subprocess

    from cluster.node import environment
    try:
        program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   cwd=Path.home(), env=environment.clean(os.environ), start_new_session=True)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        said = program.communicate(content)[1].decode(errors="replace").strip().splitlines()
    except TimeoutError:  # nothing of it stays
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
        raise
    return "" if program.returncode == 0 else f"{command[0]}: exit code {program.returncode}: {' '.join(said[-1:])}"


# --- what its supervisor could not tell ---------------------------------------------------------------------

def marks(workdir: Path) -> Path:
    """A file of the name of each job of which something may be left to tell."""
    return workdir / ".launch" / "untold"


def marked(run: RunDir) -> bool:
    return (marks(run.path.parent.parent) / run.path.name).exists()


def mark(run: RunDir, looked: bool = False) -> None:
    """`looked`: all that there is now has been told."""
    place = marks(run.path.parent.parent)
    with contextlib.suppress(OSError):  # a full disk: the job goes on, and its supervisor tells
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        (place / run.path.name).write_text(str(time.time()) if looked else "")


def looked_at(run: RunDir) -> float:
    """When all that there was had been told, of a job that goes on; else 0."""
    try:
        return float((marks(run.path.parent.parent) / run.path.name).read_text() or 0.0)
    except (OSError, ValueError):
        return 0.0


def unmark(run: RunDir) -> None:
    with contextlib.suppress(OSError):
        (marks(run.path.parent.parent) / run.path.name).unlink()
