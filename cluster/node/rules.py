"""All rules, and the word for how well a job is. Thresholds and their reasons: cluster/node/thresholds.py."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from cluster.node import learning, outputs, pacing, unread
from cluster.node.findings import Case, Finding

Health = Literal["ok", "warning", "sick", "unknown"]
Rule = Callable[[Case], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    pacing.ended_badly, pacing.ended_early, unread.unread, pacing.stalled, learning.non_finite,
    learning.updates_skipped, learning.at_chance, learning.loss_constant, learning.no_gradient, learning.weights_still,
    learning.learning_rate, outputs.white_renders, outputs.identity_copy, outputs.views_collapsed,
    outputs.embeddings_collapsed, outputs.input_ignored, outputs.no_better_than_baseline, outputs.overfitting,
    pacing.slower, pacing.starved, pacing.gpus_idle, pacing.nothing_done)
_ENDED = "ended-badly"
NAMES = (_ENDED, "ended-early", "unread", "stalled", "non-finite", "updates-skipped", "at-chance", "loss-constant",
         "no-gradient", "weights-still", "lr-stuck", "lr-end", "white-renders", "identity-copy", "views-collapsed",
         "embeddings-collapsed", "input-ignored", "no-better-than-baseline", "overfitting", "train-val-gap", "slower",
         "starved", "gpus-idle", "nothing-trained")
_SEVERITIES = ("error", "warning", "info")


def judge(case: Case) -> list[Finding]:
    """What is wrong with it, the worst first."""
    found = [finding for rule in RULES for finding in rule(case)]
    return sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity))


def health(case: Case, found: Sequence[Finding] | None = None) -> Health:
    """Of its learning: how it ended is told by its state. unknown: nothing can be seen of it, or it ended badly and is
    not sick besides. `found`: if it is judged already."""
    severities = {one.severity for one in (judge(case) if found is None else found) if one.rule != _ENDED}
    if "error" in severities:
        return "sick"
    if "warning" in severities:
        return "warning"
    return "ok" if case.steps and case.state not in pacing.ENDED_BADLY else "unknown"
