"""What progress rules make of a log that they do not fit: a number that is cut, a loss that is no longer found."""
from __future__ import annotations

from collections.abc import Iterator

from cluster.node import thresholds as limit
from cluster.node.findings import Case, Finding, Line

CUT = "cut"  # the event of a line of which a rule took a part of a number: rule, at, read, meant


def unread(case: Case) -> Iterator[Finding]:
    if not case.from_log:
        return
    yield from (_cut(case, line) for line in _first_of_each(case))
    yield from _lost(case)


def _first_of_each(case: Case) -> list[Line]:
    cuts: dict[str, Line] = {}
    for line in case.lines:
        if line.get("event") == CUT:
            cuts.setdefault(line["rule"], line)
    return list(cuts.values())


def _cut(case: Case, line: Line) -> Finding:
    return Finding(
        "unread", "warning", f"the progress rule for `{line['rule']}` read {line['read']} where its output says "
        f"{line['meant']}", "every number that comes from this rule may be wrong: curves, findings, what is left",
        "a regular expression that ends inside the number: ([^\\s,]+) takes all of it, nan and 1e-05 too",
        f"launch logs {case.job} -n 20", line["at"], line["at"])


def _lost(case: Case) -> Iterator[Finding]:
    """Steps go on and no loss with them, far longer than ever before."""
    at = [index for index, line in enumerate(case.steps) if "loss" in line]
    if not at:
        return
    usual = max((after - before for before, after in zip(at, at[1:])), default=1)
    missing = len(case.steps) - 1 - at[-1]
    if missing >= max(limit.UNREAD_STEPS, limit.UNREAD_TIMES * usual):
        first, last = case.steps[at[-1] + 1]["step"], case.steps[-1]["step"]
        yield Finding(
            "unread", "warning",
            f"no loss was found in its output since step {first}, though its steps go on to {last}",
            "what is shown as its loss is old, and a loss that became nan would look just like this",
            "a loss that is nan or inf and a progress rule that takes digits only: ([^\\s,]+) takes all of it; or the "
            "program says it in other words now",
            f"launch logs {case.job} -n 20", first, last)
