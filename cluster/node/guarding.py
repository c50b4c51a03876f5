"""The rules of `launch doctor` while the job runs, and what its stage file wants done when one of them finds something.

The supervisor itself only looks at the clock. Whatever reads, judges or looks at processes is done aside, in a time
that keeps all of it below a half per cent of one core.
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.contract import AttemptDir, RunDir, merged, write_atomically
from cluster.errors import ClusterError
from cluster.events import Fired
from cluster.journal import read_events
from cluster.node import thresholds
from cluster.node.aside import Aside, AsideFailed
from cluster.node.process import Proc
from cluster.node.progress import Watch
from cluster.spec import Guard, JobSpec, digest

FIRST_S = 3.0  # after the start; shorter jobs are looked at by who asks for them
PAUSE_S = 10.0  # from one look to the next, at least
SHARE = 250  # a look takes at most this part of the time
OVERDUE_S = 60.0  # of a look
STALLED = "stalled"
_BUDGET = 192 << 10  # bytes of metrics or output that a look reads
_GPUS_EVERY_S = 300.0  # the driver is asked
_GPUS_S = 10.0  # that it may take to answer
_NEVER_ERRORS = ("slower", "starved", "gpus-idle", "overfitting", "train-val-gap", "lr-end", "unread")

Start = Callable[..., Aside]


class Guards:
    """Of one attempt, while its program runs. `look` never blocks. `will_step`: it is known to write metrics."""

    def __init__(self, attempt: AttemptDir, run: RunDir, watch: Watch, start: Start, will_step: bool) -> None:
        self._attempt, self._run, self._watch, self._start = attempt, run, watch, start
        self._looking: Aside | None = None
        self._began = 0.0  # of what is under way, time.monotonic
        self._launched = time.monotonic()
        self._next = self._launched + FIRST_S
        self._gpus_at = self._launched + _GPUS_EVERY_S
        self._judged_at = 0.0  # how far the job was when it was last judged
        # s without a step that are no stall
        self._allowed = thresholds.STALL_FIRST_STEP_S if will_step else None
        self._fired: list[str] = []
        self.news: list[str] = []  # for the journal, in words

    def look(self, members: Callable[[], list[Proc]], gpus: Sequence[str]) -> tuple[list[Fired], str | None]:
        """-> (what was found since the last call, the config for a restart when one is wanted)."""
        if self._looking is not None:
            return self._result()
        now, watch = time.monotonic(), self._watch
        if self._stands_still(now):
            self._begin(stalled, str(self._run.path), self._attempt.number, self._attempt.node,
                        now - self._since(), self._allowed, watch.now.step, [asdict(one) for one in members()], gpus)
        elif now >= self._next and watch.now.step is not None and watch.moved_at > self._judged_at:
            self._judged_at = now
            asked = gpus if now >= self._gpus_at else ()
            self._gpus_at = now + _GPUS_EVERY_S if asked else self._gpus_at
            self._begin(judge, str(self._run.path), self._attempt.number, self._attempt.node, self._fired, asked)
        return [], None

    def close(self) -> None:
        if self._looking is not None:
            self._looking.kill()
            self._looking = None

    def _stands_still(self, now: float) -> bool:
        judged = self._watch.now.step is None or self._judged_at >= self._watch.moved_at
        return (self._allowed is not None and STALLED not in self._fired and not self._watch.now.complete
                and now - self._since() > self._allowed and judged)

    def _since(self) -> float:
        return max(self._launched, self._watch.moved_at)

    def _begin(self, function: Callable[..., Any], *args: Any) -> None:
        self._looking, self._began = self._start(function, *args), time.monotonic()

    def _result(self) -> tuple[list[Fired], str | None]:
        aside = self._looking
        assert aside is not None
        if not aside.done() and time.monotonic() - self._began < OVERDUE_S:
            return [], None
        self._looking = None
        try:
            if not aside.done():
                aside.kill()
                raise AsideFailed(f"no answer in {OVERDUE_S:g} s")
            found = aside.result()
        except AsideFailed as error:
            self._next = time.monotonic() + OVERDUE_S
            self.news.append(f"the guards could not look: {error}")
            return [], None
        self._next = time.monotonic() + max(PAUSE_S, SHARE * found["took_s"])
        self._allowed = found.get("allowed", self._allowed)
        self._fired += found["keys"]
        return [Fired(**one) for one in found["fired"]], found["config"]


# --- what is done aside -------------------------------------------------------------------------------------

def judge(run_dir: str, number: int, node: int, fired: Sequence[str], gpus: Sequence[str] = ()) -> dict[str, Any]:
    """Apply the rules to what this attempt has written; those in `fired` have spoken already. Before that, write down
    how busy these GPUs are."""
    from cluster.node import doctor, pacing, rules, series

    run = RunDir(Path(run_dir))
    spec, attempt = JobSpec.from_json(run.spec.read_bytes()), run.attempt(number)
    if gpus:
        _note_use(run.attempt(number, node), gpus)
    own = series.of_attempt(attempt, spec.progress, _BUDGET)
    case = doctor.case_of(run, [attempt], merged([own]), [own], {"id": spec.id, "state": "RUNNING"})
    found = [] if node else rules.judge(replace(case, written=None))  # a stall is judged by the clock, not by files
    new = [one for one in found if _key(one.rule, one.severity) not in fired]
    return _answer(run, spec, [(one, None) for one in new]) | {"allowed": pacing.allowed_gap(case)}


def _note_use(attempt: AttemptDir, uuids: Sequence[str]) -> None:
    from cluster.node import gpus

    with suppress(ClusterError):  # a driver that hangs or fails: the next look is in five minutes
        said = gpus.utilization(_GPUS_S)
        if busy := {uuid: said[uuid] for uuid in uuids if uuid in said}:
            with open(attempt.gpu_use, "a") as file:
                file.write(json.dumps({"t": round(time.time(), 3), "busy": busy}) + "\n")


def stalled(run_dir: str, number: int, node: int, gap: float, allowed: float, step: int | None,
            processes: Sequence[dict[str, Any]], gpus: Sequence[str]) -> dict[str, Any]:
    """Look at its processes and write down what they do."""
    from cluster.node import evidence, pacing

    run = RunDir(Path(run_dir))
    attempt, spec = run.attempt(number, node), JobSpec.from_json(run.spec.read_bytes())
    attempt.evidence.mkdir(exist_ok=True)
    said, report = evidence.collect(attempt, [Proc(**one) for one in processes], gpus, spec.nodes)
    finding = pacing.standstill(spec.id, gap, allowed, step, spec.world, spec.gpus * spec.nodes)
    path = attempt.evidence / (f"node-{node}.stalled.txt" if node else "stalled.txt")
    write_atomically(path, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {finding.what}\n\n{report}".encode(errors="replace"))
    finding = replace(finding, what=f"{finding.what}: {said}")
    return _answer(run, spec, [(finding, path.relative_to(run.path).as_posix())], led=node > 0)


def _answer(run: RunDir, spec: JobSpec, found: Sequence[tuple[Any, str | None]], led: bool = False) -> dict[str, Any]:
    """What becomes of each finding. `led`: another node's supervisor decides for all."""
    fired, config = [], None
    for one, evidence in found:
        policy, text = ("log", None) if led else decide(run, spec, one.rule, one.severity)
        config = config if text is None else text
        fired.append(Fired(time.time(), one.rule, one.severity, one.what, one.cause, one.fix, policy, evidence))
    keys = [key for one in fired for key in _keys(one)]
    return {"fired": [asdict(one) for one in fired], "keys": keys, "config": config,
            "took_s": time.process_time() if not led else 0.0}


