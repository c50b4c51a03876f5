"""What several tests need."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# What may differ between two metrics files of the same training.
TIMES = {"t", "it_s", "eta_s", "data_wait", "save_s", "path"}


def wait_until(predicate: Callable[[], T], timeout_s: float = 10.0, what: str = "") -> T:
    """The first true value of `predicate`, asked every 20 ms. Fails the test when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline:
            name = what or getattr(predicate, "__name__", predicate)
            raise AssertionError(f"after {timeout_s:g} s still not: {name}")
        time.sleep(0.02)
    return value
