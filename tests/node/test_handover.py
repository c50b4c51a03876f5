"""What a job takes over from another one: which checkpoint, verified, named in its config, or why it cannot start."""
from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import wire
from cluster.carry import install_here
from cluster.contract import (
    BEST, MANIFEST, BadArtifact, RunDir, checkpoint_name, fingerprint, sha256_file, verify_artifact,
    write_artifact_manifest)
from cluster.errors import NodeFailure, Unusable
from cluster.events import Note, Reason
from cluster.node import handover, peer, process
from cluster.spec import After
from tests.node.conftest import Job

MakeJob = Callable[..., Job]


def checkpoint(run: RunDir, step: int, content: bytes = b"weights") -> Path:
    path = run.checkpoints / checkpoint_name(step, 0)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content + str(step).encode())
    file = path / "model.safetensors"
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)}}
    (path / MANIFEST).write_text(json.dumps(
        {"version": 1, "job": run.path.name, "attempt": 0, "step": step, "resumed_from": None, "files": files}))
    return path


def taking(make_job: MakeJob, giver: Job, config: str, **fields: object) -> Job:
    job = make_job("command", "cat", pass_config=True,
                   after=(After(giver.spec.id, str(giver.run.path), label="phase1", **fields),))
    job.run.config.write_text(config)
    return job


@pytest.fixture
def giver(make_job: MakeJob) -> Job:
    """A job that completed and left two checkpoints."""
    job = make_job("command", "true")
    job.start().ended()
    for step in (10, 20):
        checkpoint(job.run, step)
    return job


def test_the_config_of_the_attempt_names_what_is_there(make_job: MakeJob, giver: Job) -> None:
    (giver.run.checkpoints / BEST).write_text(json.dumps({"checkpoint": checkpoint_name(10, 0), "value": 1}))
    (giver.run.artifacts / "samples").mkdir()
    (giver.run.artifacts / "samples" / "one.png").write_bytes(b"png")
    write_artifact_manifest(giver.run.artifacts / "samples", giver.spec.id, 0)
    job = taking(make_job, giver, "best: ${phase1.checkpoints.best}\nnested:\n  last: '${phase1.checkpoints.last}'\n"
                 "data:\n- ${phase1.artifacts.samples}\ntext: not ${phase1.checkpoints.last} alone\n")
    assert job.start().ended().reason is Reason.DONE
    run = giver.run
    assert job.log() == (
        f'best: "{run.checkpoints}/{checkpoint_name(10, 0)}"\nnested:\n  last: "{run.checkpoints}/'
        f'{checkpoint_name(20, 0)}"\ndata:\n- "{run.artifacts}/samples"\n'
        "text: not ${phase1.checkpoints.last} alone\n")
    assert "${" in job.run.config.read_text()  # the next attempt looks again
    inputs = json.loads(job.attempt.inputs.read_bytes())
    assert [(one["reference"], one["step"], one["job"]) for one in inputs] == [
        ("${phase1.checkpoints.best}", 10, giver.spec.id), ("${phase1.checkpoints.last}", 20, giver.spec.id),
        ("${phase1.artifacts.samples}", None, giver.spec.id)]
    assert all(len(one["fingerprint"]) == 64 for one in inputs)
    assert sum("phase1" in event.text for event in job.events if isinstance(event, Note)) == 3


def test_a_file_of_an_artifact(make_job: MakeJob, giver: Job) -> None:
    samples = giver.run.artifacts / "samples"
    samples.mkdir()
    (samples / "all.txt").write_bytes(b"one\n")
    write_artifact_manifest(samples, giver.spec.id, 0)
    job = taking(make_job, giver, "list: ${phase1.artifacts.samples/all.txt}\n")
    job.start().ended()
    assert job.log() == f'list: "{samples}/all.txt"\n'
    missing = taking(make_job, giver, "list: ${phase1.artifacts.samples/none.txt}\n")
    status = missing.start().ended()
    assert status.reason is Reason.CANNOT_START and "samples holds no file none.txt" in status.detail