def _key(rule: str, severity: str) -> str:
    return f"{rule} {severity}"


def _keys(one: Fired) -> list[str]:
    return [_key(one.rule, one.severity), *([STALLED] if one.rule == STALLED else [])]


def decide(run: RunDir, spec: JobSpec, rule: str, severity: str) -> tuple[str, str | None]:
    """-> (the policy that holds now, the config of a restart). A job is stopped or started anew for an error, and for a
    warning of a rule that knows no errors; each rule starts it anew once."""
    guard = guard_for(spec.guards, rule)
    if severity == "info":
        return "log", None
    if guard.policy in ("log", "notify") or severity != "error" and rule not in _NEVER_ERRORS:
        return ("log" if guard.policy == "log" else "notify"), None
    if guard.policy == "checkpoint-and-stop":
        return guard.policy, None
    if any(isinstance(event, Fired) and (event.rule, event.policy) == (rule, guard.policy)
           for event in read_events(run)[0]):
        return "notify", None
    try:
        text = run.config.read_text(encoding="utf-8") if guard.set else ""
        return guard.policy, with_leaves(text, guard.set)
    except (OSError, KeyError):  # the keys were those of a config that a person has since replaced
        return "notify", None


def guard_for(guards: Sequence[Guard], rule: str) -> Guard:
    found = {one.rule: one for one in guards}
    return found.get(rule) or found.get("default") or Guard(rule)


def with_leaves(text: str, values: dict[str, Any]) -> str:
    """A config.yaml as launch writes it (block style) with other values of some scalars. A node has no YAML parser.

    Raises KeyError for a key whose line is not there.
    """
    lines, above, places = text.splitlines(), [], {}
    for index, line in enumerate(lines):
        name, colon, rest = line.partition(":")
        depth = len(name) - len(name.lstrip())
        if not colon or not name.strip() or name.lstrip().startswith(("#", "-")):
            continue
        while above and above[-1][0] >= depth:
            above.pop()
        above.append((depth, name.strip()))
        if rest.strip():
            places[".".join(word for _, word in above)] = (index, name)
    for key, value in values.items():
        index, name = places[key]
        lines[index] = f"{name}: {json.dumps(value)}"
    return "".join(f"{line}\n" for line in lines)


def restarted(spec: JobSpec, config: str) -> str:
    """The spec of a job with this config, as text."""
    return replace(spec, config_digest=digest(config.encode())).to_json().decode()
