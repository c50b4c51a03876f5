from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.contract import checkpoint_name, list_checkpoints, verify_checkpoint
from jobs import checkpoint
from jobs.checkpoint import Saved, Writer, load_module, load_tensors, prune, read_state
from jobs.runtime import Job, JobError, WriteFailed
from jobs.world import World

TENSORS = {"model": {"a.w": torch.arange(6.0).view(2, 3), "a.n": torch.tensor(3), "a.h": torch.ones(2).bfloat16()},
           "optimizer": {"a.w.step": torch.tensor(2.0)}}


def save(job: Job, *steps: int, keep_last: int = 9) -> list[Saved]:
    saved: list[Saved] = []
    writer = Writer(job, keep_last, saved.append)
    for step in steps:
        writer.start(step, TENSORS, {"step": step})
    writer.wait()
    return saved


def test_it_verifies_and_any_safetensors_reader_reads_it(job: Job, alone: World) -> None:
    saved = save(job, 7)
    assert saved[0].path.name == "step-00000007-a000" and saved[0].seconds > 0
    manifest = verify_checkpoint(saved[0].path)
    assert set(manifest.files) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert (manifest.step, manifest.attempt, manifest.job) == (7, 0, "run")
    read = load_file(saved[0].path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS["model"].items())
    empty = {file: {name: torch.zeros_like(t) for name, t in named.items()} for file, named in TENSORS.items()}
    load_tensors(saved[0].path, empty, alone)
    assert torch.equal(empty["model"]["a.w"], TENSORS["model"]["a.w"])


def test_the_snapshot_is_of_the_moment(job: Job) -> None:
    weights = torch.zeros(1000)
    writer = Writer(job, 2, lambda saved: None)
    writer.start(1, {"model": {"w": weights}}, {})
    weights += 1
    writer.wait()
    assert load_file(job.checkpoints / "step-00000001-a000" / "model.safetensors")["w"].sum() == 0


def test_retention_keeps_the_last_and_the_best(job: Job) -> None:
    writer = Writer(job, 2, lambda saved: None)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.4), (5, 0.3)):
        writer.start(step, TENSORS, {})
        writer.mark_best(step, "val/psnr", score)
    writer.wait()
    assert [path.name for path in list_checkpoints(job.checkpoints)] == [
        checkpoint_name(step, 0) for step in (5, 4, 2)]


def test_retention_never_takes_the_newest_even_behind_an_abandoned_branch(tmp_path: Path) -> None:
    for step, attempt in ((400, 0), (500, 0), (350, 1)):
        (tmp_path / checkpoint_name(step, attempt)).mkdir()
    prune(tmp_path, 1, tmp_path / checkpoint_name(350, 1))
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(350, 1)]


def test_an_attempt_that_a_newer_one_has_replaced_changes_nothing_they_share(job: Job) -> None:
    older = Writer(job, 1, lambda saved: None)
    older.start(1, TENSORS, {})
    older.wait()
    newer = job.run.attempt(1)
    newer.path.mkdir()
    being_written = job.checkpoints / ".tmp-step-00000002-a001-1"
    being_written.mkdir()
    older.start(2, TENSORS, {})
    older.mark_best(2, "val/psnr", 99.0)
    older.wait()
    Writer(job, 1, lambda saved: None)
    assert [path.name for path in list_checkpoints(job.checkpoints)] == [checkpoint_name(2, 0), checkpoint_name(1, 0)]
    assert being_written.is_dir() and not (job.checkpoints / "best.json").exists()


def test_leftovers_of_a_dead_writer_are_no_checkpoints_and_go(job: Job) -> None:
    (job.checkpoints / ".tmp-step-00000009-a000-1").mkdir(parents=True)
    assert list_checkpoints(job.checkpoints) == []
    Writer(job, 2, lambda saved: None)
    assert list(job.checkpoints.iterdir()) == []


def test_a_full_disk_is_an_error_that_surfaces_and_leaves_no_checkpoint(
        job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: object) -> dict:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(WriteFailed, match="No space left on device"):
        save(job, 3)
    assert list_checkpoints(job.checkpoints) == []


def test_a_fault_of_the_writing_thread_is_no_success(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, tensors: object) -> dict:
        raise KeyError("a dtype nobody knows")

    told: list[object] = []
    monkeypatch.setattr(checkpoint, "write_tensors", wrong)
    monkeypatch.setattr("threading.excepthook", told.append)
    with pytest.raises(RuntimeError, match="was not written"):
        save(job, 3)
    assert len(told) == 1


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
        job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path, *_: object, **__: object) -> None:
        raise OSError(39, "Directory not empty", str(path))

    writer = Writer(job, 1, lambda saved: None)
    monkeypatch.setattr("os.rmdir", busy)  # NFS, while somebody reads a file that was deleted
    for step in (1, 2):
        writer.start(step, TENSORS, {})
    writer.wait()
    assert [path.name for path in list_checkpoints(job.checkpoints)] == [checkpoint_name(2, 0)]


@pytest.mark.parametrize("harm", ["flip", "cut", "no manifest", "nothing"])
def test_a_damaged_checkpoint_is_refused(job: Job, harm: str) -> None:
    path = save(job, 7)[0].path
    model = path / "model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    if harm == "nothing":
        path = path.with_name("step-00000008-a000")
    elif harm == "no manifest":
        (path / "manifest.json").unlink()
    else:
        model.write_bytes(raw if harm == "flip" else raw[:-2])
    with pytest.raises(JobError) as caught:
        read_state(path)
    assert str(path) in str(caught.value)


def test_weights_alone_can_start_another_run(job: Job) -> None:
    module = torch.nn.Linear(3, 2, bias=False)
    writer = Writer(job, 2, lambda saved: None)
    writer.start(1, {"model": {"net.weight": torch.ones(2, 3), "other.x": torch.ones(1)}}, {})
    writer.wait()
    load_module(job.checkpoints / "step-00000001-a000", "net", module)
    assert module.weight.sum() == 6
    with pytest.raises(JobError, match="net.weight .2, 3. there, .2, 4. here"):
        load_module(job.checkpoints / "step-00000001-a000", "net", torch.nn.Linear(4, 2, bias=False))


def test_the_state_says_where_it_was(job: Job) -> None:
    assert read_state(save(job, 5)[0].path) == {"step": 5}
    assert json.loads((job.checkpoints / "step-00000005-a000" / "manifest.json").read_bytes())["resumed_from"] is None
