"""On a real node: cut off in any way and resumed, the losses are those of an undisturbed run, bit for bit."""
from __future__ import annotations

import os

import pytest

from tests.testbed.testbed import Testbed

from .kill_points import KINDS, cut_and_resume, reference
from .lab import Lab

FIRST_SEED = int(os.environ.get("KILL_POINT_SEED", "1"))  # another one tries other points


def check(lab: Lab, bed: Testbed, kind: str, ranks: int, seed: int) -> None:
    cut, lines = cut_and_resume(lab, bed, kind, ranks, seed)
    assert cut <= 40, f"cut at step {cut}: fewer than 20 steps are left to compare"
    assert lines == reference(lab, ranks)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kill"])  # that one: test_contract.py
def test_two_ranks(lab: Lab, testbed: Testbed, kind: str) -> None:
    check(lab, testbed, kind, 2, seed=0)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + 3))
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_many_points(lab: Lab, testbed: Testbed, kind: str, ranks: int, seed: int) -> None:
    check(lab, testbed, kind, ranks, seed)
