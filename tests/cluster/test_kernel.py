"""The contract between launcher, supervisor and training code."""
from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import states
from cluster.contract import (
    BadCheckpoint, RunDir, checkpoint_name, list_checkpoints, merged_metrics, parse_checkpoint_name,
    sha256_file, verify_checkpoint, write_atomically)
from cluster.events import AttemptStarted, Event, Note, Reason, StopAsked, decode, encode
from cluster.journal import Journal, read_events, read_journal
from cluster.spec import BadSpec, JobSpec, PythonEnv, ResumeRule
from cluster.states import Ended, Heard, IllegalMove, Pending, Restarting, Running, Stopping
from tests.cluster.jobs import DONE, LAUNCHED, STARTED, command

STOP = StopAsked(12.0, "me@here", "kill", 60.0)
RETRY = replace(DONE, reason=Reason.SIGNAL, next="retry", retry_at=30.0)
EVENTS: dict[str, Event] = {
    "started": STARTED, "launched": LAUNCHED, "stop": STOP, "note": Note(13.0, "a word"), "ended": DONE,
    "retry": RETRY}
STATUSES = [
    Pending(1.0, 0), Running(1.0, 0), Stopping(1.0, 0, "me", "kill", 60.0),
    Restarting(1.0, 0, Reason.SIGNAL, "", 2.0),
    *(cls(1.0, 0, reason, "") for reason, cls in states.ENDING.items())]


def test_every_variant_has_a_word_and_meets_every_event() -> None:
    assert {type(status) for status in STATUSES} == set(states.WORDS) == set(states.Status.__args__)
    for status, (name, event) in itertools.product(STATUSES, EVENTS.items()):
        try:
            after = states.apply(status, event)
        except IllegalMove as error:
            assert states.WORDS[type(status)] in str(error)
            assert name != "note"
        else:
            assert type(after) in states.WORDS
            assert states.status_attempt(after) == 0


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_the_ending_of_one_state(reason: Reason) -> None:
    ended = states.apply(Running(1.0, 3), replace(DONE, reason=reason, checkpoint_step=5))
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.attempt, ended.checkpoint_step) == (reason, 3, 5)
    assert states.WORDS[type(ended)] in states.ENDED_WORDS


def test_an_ended_job_lives_again_only_by_a_new_attempt() -> None:
    for status in [one for one in STATUSES if isinstance(one, Ended)]:
        assert states.apply(status, STARTED) == Pending(10.0, 0, "starting")
        for name in ("launched", "stop", "ended", "retry"):
            with pytest.raises(IllegalMove):
                states.apply(status, EVENTS[name])


def test_replay_follows_a_job_through_a_retry_and_counts_what_does_not_fit() -> None:
    second = replace(STARTED, t=31.0, attempt=1)
    status, misfits = states.fold([STARTED, LAUNCHED, RETRY, second, LAUNCHED, DONE, LAUNCHED])
    assert isinstance(status, states.Completed) and status.attempt == 1
    assert misfits == 1
    assert states.fold([], 5.0) == (Pending(5.0, None, "submitted"), 0)


def test_a_supervisor_that_died_leaves_a_derived_ending() -> None:
    running = Running(11.0, 2)
    assert states.with_liveness(running, None) == running
    assert states.with_liveness(running, Heard(True, 50.0)) == running
    lost = states.with_liveness(running, Heard(False, 50.0), 400)
    assert isinstance(lost, states.Failed)
    assert (lost.at, lost.reason, lost.checkpoint_step) == (50.0, Reason.SUPERVISOR_LOST, 400)
    assert isinstance(states.with_liveness(running, Heard(False, 50.0, rebooted=True)), states.NodeFail)
    done = states.Completed(20.0, 0, Reason.DONE, "")
    assert states.with_liveness(done, Heard(False, 50.0)) == done


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_events_survive_the_journal(event: Event) -> None:
    assert decode(json.loads(json.dumps(encode(event)))) == event


def test_an_event_from_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown event"):
        decode({"v": 99, "event": "note", "t": 1.0, "text": "x"})


def test_a_torn_line_is_skipped_counted_and_swallows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps(encode(STARTED)) + "\n" + json.dumps(encode(LAUNCHED))[:20])
    journal = Journal(path)
    journal.append(STOP)
    assert journal.close()
    events, broken = read_journal(path)
    assert events == [STARTED, STOP]
    assert broken == 1
    assert read_journal(tmp_path / "none.jsonl") == ([], 0)


def test_a_journal_that_cannot_be_written_never_blocks(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "missing" / "journal.jsonl")
    journal.append(STARTED)
    assert not journal.close(timeout_s=2.0)
    assert isinstance(journal.error, FileNotFoundError)


