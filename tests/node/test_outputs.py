"""The rules over evaluations that look at more than one number: which of several findings is the one to tell."""
from __future__ import annotations

from typing import Any

import pytest

from cluster.node import rules
from cluster.node.findings import Case, Line

WELL = {"val/psnr": 19.0, "val/psnr_copy": 17.0, "val/psnr_copied": 18.0, "val/psnr_white": 12.8, "val/psnr_other": 17.0,
        "val/psnr_mean": 18.0, "val/diversity": 0.9}


def said(steps: int = 220, **values: float) -> list[tuple[str, str]]:
    """What is found in a run that evaluates every 40 steps and at its end, always the same."""
    lines: list[Line] = [{"step": step, "total": steps, "loss": 1 / step, "applied": step} for step in range(1, steps + 1)]
    named: dict[str, Any] = {f"val/{name}": value for name, value in values.items()}
    lines += [{"step": step, "total": steps, "event": "eval", "applied": step, **WELL, **named}
              for step in [*range(0, steps, 40), steps]]
    lines.sort(key=lambda line: line["step"])
    return [(one.rule, one.severity) for one in rules.judge(Case("phase1-aaaaaa", lines))]


@pytest.mark.parametrize(("values", "found"), [
    ({}, []),
    ({"diversity": 0.5, "psnr_copied": 20.9}, []),  # young: the views are not yet told apart
    ({"diversity": 0.3, "psnr": 17.7, "psnr_copied": 21.6}, [("identity-copy", "error")]),
    ({"diversity": 0.3, "psnr": 18.5, "psnr_copied": 20.0}, [("views-collapsed", "error")]),
    ({"diversity": 0.3, "psnr": 17.1, "psnr_other": 17.1, "psnr_copied": 21.0}, [("identity-copy", "error")]),
    ({"diversity": 0.0, "psnr": 12.8, "psnr_other": 12.8, "psnr_copied": 12.8}, [("white-renders", "error")]),
    ({"psnr": 18.2, "psnr_other": 18.0}, [("input-ignored", "warning")]),
    ({"psnr_input": 23.0}, []),
    ({"psnr_input": 25.0}, [("identity-copy", "warning")]),
])
def test_what_is_told_of_an_evaluation(values: dict[str, float], found: list[tuple[str, str]]) -> None:
    assert said(**values) == found


def test_a_run_that_goes_on_is_given_more_time_to_look_at_its_input() -> None:
    lines = [{"step": step, "total": 900, "event": "eval", "applied": step, **WELL, "val/psnr_other": 18.9}
             for step in range(0, 441, 40)]
    assert rules.judge(Case("a", lines, state="STOPPED")) == []


@pytest.mark.parametrize(("score", "total", "found"), [
    (9.0, 150, ["no-better-than-baseline"]),  # its learning rate was far too high
    (14.0, 150, []),  # above the white picture, below the mean one: it is only short
    (9.0, 900, []), (9.0, 40, [])])
def test_a_whole_run_that_is_worse_than_the_white_picture(score: float, total: int, found: list[str]) -> None:
    lines = [{"step": step, "total": total, "event": "eval", "applied": step, "val/psnr": value, "val/psnr_white": 13.3,
              "val/psnr_mean": 22.2} for step, value in ((0, 8.5), (min(150, total), score))]
    assert [one.rule for one in rules.judge(Case("a", lines))] == found


def test_a_gap_to_validation_is_told_from_where_it_opened_and_a_checkpoint_only_where_there_is_one() -> None:
    lines: list[Line] = []
    for step in range(1, 185):
        lines.append({"step": step, "total": 184, "loss": 1 / step})
        if step % 2 == 0:
            lines.append({"step": step, "total": 184, "event": "eval", "val/loss": max(0.03, 0.01 + step / 4000)})
    found = {one.rule: one for one in rules.judge(Case("a", lines, from_log=True))}
    assert 40 < (found["train-val-gap"].first or 0) < 120 and found["train-val-gap"].last == 184
    ours = {one.rule: one for one in rules.judge(Case("a", lines, will_step=True))}
    assert "checkpoint" not in found["overfitting"].cause and "the checkpoint of step" in ours["overfitting"].cause
