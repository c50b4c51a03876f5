"""What an attempt resumes from: damaged, half-written and fenced checkpoints never count."""
from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.contract import MANIFEST, RunDir, checkpoint_name
from cluster.errors import Unusable
from cluster.events import AttemptEnded, AttemptStarted, Reason
from cluster.journal import Journal
from cluster.node import resume
from cluster.spec import JobSpec, ResumeRule

SPEC = JobSpec(id="j", token="t", stage="s", kind="python", argv=("x",), node="local", resume_rule=ResumeRule("launch"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "j")
    run.checkpoints.mkdir(parents=True)
    return run


def begin(run: RunDir, number: int, found: tuple[str, ...] = (), spec: JobSpec = SPEC, t: float = 100.0,
          ended: float | None = None) -> None:
    attempt = run.attempt(number)
    attempt.path.mkdir(parents=True)
    attempt.spec.write_bytes(spec.to_json())
    journal = Journal(attempt.journal)
    journal.append(AttemptStarted(t, number, "submit", "h", "b", 1, 1, found, None, None))
    if ended is not None:
        journal.append(AttemptEnded(ended, Reason.SIGNAL, "", -9, None, None, None, "retry", None))
    journal.close()


def checkpoint(run: RunDir, step: int, attempt: int, content: bytes = b"weights") -> Path:
    path = run.checkpoints / checkpoint_name(step, attempt)
    path.mkdir()
    (path / "model.bin").write_bytes(content)
    files = {"model.bin": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (path / MANIFEST).write_text(json.dumps(
        {"version": 1, "job": "j", "attempt": attempt, "step": step, "resumed_from": None, "files": files}))
    return path


def choose(run: RunDir, number: int, spec: JobSpec = SPEC) -> resume.Resume:
    return resume.choose(run, number, spec, str(run.path), dict(os.environ))


def test_the_first_attempt_starts_from_the_start(run: RunDir) -> None:
    assert choose(run, 0) == resume.Resume()


def test_the_newest_whole_one_is_taken_and_the_damaged_ones_are_named(run: RunDir) -> None:
    begin(run, 0)
    checkpoint(run, 100, 0)
    good = checkpoint(run, 200, 0)
    (checkpoint(run, 300, 0) / "model.bin").write_bytes(b"weighTs")
    (checkpoint(run, 400, 0) / "model.bin").write_bytes(b"weig")
    (checkpoint(run, 500, 0) / MANIFEST).unlink()
    (run.checkpoints / ".tmp-step-00000600-a000").mkdir()
    (checkpoint(run, 700, 0) / MANIFEST).write_text('{"version": 1')
    checkpoint(run, 650, 0).rename(run.checkpoints / checkpoint_name(800, 0))
    chosen = choose(run, 1)
    assert (chosen.path, chosen.step) == (str(good), 200)
    assert [note.split()[1] for note in chosen.notes] == [checkpoint_name(n, 0) for n in (800, 700, 500, 400, 300)]
    assert "sha256 differs" in chosen.notes[-1] and "another checkpoint" in chosen.notes[0]


def test_a_hash_is_checked_once_and_again_when_the_file_changed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(run, 0)
    path = checkpoint(run, 100, 0)
    assert choose(run, 1).step == 100
    hashed = []
    monkeypatch.setattr("cluster.contract.sha256_file", lambda file: hashed.append(file) or "")
    assert choose(run, 1).step == 100 and not hashed
    (path / "model.bin").write_bytes(b"WEIGHTS")
    assert choose(run, 1).path is None and hashed


def test_what_an_older_attempt_writes_later_never_counts(run: RunDir) -> None:
    begin(run, 0)
    checkpoint(run, 100, 0)
    begin(run, 1, found=(checkpoint_name(100, 0),))
    checkpoint(run, 150, 1)
    checkpoint(run, 900, 0)  # attempt 0 was believed dead and was not
    assert choose(run, 2).step == 150
    begin(run, 2, found=tuple(path.name for path in resume.counting_checkpoints(run, 2)))
    assert choose(run, 3).step == 150


def test_a_path_is_for_the_first_attempt_and_own_checkpoints_come_before_it(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "runs" / "other")
    other.checkpoints.mkdir(parents=True)
    named = checkpoint(other, 5000, 3)
    spec = JobSpec(**{**vars(SPEC), "resume": str(named)})
    assert choose(run, 0, spec).step == 5000
    begin(run, 0, spec=spec)
    checkpoint(run, 5100, 0)
    assert choose(run, 1, spec).step == 5100
    (named / "model.bin").write_bytes(b"damaged")
    with pytest.raises(Unusable, match="does not verify"):
        choose(RunDir(tmp_path / "runs" / "third"), 0, spec)


def test_never_at_a_restart_leaves_older_checkpoints_alone_but_not_its_own(run: RunDir) -> None:
    begin(run, 0)
    checkpoint(run, 100, 0)
    never = JobSpec(**{**vars(SPEC), "resume": "never"})
    assert choose(run, 1, never).path is None
    begin(run, 1, found=(checkpoint_name(100, 0),), spec=never)
    checkpoint(run, 20, 1)
    assert choose(run, 2, never).step == 20


def test_a_list_of_hashes_that_cannot_be_written_costs_no_checkpoint(run: RunDir) -> None:
    begin(run, 0)
    good = checkpoint(run, 100, 0)
    (run.checkpoints / resume.HASHES).mkdir()
    assert choose(run, 1).path == str(good)


# --- programs that know nothing of launch -----------------------------------------------------------------------------

GLOB = ResumeRule("glob", "out/checkpoint-*", "--resume_from_checkpoint {path}")


def glob_spec(rule: ResumeRule = GLOB) -> JobSpec:
    return JobSpec(**{**vars(SPEC), "resume_rule": rule})


def foreign(run: RunDir, number: int, write: Callable[[Path], None], age_s: float = 60.0) -> Path:
    path = run.path / "out" / f"checkpoint-{number}"
    path.mkdir(parents=True)
    write(path)
    for file in path.iterdir():
        os.utime(file, (time.time() - age_s,) * 2)
    return path


def safetensors(path: Path, missing: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16 - missing))


def torch_zip(path: Path, whole: bool = True) -> None:
    with zipfile.ZipFile(path / "optimizer.pt", "w") as archive:
        archive.writestr("data.pkl", bytes(1000))
    if not whole:
        content = (path / "optimizer.pt").read_bytes()
        (path / "optimizer.pt").write_bytes(content[:600])


def test_the_newest_by_its_number_that_can_be_read(run: RunDir) -> None:
    begin(run, 0, t=time.time() - 3600)
    good = foreign(run, 1000, safetensors)
    foreign(run, 900, torch_zip)
    foreign(run, 2000, lambda path: safetensors(path, missing=3))
    foreign(run, 3000, lambda path: torch_zip(path, whole=False))
    foreign(run, 4000, lambda path: (path / "model.bin").touch())
    foreign(run, 5000, safetensors, age_s=1)
    (run.path / "out" / "checkpoint-9000").symlink_to("removed")
    chosen = choose(run, 1, glob_spec())
    assert chosen.path == str(good) and chosen.args == ("--resume_from_checkpoint", str(good)) and chosen.step == 1000
    assert [note.split()[1] for note in chosen.notes] == [
        str(run.path / "out" / f"checkpoint-{n}") for n in (5000, 4000, 3000, 2000)]


def test_one_that_is_older_than_the_attempts_end_need_not_settle(run: RunDir) -> None:
    begin(run, 0, t=time.time() - 3600, ended=time.time() + 1)
    path = foreign(run, 7, safetensors, age_s=0)
    assert choose(run, 1, glob_spec()).path == str(path)


def test_what_another_run_left_there_is_not_resumed_from(run: RunDir) -> None:
    foreign(run, 1000, safetensors, age_s=3600)
    assert choose(run, 0, glob_spec()).path is None
    begin(run, 0, t=time.time() - 60)
    assert choose(run, 1, glob_spec()).path is None


def test_the_verify_command_has_the_last_word(run: RunDir) -> None:
    begin(run, 0, t=time.time() - 3600)
    foreign(run, 1, safetensors)
    foreign(run, 2, safetensors)
    check = f"{sys.executable} -c 'import sys; sys.exit(sys.argv[1].endswith(\"-2\") and \"too new\")' {{path}}"
    chosen = choose(run, 1, glob_spec(ResumeRule("glob", "out/checkpoint-*", "--from {path}", check)))
    assert chosen.step == 1 and "too new" in chosen.notes[0]
