"""A job that brings its own node down is not started again for ever."""
from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.events import Event, Reason
from cluster.node import revival
from cluster.states import NodeFail
from tests.cluster.jobs import DONE, STARTED

AGAIN = replace(STARTED, by="policy")


@pytest.mark.parametrize(("events", "checkpoint", "count"), [
    ((STARTED,), None, 1),
    ((STARTED, AGAIN, AGAIN), None, 3),
    ((STARTED, AGAIN), 5, 0),  # it saved something before it was lost
    ((STARTED, replace(AGAIN, resume_step=5), replace(AGAIN, resume_step=5)), 5, 2),
    ((STARTED, AGAIN, replace(STARTED, by="restart"), AGAIN), None, 2),
    ((STARTED, replace(DONE, reason=Reason.ERROR, next="retry"), AGAIN), None, 1),
])
def test_losses_without_anything_new_are_counted(events: tuple[Event, ...], checkpoint: int | None, count: int) -> None:
    lost = NodeFail(99.0, 0, Reason.NODE_LOST, "the node was restarted", checkpoint)
    assert revival.in_vain(events, lost) == count