def test_without_a_best_one_the_last_is_taken_and_that_is_said(make_job: MakeJob, giver: Job) -> None:
    job = taking(make_job, giver, "x: ${phase1.checkpoints.best}\n")
    job.start().ended()
    assert checkpoint_name(20, 0) in job.log()
    assert any("marked no checkpoint as its best" in event.text for event in job.events if isinstance(event, Note))


def test_a_broken_one_is_passed_over(make_job: MakeJob, giver: Job) -> None:
    (giver.run.checkpoints / BEST).write_text(json.dumps({"checkpoint": checkpoint_name(20, 0), "value": 1}))
    (giver.run.checkpoints / checkpoint_name(20, 0) / "model.safetensors").write_bytes(b"weightsXX")
    job = taking(make_job, giver, "x: ${phase1.checkpoints.best}\n")
    job.start().ended()
    assert checkpoint_name(10, 0) in job.log()


def _no_checkpoints(run: RunDir) -> None:
    shutil.rmtree(run.checkpoints)


def _broken_artifact(run: RunDir) -> None:
    (run.artifacts / "samples").mkdir()
    (run.artifacts / "samples" / "a").write_bytes(b"a")
    write_artifact_manifest(run.artifacts / "samples", run.path.name, 0)
    (run.artifacts / "samples" / "a").write_bytes(b"b")


@pytest.mark.parametrize(("what", "spoil"), [
    ("checkpoints.last", _no_checkpoints), ("checkpoints.best", _no_checkpoints),
    ("artifacts.samples", lambda run: None), ("artifacts.samples", _broken_artifact),
    ("artifacts...", lambda run: None)])
def test_what_is_missing_is_named_with_its_job(
        make_job: MakeJob, giver: Job, what: str, spoil: Callable[[RunDir], None]) -> None:
    spoil(giver.run)
    job = taking(make_job, giver, f"x: ${{phase1.{what}}}\n")
    status = job.start().ended()
    assert status.reason is Reason.CANNOT_START and giver.spec.id in status.detail
    assert what.split(".")[0].removesuffix("s") in status.detail


def test_nothing_is_taken_from_a_job_it_does_not_wait_for(make_job: MakeJob, giver: Job) -> None:
    job = taking(make_job, giver, "x: ${phase2.checkpoints.last}\n")
    status = job.start().ended()
    assert status.reason is Reason.CANNOT_START and "phase2" in status.detail


def test_a_program_of_its_own_hands_over_what_its_rule_finds(make_job: MakeJob, tmp_path: Path) -> None:
    from cluster.spec import ResumeRule

    giver = make_job("command", "sh", "-c", f"mkdir -p {tmp_path}/out; echo x > {tmp_path}/out/ckpt-7.txt",
                     resume_rule=ResumeRule("glob", f"{tmp_path}/out/ckpt-*", "--from {path}"))
    giver.start().ended()
    found = handover.offer(giver.run, "checkpoints.last")
    assert (found.path, found.step) == (f"{tmp_path}/out/ckpt-7.txt", 7) and found.files[""]["size"] == 2


# --- from another node --------------------------------------------------------------------------------------

@pytest.fixture
def other_node(tmp_path: Path) -> tuple[str, ...]:
    """The command that asks "another node's" agent: its login shell greets, and ssh is a shell here."""
    agent = install_here(tmp_path / "other")
    script = wire.run_agent(sys.executable, str(agent), peer.COMMAND, peer.MARK)
    return ("sh", "-c", 'echo Welcome; shift; exec sh -c "$1"', "ssh", "gpu01", wire.LINE, script)


