"""A run that was stopped or killed and resumed has the losses of one that was not, bit for bit."""
from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.contract import BadCheckpoint, RunDir, list_checkpoints, merged_metrics, read_json_lines, verify_checkpoint
from tests.helpers import wait_until

Start = Callable[..., list[int]]
TIMES = {"t", "it_s", "eta_s", "save_s", "path"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(run, ranks, attempt, resume, fault) -> exit codes. No process of it may outlive its rank."""
    root = Path(__file__).parents[2]
    forker = subprocess.Popen([sys.executable, "-m", "tests.jobs.ranks"], cwd=root, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert forker.stdin and forker.stdout

    def start_ranks(run: Path, ranks: int, attempt: int = 0, resume: Path | None = None, fault: str = "") -> list[int]:
        assert forker.stdin and forker.stdout
        env = {"LAUNCH_RUN_DIR": str(run), "LAUNCH_JOB_ID": run.name, "LAUNCH_ATTEMPT": str(attempt),
               "LAUNCH_RESUME": str(resume or ""), "FAULT": fault or "NONE", "OUTPUT": f"{run}.out"}
        forker.stdin.write(json.dumps({"ranks": ranks, "env": env}) + "\n")
        forker.stdin.flush()
        codes = json.loads(forker.stdout.readline())
        wait_until(lambda: session(forker.pid) == [forker.pid], what="the loader processes are gone")
        return codes

    yield start_ranks
    forker.stdin.close()
    assert forker.wait(10) == 0
    forker.stdout.close()


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


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


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
