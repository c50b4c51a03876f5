"""Reading what grows: metrics, output, requests."""
from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cluster.contract import AttemptDir, RunDir
from cluster.errors import Unusable
from cluster.node import control
from cluster.node.progress import Watch
from cluster.node.tail import Tail, last_bytes


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    attempt = AttemptDir(tmp_path / "000")
    attempt.logs.mkdir(parents=True)
    return attempt


def test_a_tail_returns_whole_lines_once_whatever_the_chunks(tmp_path: Path) -> None:
    path, content = tmp_path / "x", b"".join(b"line %d\n" % n for n in range(300))
    tail, found = Tail(path, block=64), []
    assert tail.lines() == []
    for begin in range(0, len(content), 37):
        with open(path, "ab") as file:
            file.write(content[begin:begin + 37])
        found += tail.lines()
    while lines := tail.lines():
        found += lines
    assert b"".join(line + b"\n" for line in found) == content


def test_a_flood_costs_one_block_and_a_truncated_file_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"".join(b"%9d\n" % n for n in range(100_000)))
    tail = Tail(path, block=1000)
    assert tail.lines(skip_to_end=True)[-1] == b"    99999" and tail.lines() == []
    path.write_bytes(b"again\n")
    assert tail.lines() == [b"again"]
    assert last_bytes(path, 3) == "in\n" and last_bytes(tmp_path / "none") == ""


def test_progress_from_metrics(attempt: AttemptDir) -> None:
    watch = Watch(attempt, {})
    lines = [{"t": 10.0, "step": 20, "event": "resumed"}]
    lines += [{"t": 11 + step / 4, "step": 20 + step, "total": 100, "applied": 19 + step, "loss": 0.5}
              for step in range(1, 41)]
    lines += [{"t": 22.0, "step": 60, "event": "checkpoint", "save_s": 41.5},
              {"t": 22.1, "step": 60, "event": "stopped"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    attempt.metrics.write_text("not json\n[1]\n" + text + '{"step": 99')
    watch.drain()
    now = watch.now
    assert (now.resumed, now.step, now.total, now.applied, now.stopped, now.checkpoint) == (20, 60, 100, 59, 60, 60)
    assert now.it_s == pytest.approx(4.0) and now.eta_s == pytest.approx(10.0) and now.save_s == 41.5
    assert not now.complete


def test_a_loss_that_is_not_finite_is_a_word(attempt: AttemptDir) -> None:
    attempt.metrics.write_text('{"step": 1, "loss": NaN}\n')
    watch = Watch(attempt, {})
    watch.drain()
    assert watch.now.loss == "nan"


def test_progress_from_words_in_the_output(attempt: AttemptDir) -> None:
    watch = Watch(attempt, {"step": r"iter ([\d,]+)", "total": r"of ([\d,]+)", "loss": r"loss (\S+)"})
    attempt.rank_log(0).write_bytes(b"iter 1,000 of 20,000 loss 0.25\nnoise \xff\xfe\niter 1,002 loss inf\r")
    watch.drain()
    assert (watch.now.step, watch.now.total, watch.now.loss) == (1002, 20000, "inf")


def test_a_request_is_made_once_seen_once_and_consumed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    asked, seen = control.Stop("me@here", grace_s=5.0, t=1.0), control.Control(run)
    assert control.ask(run, asked) and not control.ask(run, asked)
    assert seen.new_requests() == [asked] and seen.new_requests() == []
    assert control.ask(run, control.Stop("me@here", now=True))
    assert [request.now for request in seen.new_requests()] == [True]
    assert control.ask(run, control.Restart("me@here", spec="{}"))  # not seen yet: it stays for the next attempt
    seen.consume()
    assert os.listdir(run.control) == ["restart"]


def test_an_unreadable_request_is_still_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.control.mkdir()
    (run.control / "stop").write_text("{")
    assert control.Control(run).new_requests() == [control.Stop("unknown")]


def test_a_bad_spec_in_a_restart_changes_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.spec.write_text("old")
    with pytest.raises(control.BadRequest):
        control.install(run, control.Restart("me@here", time.time(), spec="{}", config="new"))
    assert run.spec.read_text() == "old" and not run.config.exists()


def test_code_that_is_not_on_the_node_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="not on this node"):
        control.install_code(RunDir(tmp_path / "runs" / "x"), "abc")
    control.install_code(RunDir(tmp_path), None)
