"""How far a job is: from its metrics, or from its output by the regular expressions of its stage file."""
from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass

from cluster.contract import AttemptDir
from cluster.node.tail import Tail

_MEMORY_S = 30.0  # the speed is an average that forgets with this time constant
_OUTPUT_BLOCK = 1 << 16
_LINE_MAX = 4096  # a regular expression never sees more of a line


@dataclass
class Progress:
    """What is known so far; None: not said yet."""

    step: int | None = None
    total: int | None = None
    applied: int | None = None
    loss: float | str | None = None
    it_s: float | None = None
    save_s: float | None = None  # the longest of the last measured saves
    resumed: int | None = None  # step of the `resumed` line
    stopped: int | None = None  # step of the `stopped` line
    checkpoint: int | None = None  # step of the newest `checkpoint` line
    done: bool = False  # the `done` line: its artifacts are written, whatever happens to its processes afterwards

    @property
    def eta_s(self) -> float | None:
        if self.it_s is None or self.total is None or self.step is None or self.it_s <= 0:
            return None
        return max(0.0, (self.total - self.step) / self.it_s)

    @property
    def complete(self) -> bool:
        """Whether it went to its end. One stopped after its last step still lacks its evaluation and artifacts."""
        return self.total is not None and self.step == self.total and self.stopped is None


def will_step(schema: str | None, config: str) -> bool:
    """Whether a job of this schema and config.yaml writes steps sooner or later: one of our trainers."""
    return schema is not None and "max_steps:" in config


class Watch:
    """Follows one attempt. `update` is cheap and bounded; `drain` reads what is left at the end."""

    def __init__(self, attempt: AttemptDir, expressions: dict[str, str]) -> None:
        self.now = Progress()
        self.moved_at = time.monotonic()  # when a line with a step, or another step, was last seen
        self._metrics = Tail(attempt.metrics)
        self._output = Tail(attempt.rank_log(0), b"\n\r", _OUTPUT_BLOCK) if expressions else None
        self._expressions = {name: re.compile(text) for name, text in expressions.items()}
        self._unfinished = b""
        self._speed_at: tuple[float, int] | None = None  # time and step of the last estimate

    def update(self) -> bool:
        """Take in one block of what is new; True when there was something."""
        lines = self._metrics.lines()
        for line in lines:
            self._take_metrics(line)
        output = self._new_output()
        said = [step for line in output if (step := self._take_output(line)) is not None]
        if said:  # lines carry no time of their own: one look, one point
            if said[-1] != self.now.step:
                self.moved_at = time.monotonic()
            self._at(said[-1], None)
        return bool(lines or output)

    def _new_output(self) -> list[bytes]:
        """New lines; when there are none, the unfinished last one, once."""
        if self._output is None:
            return []
        if lines := self._output.lines(skip_to_end=True):
            return lines
        before, self._unfinished = self._unfinished, self._output.unfinished()
        return [self._unfinished] if self._unfinished != before else []

    def drain(self) -> None:
        while self.update():
            pass

    def _take_metrics(self, line: bytes) -> None:
        try:
            values = json.loads(line)
        except ValueError:
            return
        if not isinstance(values, dict) or not isinstance(step := values.get("step"), int):
            return
        self.moved_at = time.monotonic()
        self._event(values.get("event"), step, values)
        self._at(step, values.get("t"), resumed=values.get("event") == "resumed")
        self.now.total = _int(values.get("total"), self.now.total)
        self.now.applied = _int(values.get("applied"), self.now.applied)
        if "loss" in values:
            loss = values["loss"]
            self.now.loss = str(loss) if isinstance(loss, float) and not math.isfinite(loss) else loss

    def _event(self, event: str | None, step: int, values: dict) -> None:
        if event == "resumed":
            self.now.resumed = step
        elif event == "stopped":
            self.now.stopped = step
        elif event == "done":
            self.now.done = True
        elif event == "checkpoint":
            self.now.checkpoint = step
            if isinstance(save_s := values.get("save_s"), int | float) and math.isfinite(save_s):
                self.now.save_s = float(save_s)

    def _take_output(self, line: bytes) -> int | None:
        """-> the step that the line names."""
        text, step = line[:_LINE_MAX].decode(errors="replace"), None
        for name, expression in self._expressions.items():
            match = expression.search(text)
            value = _number(match[1]) if match and match.groups() else None
            if value is None:
                continue
            if name == "loss":
                self.now.loss = value if math.isfinite(value) else str(value)
            elif name == "step" and math.isfinite(value):
                step = int(value)
            elif name == "total" and math.isfinite(value):
                self.now.total = int(value)
        return step

    def _at(self, step: int, said: object, resumed: bool = False) -> None:
        """A step was reached. The speed counts from the second one on: the first holds the start-up."""
        t = float(said) if isinstance(said, int | float) else time.time()
        self.now.step = step
        if self._speed_at is None or resumed or step < self._speed_at[1]:
            self._speed_at = None if resumed else (t, step)
            return
        elapsed, steps = t - self._speed_at[0], step - self._speed_at[1]
        if elapsed <= 0 or steps <= 0:
            return
        speed = steps / elapsed
        keep = math.exp(-elapsed / _MEMORY_S)
        self.now.it_s = speed if self.now.it_s is None else keep * self.now.it_s + (1 - keep) * speed
        self._speed_at = (t, step)


def _int(value: object, default: int | None) -> int | None:
    return value if isinstance(value, int) else default


def _number(word: str | None) -> float | None:
    try:
        return float((word or "").replace(",", ""))
    except ValueError:
        return None