def test_events_of_all_attempts_come_in_order_past_one_thousand(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number in (0, 2, 10, 1000):
        run.attempt(number).path.mkdir(parents=True)
        run.attempt(number).journal.write_text(json.dumps(encode(replace(STARTED, attempt=number))) + "\n")
    events, _ = read_events(run)
    assert [event.attempt for event in events if isinstance(event, AttemptStarted)] == [0, 2, 10, 1000]


def test_a_spec_is_the_same_bytes_after_a_round_trip() -> None:
    spec = command("python", "-c", "print('새; $HOME \n\"')", name="생쥐; 'x'", env={"A B": "c\nd"}, gpus=2,
                   gpu_choice=(0, 3), python=PythonEnv("conda", "lab"),
                   resume_rule=ResumeRule("glob", "c/*", "--r {path}"))
    again = JobSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()
    assert again.ranks == 1 and replace(spec, kind="torchrun").ranks == 2


def test_arguments_and_names_need_not_be_valid_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.py")
    spec = command("python", name)
    assert JobSpec.from_json(spec.to_json()) == spec
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(replace(LAUNCHED, argv=("python", name)))
    assert journal.close()
    assert read_journal(tmp_path / "journal.jsonl") == ([replace(LAUNCHED, argv=("python", name))], 0)


@pytest.mark.parametrize(("change", "words"), [
    ({"version": 2}, "version 2"), ({"colour": 1}, "unknown field 'colour'"),
    ({"python": {"kin": "x"}}, "'kin'")])
def test_a_spec_that_is_not_understood_says_what(change: dict, words: str) -> None:
    raw = json.dumps(json.loads(command("true").to_json()) | change).encode()
    with pytest.raises(BadSpec, match=words):
        JobSpec.from_json(raw)
    with pytest.raises(BadSpec, match="JSON"):
        JobSpec.from_json(b"{")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / checkpoint_name(500, 1)
    (path / "sub").mkdir(parents=True)
    files = {"model.pt": b"weights" * 100, "sub/rng.pt": b"dice"}
    for name, content in files.items():
        (path / name).write_bytes(content)
    manifest = {"version": 1, "job": "j", "attempt": 1, "step": 500, "resumed_from": None, "files": {
        name: {"size": len(content), "sha256": sha256_file(path / name)} for name, content in files.items()}}
    write_atomically(path / "manifest.json", json.dumps(manifest).encode())
    return path


def test_a_checkpoint_is_hashed_once_and_then_remembered(checkpoint: Path) -> None:
    known: dict[str, str] = {}
    assert verify_checkpoint(checkpoint, known).step == 500
    assert len(known) == 2
    times = (checkpoint / "model.pt").stat()
    with open(checkpoint / "model.pt", "r+b") as file:  # the same inode and size, another content
        file.write(b"WEIGHTS")
    with pytest.raises(BadCheckpoint, match="sha256 differs"):
        verify_checkpoint(checkpoint, known)
    os.utime(checkpoint / "model.pt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert verify_checkpoint(checkpoint, known).step == 500  # believed without reading it again


@pytest.mark.parametrize(("damage", "words"), [
    (lambda path: (path / "manifest.json").unlink(), "never finished"),
    (lambda path: (path / "manifest.json").write_text("{"), "not readable"),
    (lambda path: (path / "manifest.json").write_text('{"version": 9}'), "version 9"),
    (lambda path: (path / "sub/rng.pt").unlink(), "No such file"),
    (lambda path: (path / "model.pt").write_bytes(b"half"), "4 bytes, the manifest says 700")])
def test_a_damaged_checkpoint_never_counts(checkpoint: Path, damage: object, words: str) -> None:
    damage(checkpoint)  # type: ignore[operator]
    with pytest.raises(BadCheckpoint, match=words):
        verify_checkpoint(checkpoint)


def test_checkpoints_are_listed_newest_first_without_half_written_ones(tmp_path: Path) -> None:
    for name in ("step-00000010-a000", "step-00000010-a002", "step-00000009-a003", "best",
                 ".tmp-step-00000099-a000"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000009-a003", "step-00000010-a002", "step-00000010-a000"]
    assert list_checkpoints(tmp_path / "none") == []
    assert parse_checkpoint_name("step-123456789-a1000") == (123456789, 1000)


def test_merged_metrics_have_no_step_twice(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    series = [
        [{"step": 0, "event": "resumed"}, *({"step": step, "loss": step} for step in (1, 2, 3))],
        [{"step": 2, "event": "resumed"}, {"step": 3, "loss": 30}, {"step": 4, "loss": 40}],
        [{"step": 4, "loss": 400}]]  # a program that says nothing about its resume
    for number, lines in enumerate(series):
        run.attempt(number).path.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo'
        run.attempt(number).metrics.write_text(text)
    merged = [(line["step"], line["loss"]) for line in merged_metrics(run)]
    assert merged == [(1, 1), (2, 2), (3, 30), (4, 400)]


def test_an_atomic_write_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["heartbeat.json"]
    with pytest.raises(IsADirectoryError):
        (tmp_path / "directory").mkdir()
        write_atomically(tmp_path / "directory", b"three")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "heartbeat.json"]
