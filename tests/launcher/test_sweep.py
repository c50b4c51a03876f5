"""Which points a sweep has, and what they are called."""
from __future__ import annotations

import pytest

from launcher.errors import Wrong
from launcher.index import Job, open_index
from launcher.jobs import find, find_all
from launcher.sweep import points, split_values
from launcher.views import point


def test_values_are_split_at_commas_outside_of_brackets_and_quotes() -> None:
    assert split_values("1e-5,5e-6") == ["1e-5", "5e-6"]
    assert split_values("[1,2],[3]") == ["[1,2]", "[3]"]
    assert split_values("{a: [1, 2], b: 3},null") == ["{a: [1, 2], b: 3}", "null"]
    assert split_values("'a,b',\"c,d\",it's") == ["'a,b'", '"c,d"', "it's"]


def test_the_last_key_varies_fastest() -> None:
    assert points(["lr=1,2", "ssim=0,0.5"]) == [
        {"lr": "1", "ssim": "0"}, {"lr": "1", "ssim": "0.5"}, {"lr": "2", "ssim": "0"}, {"lr": "2", "ssim": "0.5"}]


@pytest.mark.parametrize("sweep", ["lr", "lr=", "=1", "lr=1,", "lr=[1", "lr='1"])
def test_what_is_no_sweep(sweep: str) -> None:
    with pytest.raises(Wrong):
        points([sweep])


def test_a_point_is_named_by_the_last_words_that_tell_its_keys_apart() -> None:
    assert point({"training.optimizer.lr": "1e-5", "losses.ssim": "0"}) == "lr=1e-5 ssim=0"
    assert point({"a.lr": "1", "b.lr": "2"}) == "a.lr=1 b.lr=2"
    assert point({}) == ""


def job(name: str, number: int, *, ended: bool, at: float, kind: str = "sweep") -> Job:
    job_id = f"{name}-{at:g}-{number}"
    group = {"id": name, "kind": kind, "member": str(number), "position": number}
    return Job(f"{job_id}-token", job_id, f"{name}/{number}", "local", f"/x/{job_id}", ended, at, at,
               {"group": group, "state": "COMPLETED" if ended else "RUNNING"}, name)


def test_a_name_means_the_sweep_that_has_not_ended_else_the_newest() -> None:
    with open_index() as index:
        index.put_all([job("lr", n, ended=True, at=1) for n in range(3)] + [job("lr", n, ended=n == 0, at=2)
                                                                           for n in range(12)])
        assert [one.name for one in find_all(index, "lr")] == [f"lr/{n}" for n in range(12)]
        assert find(index, "lr/3").id == "lr-2-3"
        assert [one.id for one in find_all(index, "lr-1-0")] == ["lr-1-0"]
        with pytest.raises(Wrong, match="a sweep of 12 jobs"):
            find(index, "lr")
        with pytest.raises(Wrong, match="not unique"):
            find_all(index, "lr-2-")
        index.put_all([job("tick-abc", n, ended=False, at=3) for n in range(11)])
        assert len(find_all(index, "tick-a")) == 11 and len(find_all(index, "@last")) == 11
        with pytest.raises(Wrong, match="not unique"):
            find_all(index, "tick-abc-3-")
