"""A run that was stopped or killed and resumed has the losses of one that was not, bit for bit."""
from __future__ import annotations

from pathlib import Path

import pytest

from cluster.contract import BadCheckpoint, RunDir, list_checkpoints, merged_metrics, read_json_lines, verify_checkpoint
from tests.helpers import TIMES
from tests.jobs.conftest import Start


@pytest.fixture(scope="module", params=[2, 3])
def reference(request: pytest.FixtureRequest, start: Start,
              tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict]]:
    """(ranks, metrics of a run that nothing happened to)."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert start(run, request.param) == [0] * request.param, output(run)
    lines = steps_of(run)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert len({line["loss"] for line in lines}) == 40
    return request.param, lines


def steps_of(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES}
            for line in merged_metrics(RunDir(run)) if "event" not in line]


def output(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.parent.glob("run.out.*")))


def newest_verified(run: Path) -> Path:
    for path in list_checkpoints(RunDir(run).checkpoints):
        try:
            verify_checkpoint(path)
            return path
        except BadCheckpoint:
            continue
    raise AssertionError("no verified checkpoint")


def test_sigterm_to_one_rank_stops_all_at_one_step_and_resumes_exactly(
        reference: tuple[int, list[dict]], start: Start, tmp_path: Path) -> None:
    ranks, expected = reference
    run = tmp_path / "run"
    assert start(run, ranks, fault=f"TERM:{ranks - 1}:16") == [0] * ranks, output(run)
    last = list(read_json_lines(RunDir(run).attempt(0).metrics))[-1]
    assert (last["event"], last["step"]) == ("stopped", 18)  # the end of the update that pass 16 belongs to
    checkpoint = newest_verified(run)
    assert checkpoint.name == "step-00000018-a000"
    assert start(run, ranks, attempt=1, resume=checkpoint) == [0] * ranks, output(run)
    first = next(read_json_lines(RunDir(run).attempt(1).metrics))
    assert (first["event"], first["step"]) == ("resumed", 18)
    assert steps_of(run) == expected
    assert (run / "artifacts" / "artifact").exists()


def test_a_killed_rank_ends_the_others_and_the_resume_is_exact(
        reference: tuple[int, list[dict]], start: Start, tmp_path: Path) -> None:
    ranks, expected = reference
    run = tmp_path / "run"
    codes = start(run, ranks, fault=f"KILL:{ranks - 1}:16")
    assert codes[-1] == -9 and 0 not in codes
    checkpoint = newest_verified(run)
    assert checkpoint.name == "step-00000010-a000"
    assert start(run, ranks, attempt=1, resume=checkpoint) == [0] * ranks, output(run)
    assert steps_of(run) == expected


def test_killed_while_writing_a_checkpoint_the_one_before_counts(
        reference: tuple[int, list[dict]], start: Start, tmp_path: Path) -> None:
    ranks, expected = reference
    run = tmp_path / "run"
    assert start(run, ranks, fault="SAVE:2")[0] == -9
    names = {path.name for path in RunDir(run).checkpoints.iterdir()}
    assert any(name.startswith(".tmp-step-00000020") for name in names), names
    checkpoint = newest_verified(run)
    assert checkpoint.name == "step-00000010-a000"
    assert start(run, ranks, attempt=1, resume=checkpoint) == [0] * ranks, output(run)
    assert steps_of(run) == expected
    assert not list(RunDir(run).checkpoints.glob(".tmp-*"))
