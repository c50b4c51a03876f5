"""The log of a job: exact bytes, by offsets, over ranks and attempts, and never without its tail."""
from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.contract import RunDir
from cluster.errors import NodeFailure, Unusable
from cluster.events import encode
from cluster.node import logfile, logs, process
from tests.cluster.jobs import DONE, LAUNCHED, STARTED, past_run, write_journal


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A job that has ended, with two attempts of two ranks."""
    run = past_run(tmp_path, "job", [STARTED, LAUNCHED, replace(DONE, next="restart")])
    run.attempt(1).logs.mkdir(parents=True)
    write_journal(run.attempt(1).journal, [replace(STARTED, attempt=1), LAUNCHED, DONE])
    for attempt, rank in itertools.product((0, 1), (0, 1)):
        run.attempt(attempt).rank_log(rank).write_bytes(
            b"".join(b"a%d r%d line %d\n" % (attempt, rank, number) for number in range(5)))
    return run


def living(run: RunDir) -> RunDir:
    """The same job as if this process were its supervisor."""
    own = process.start_time(os.getpid())
    beat = json.loads(run.attempt(0).heartbeat.read_bytes())
    beat |= {"pid": os.getpid(), "pid_started": own, "attempt": 1}
    run.attempt(1).heartbeat.write_text(json.dumps(beat))
    write_journal(run.attempt(1).journal, [replace(STARTED, attempt=1), LAUNCHED])
    return run


def frames(run: RunDir, wait: logs.Wait = logs.sleep, **request: object) -> Iterator[logfile.Frame]:
    return logs.frames({"run_dir": str(run.path), **request}, wait)


def text(found: Iterator[logfile.Frame]) -> bytes:
    return b"".join(body for _, body in found)


def lines(attempt: int, rank: int, *numbers: int) -> bytes:
    return b"".join(b"a%d r%d line %d\n" % (attempt, rank, number) for number in numbers)


def test_by_default_rank_0_of_the_last_attempt(run: RunDir) -> None:
    found = list(frames(run))
    assert text(iter(found)) == lines(1, 0, *range(5))
    assert found[0][0] == {"f": "001/rank-0", "o": 0, "n": 65, "next": 65}
    assert found[-1][0]["end"]["state"] == "COMPLETED"


def test_ranks_and_attempts_are_chosen(run: RunDir) -> None:
    assert text(frames(run, ranks=[1], attempts=0)) == lines(0, 1, *range(5))
    assert text(frames(run, ranks="all", attempts="all")) == b"".join(
        lines(attempt, rank, *range(5)) for attempt in (0, 1) for rank in (0, 1))
    with pytest.raises(Unusable, match="no log of rank"):
        list(frames(run, ranks=[7]))
    with pytest.raises(Unusable, match="no attempt 9"):
        list(frames(run, attempts=9))


def test_the_last_lines_over_attempts(run: RunDir) -> None:
    assert text(frames(run, lines=2)) == lines(1, 0, 3, 4)
    assert text(frames(run, lines=7, attempts="all")) == lines(0, 0, 3, 4) + lines(1, 0, *range(5))
    assert text(frames(run, lines=99)) == lines(1, 0, *range(5))
    assert text(frames(run, lines=0)) == b""
    run.attempt(1).rank_log(0).write_bytes(b"one\ntwo\nunfinished")
    assert text(frames(run, lines=2)) == b"two\nunfinished"


def test_the_last_lines_of_a_big_log_are_found_from_its_end(
        run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "BLOCK", 64)
    content = [b"%d %b\n" % (number, b"x" * (number % 150)) for number in range(400)]
    run.attempt(1).rank_log(0).write_bytes(b"".join(content))
    for wanted in (1, 3, 50, 399, 400, 401):
        assert text(frames(run, lines=wanted)) == b"".join(content[-wanted:])


def test_exact_bytes_whatever_they_are(run: RunDir) -> None:
    content = os.urandom(3 * logfile.BLOCK + 17)
    run.attempt(1).rank_log(0).write_bytes(content)
    found = list(frames(run))
    assert text(iter(found)) == content
    assert max(header.get("n", 0) for header, _ in found) <= logfile.BLOCK


def test_grep_on_the_node_by_whole_lines(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "BLOCK", 100)
    content = b"".join(b"step %d loss \xff\n" % number for number in range(100)) + b"last loss, unfinished"
    run.attempt(1).rank_log(0).write_bytes(content)
    found = list(frames(run, grep=r"^step \d0 |unfinished"))
    expected = b"".join(b"step %d0 loss \xff\n" % n for n in range(1, 10)) + b"last loss, unfinished"
    assert text(iter(found)) == expected
    assert found[-2][0]["next"] == len(content)
    with pytest.raises(Unusable, match="no regular expression"):
        list(frames(run, grep="("))


def test_grep_takes_each_state_of_a_progress_bar_for_a_line(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "BLOCK", 64)
    states = [b"\r%3d%%|#| loss %d" % (number, number) for number in range(100)]
    run.attempt(1).rank_log(0).write_bytes(b"begin\r\n" + b"".join(states) + b"\nloss at last")
    assert text(frames(run, grep="loss .7$|begin")) == b"begin\r\n" + b"".join(
        b"%3d%%|#| loss %d\n" % (number, number) for number in range(17, 100, 10))
    assert text(frames(run, grep="")).count(b"\n") == 101


def test_a_line_without_end_is_searched_in_parts(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "BLOCK", 64)
    run.attempt(1).rank_log(0).write_bytes(b"x" * 1000 + b" mouse " + b"y" * 1000)
    found = list(frames(run, grep="mouse"))
    assert b"mouse" in text(iter(found)) and max(header.get("n", 0) for header, _ in found) <= 64


def test_the_last_lines_that_match(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "BLOCK", 64)
    content = [b"%d %b%b\n" % (n, b"x" * (n % 150), b" hit" * (n % 3 == 0)) for n in range(400)]
    run.attempt(1).rank_log(0).write_bytes(b"".join(content))
    hits = [line for line in content if b"hit" in line and len(line) < 64]
    for wanted in (1, 5, 20):
        assert text(frames(run, lines=wanted, grep="^[0-9]+ x{0,40} hit")).splitlines() == [
            line.rstrip() for line in hits if line.count(b"x") <= 40][-wanted:]
    assert text(frames(run, lines=2, grep="line 3", attempts="all")) == lines(0, 0, 3)
    assert text(frames(run, lines=3, grep="line 3", attempts="all", ranks=[1])) == lines(0, 1, 3) + lines(1, 1, 3)


def test_a_reader_that_was_cut_off_goes_on_where_it_was(run: RunDir) -> None:
    assert text(frames(run, offsets={"001/rank-0": 26})) == lines(1, 0, 2, 3, 4)
    across = {"000/rank-0": 52}  # the last attempt when it was cut off; there is a newer one now
    assert text(frames(run, offsets=across)) == lines(0, 0, 4) + lines(1, 0, *range(5))


def test_following_sees_new_bytes_ranks_and_attempts_and_the_tail(run: RunDir) -> None:
    """Everything happens between two looks, the last words and the ending at once."""
    living(run)

    def write(attempt: int, rank: int, content: bytes) -> None:
        run.attempt(attempt).logs.mkdir(parents=True, exist_ok=True)
        with open(run.attempt(attempt).rank_log(rank), "ab") as file:
            file.write(content)

    def next_attempt() -> None:
        write(2, 0, b"attempt 2\n")
        write_journal(run.attempt(2).journal, [replace(STARTED, attempt=2), LAUNCHED])

    def end() -> None:
        write(2, 0, b"last words")
        with open(run.attempt(2).journal, "a") as file:
            file.write(json.dumps(encode(DONE)) + "\n")

    steps = [lambda: write(1, 0, b"more\n"), lambda: write(1, 2, b"a new rank\n"), next_attempt, end]

    def wait(seconds: float, pidfd: int | None) -> bool:
        steps.pop(0)()
        return True

    found = list(frames(run, wait, follow=True, ranks="all", lines=1))
    assert text(iter(found)) == (
        lines(1, 0, 4) + lines(1, 1, 4) + b"more\n" + b"a new rank\n" + b"attempt 2\n" + b"last words")
    assert found[-1][0]["end"]["attempt"] == 2
    assert found[0][0] == {"f": "001/rank-0", "o": 52, "n": 0, "next": 52}


def test_following_one_attempt_ends_with_it(run: RunDir) -> None:
    living(run)
    found = list(frames(run, follow=True, attempts=0))
    assert text(iter(found)) == lines(0, 0, *range(5))
    assert found[-1][0]["end"]["state"] == "RUNNING"


def test_a_quiet_log_keeps_the_link_alive_and_costs_nothing(
        run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEEPALIVE_S", 0.3)
    waits: list[float] = []

    def wait(seconds: float, pidfd: int | None) -> bool:
        waits.append(seconds)
        logs.sleep(seconds, pidfd)
        return len(waits) < 25

    begun = time.process_time()
    found = list(frames(living(run), wait, follow=True))
    assert time.process_time() - begun < 5 * 0.01 * sum(waits) + 0.05
    assert [set(header) for header, _ in found if "f" not in header][:2] == [{"keepalive"}] * 2


def test_a_log_that_cannot_be_read_is_one_clear_message(run: RunDir) -> None:
    run.attempt(1).rank_log(0).unlink()
    run.attempt(1).rank_log(0).mkdir()
    with pytest.raises(NodeFailure, match="the log 001/rank-0 cannot be read: Is a directory"):
        list(frames(run))
