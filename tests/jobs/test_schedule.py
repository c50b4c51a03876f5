from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.schedule import cosine_lr


def test_the_learning_rates_are_the_public_codes(shared: Path) -> None:
    golden = json.loads((shared / "fixtures" / "schedule.json").read_bytes())["lr_cosine_total200_warm50_base2e5"]
    assert [cosine_lr(k, 200, 50, 2e-5) for k in range(len(golden))] == pytest.approx(golden, rel=1e-9, abs=1e-15)


def test_without_warm_up_the_first_update_has_the_full_rate() -> None:
    assert cosine_lr(0, 10, 0, 1.0) == 1.0


def test_a_warm_up_longer_than_the_run_divides_nothing_by_zero() -> None:
    assert [cosine_lr(k, 4, 4, 1.0) for k in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]