def test_it_is_fetched_from_the_other_node_once(
        make_job: MakeJob, giver: Job, other_node: tuple[str, ...], tmp_path: Path) -> None:
    first = taking(make_job, giver, "x: ${phase1.checkpoints.last}\n", peer=other_node)
    assert first.start().ended().reason is Reason.DONE
    inputs = tmp_path / "work" / ".launch" / "inputs"
    [place] = inputs.iterdir()
    copy = place / checkpoint_name(20, 0)
    assert first.log() == f'x: "{copy}"\n'
    original = giver.run.checkpoints / copy.name
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()}
    marker = copy / "model.safetensors"
    before = marker.stat().st_mtime_ns
    again = taking(make_job, giver, "x: ${phase1.checkpoints.last}\n", peer=other_node)
    assert again.start().ended().reason is Reason.DONE and marker.stat().st_mtime_ns == before


def test_what_the_other_node_says_is_said(make_job: MakeJob, giver: Job, other_node: tuple[str, ...]) -> None:
    job = taking(make_job, giver, "x: ${phase1.artifacts.none}\n", peer=other_node)
    status = job.start().ended()
    assert status.reason is Reason.CANNOT_START and "gpu01" in status.detail and "artifacts.none" in status.detail
    silent = (*other_node[:2], "echo no route to host >&2; exit 255", *other_node[3:])
    with pytest.raises(Exception, match="gpu01: sh: no route to host"):
        peer.ask(silent, {"op": "status"})


def test_what_arrives_changed_or_not_whole_is_not_kept(giver: Job, tmp_path: Path) -> None:
    request = {"run_dir": str(giver.run.path), "what": "checkpoints.last"}
    sent = list(handover.frames(request))
    inputs = tmp_path / "inputs"
    (inputs / f".new-{process.hostname()}-{1 << 22}-1-1").mkdir(parents=True)  # of one that was killed
    changed = [(header, body.replace(b"weights", b"weighty")) for header, body in sent]
    for frames in (changed, [one for one in sent if one[0].get("file") != "model.safetensors"]):
        with pytest.raises(NodeFailure, match="did not arrive"):
            handover.receive(frames, inputs)
    outside = [sent[0], ({"file": "../x", "n": 1}, b"x"), sent[-1]]
    with pytest.raises(NodeFailure, match="leads out"):
        handover.receive(outside, inputs)
    assert list(inputs.iterdir()) == []
    assert Path(handover.receive(sent, inputs).path).is_dir()


def test_two_that_fetch_the_same_at_once_both_have_it(giver: Job, tmp_path: Path) -> None:
    sent = list(handover.frames({"run_dir": str(giver.run.path), "what": "checkpoints.last"}))
    inputs = tmp_path / "inputs"

    def overtaken() -> Iterator[handover.Frame]:
        yield from sent[:-1]
        handover.receive(sent, inputs)
        yield sent[-1]

    found = handover.receive(overtaken(), inputs)
    assert (Path(found.path) / "model.safetensors").is_file()
    assert list(inputs.iterdir()) == [Path(found.path).parent]


# --- manifests ----------------------------------------------------------------------------------------------

def test_an_artifact_verifies_until_something_of_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "artifacts" / "samples"
    (path / "deep").mkdir(parents=True)
    (path / "deep" / "쥐 1.png").write_bytes(b"1")
    with pytest.raises(BadArtifact, match="never finished"):
        verify_artifact(path)
    with pytest.raises(BadArtifact, match="never made"):
        verify_artifact(tmp_path / "nothing")
    manifest = write_artifact_manifest(path, "phase2-abc", 1)
    assert verify_artifact(path) == manifest and list(manifest.files) == ["deep/쥐 1.png"]
    (path / "deep" / "쥐 1.png").write_bytes(b"2")
    with pytest.raises(BadArtifact, match="쥐 1.png"):
        verify_artifact(path)
    (path / MANIFEST).write_text("{")
    with pytest.raises(BadArtifact, match="not readable"):
        verify_artifact(path)


def test_a_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    one = {"a": {"size": 1, "sha256": "x"}, "b": {"size": 1, "sha256": "y"}}
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert fingerprint(one) != fingerprint({"a": one["b"], "b": one["a"]})


def test_unusable_is_a_mistake_of_the_one_who_asked(giver: Job) -> None:
    with pytest.raises(Unusable, match=giver.spec.id):
        handover.offer(giver.run, "artifacts.nothing")
