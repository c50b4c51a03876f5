"""Where the time of a job went: every second once, whatever ended its attempts."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.node.findings import Attempt
from cluster.node.goodput import PARTS, UNTOLD, goodput


def lines(resumed: int, last: int, t: float, pace: float = 1.0, first: float = 1.0) -> list[dict[str, Any]]:
    """From the line `resumed` at `t` to step `last`; the first step takes `first` s."""
    steps = [{"t": t + first + pace * n, "step": resumed + 1 + n, "total": 100, "loss": 1.0, "it_s": 1 / pace}
             for n in range(last - resumed)]
    return [{"t": t, "step": resumed, "total": 100, "event": "resumed"}, *steps]


def parts(attempts: list[Attempt], until: float, submitted: float = 0.0) -> dict[str, float]:
    """Those that took any time; that they add up is looked at."""
    found = goodput(attempts, submitted, until)
    assert found["wall"] == pytest.approx(until - submitted) == pytest.approx(sum(found[part] for part in PARTS))
    return {part: round(found[part], 6) for part in PARTS if found[part] > 1e-9}


def test_a_node_that_was_lost_for_hours_was_not_finishing() -> None:
    lost = Attempt(0, 10.0, 11.0, None, lines=lines(0, 30, 20.0))  # last line at 50
    again = Attempt(1, 4000.0, 4001.0, 4101.0, resume_step=20, lines=lines(20, 100, 4010.0))
    assert parts([lost, again], 4101.0) == {
        "queue": 10, "start": 20, "useful": 100, "replay": 10, "between": 3950, "finish": 11}


def test_what_was_done_again_from_the_start_is_replay() -> None:
    """Also when the attempt after the next went further back than the next."""
    first = Attempt(0, 0.0, 1.0, 41.0, lines=lines(0, 40, 1.0))
    second = Attempt(1, 41.0, 42.0, 52.0, resume_step=40, lines=lines(40, 50, 42.0))
    third = Attempt(2, 52.0, 53.0, 153.0, lines=lines(0, 100, 53.0))  # without a checkpoint
    assert parts([first, second], 52.0)["useful"] == 50
    found = parts([first, second, third], 153.0)
    assert (found["replay"], found["useful"]) == (50, 100)


def test_a_job_that_stands_still_stalls_and_one_that_waits_waits() -> None:
    stands = Attempt(0, 0.0, 1.0, None, lines=lines(0, 10, 10.0))
    assert parts([stands], 1020.0) == {"start": 10, "useful": 13, "stall": 997}
    ended = Attempt(0, 0.0, 1.0, 25.0, lines=lines(0, 10, 10.0))
    assert parts([ended], 1025.0) == {"start": 10, "useful": 10, "finish": 5, "between": 1000}


def test_what_comes_before_the_first_step_is_the_start() -> None:
    compiles = Attempt(0, 0.0, 1.0, 104.0, lines=lines(0, 10, 10.0, first=80.0))
    assert parts([compiles], 104.0) == {"start": 87, "useful": 12, "finish": 5}
    finished = Attempt(1, 200.0, None, 201.0)  # had nothing to do any more
    assert parts([compiles, finished], 201.0)["start"] == 88


def test_time_in_which_a_job_had_ended_until_a_person_restarted_it_is_not_the_jobs() -> None:
    ended = Attempt(0, 0.0, 1.0, 41.0, lines=lines(0, 40, 1.0), final=True)
    asked = Attempt(1, 990.0, 1001.0, 1061.0, resume_step=40, lines=lines(40, 100, 1001.0), by="restart", made=980.0)
    assert goodput([ended, asked], 0.0, 1061.0)["wall"] == pytest.approx(41 + 10 + 71)
    assert goodput([ended, asked], 0.0, 1061.0)["between"] == pytest.approx(10)  # it waited for its GPUs
    assert goodput([ended, Attempt(1, made=980.0)], 0.0, 985.0)["between"] == pytest.approx(5)
    assert goodput([ended], 0.0, 985.0)["wall"] == pytest.approx(41)
    lost = replace(ended, ended=None, final=False, seen=60.0)
    assert goodput([lost, asked], 0.0, 1061.0)["wall"] == pytest.approx(60 + 10 + 71)
    by_itself = [goodput([one, replace(asked, by="policy")], 0.0, 1061.0) for one in (lost, replace(ended, final=False))]
    assert [round(found["between"]) for found in by_itself] == [930, 949]


def test_nobody_can_tell_what_the_time_of_a_program_without_metrics_was() -> None:
    read = Attempt(0, 10.0, 11.0, 75.0, lines=[{"step": n, "loss": 1.0} for n in range(300)])
    expected = {"running": 65.0, "between": 0.0, "queue": 10.0}
    assert goodput([read], 0.0, 75.0) == {"wall": 75.0, **expected} and tuple(expected) == UNTOLD
    assert goodput([replace(read, lines=[])], 0.0, 75.0)["running"] == 65
