"""Disk is given back, as much as was said, and nothing that somebody may still need goes with it."""
from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.backends.host import HostBackend
from cluster.contract import MANIFEST_VERSION, RunDir, checkpoint_name, sha256_file, write_artifact_manifest
from cluster.events import Event
from cluster.inventory import local_node
from launcher.index import Held, Job, open_index
from launcher.prune import prune
from tests.cluster.jobs import DONE, LAUNCHED, STARTED, past_run, write_journal
from tests.launcher.conftest import Person

ENDED = [STARTED, LAUNCHED, DONE]


def checkpoint(run: RunDir, step: int, attempt: int = 0, size: int = 50_000, linked: Path | None = None) -> str:
    path = run.checkpoints / checkpoint_name(step, attempt)
    path.mkdir()
    (path / "model").write_bytes(os.urandom(size))
    if linked:
        os.link(linked, path / "attached")
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({
        "version": MANIFEST_VERSION, "job": run.path.name, "attempt": attempt, "step": step, "resumed_from": None,
        "files": files}))
    return path.name


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def du(path: Path) -> int:
    return int(subprocess.run(["du", "-s", "--block-size=1", path], capture_output=True, check=True).stdout.split()[0])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "work" / "runs").mkdir(parents=True)
    return tmp_path / "work" / "runs"


@pytest.fixture
def make(runs: Path) -> Callable[..., RunDir]:
    """A job that has ended, with checkpoints at these steps."""
    def job(name: str, *steps: int, events: list[Event] = ENDED, **spec: Any) -> RunDir:
        run = past_run(runs, name, events, **spec)
        for step in steps:
            checkpoint(run, step)
        return run

    return job


def pruned(*runs: RunDir, keep_last: int = 1, dry_run: bool = False, keep: tuple[str, ...] = ()) -> list[dict]:
    return HostBackend(local_node()).prune([str(run.path) for run in runs], keep_last, dry_run, keep)


def test_twenty_jobs_give_back_what_was_said(make: Callable[..., RunDir], runs: Path) -> None:
    jobs = [make(f"job-{number:02}", *range(1, 6)) for number in range(20)]
    shared = jobs[0].artifacts / "samples" / "0.png"
    shared.parent.mkdir(parents=True)
    shared.write_bytes(os.urandom(70_000))
    write_artifact_manifest(shared.parent, "job-00", 0)
    alone = runs / "attached"  # in two checkpoints that go and nowhere else
    alone.write_bytes(os.urandom(90_000))
    for run, kept in ((jobs[0], shared), (jobs[1], alone)):
        names_before = [checkpoint(run, step, linked=kept) for step in (0, 8, 9)]
        assert len(names_before) == 3
    alone.unlink()
    (jobs[2].checkpoints / ".tmp-step-00000009-a000-17").mkdir()
    (jobs[2].checkpoints / ".tmp-step-00000009-a000-17" / "model").write_bytes(bytes(30_000))
    HostBackend(local_node()).status([str(run.path) for run in jobs])  # a look at a job leaves a note or two there
    before = du(runs)
    planned = pruned(*jobs, dry_run=True)
    assert du(runs) == before
    done = pruned(*jobs)
    assert [one["bytes"] for one in done] == [one["bytes"] for one in planned]
    assert before - du(runs) == sum(one["bytes"] for one in planned) > 20 * 4 * 50_000
    assert names(jobs[2]) == [checkpoint_name(5, 0)] and names(jobs[1]) == [checkpoint_name(9, 0)]
    assert shared.exists() and pruned(*jobs)[0]["removed"] == []


def test_what_stays_and_why(make: Callable[..., RunDir], runs: Path) -> None:
    run = make("phase1-a", 1, 2, 3, 4, 5, 6, 7)
    (run.checkpoints / "best.json").write_text(json.dumps({"checkpoint": checkpoint_name(2, 0), "value": 1}))
    (run.checkpoints / checkpoint_name(7, 0) / "model").write_bytes(b"damaged")
    resumed = make("phase3-b", resume=str(run.checkpoints / checkpoint_name(3, 0)))
    handed = make("phase3-c")
    handed.attempt(0).inputs.write_text(json.dumps([{"path": str(run.checkpoints / checkpoint_name(4, 0))}]))
    waiting = f'{{"resume": "/w/runs/phase1-a/checkpoints/{checkpoint_name(1, 0)}/x"}}'
    [done] = pruned(run, keep=(waiting,))
    assert [one["name"] for one in done["removed"]] == [checkpoint_name(5, 0)]
    why = {one["name"]: one["why"] for one in done["kept"]}
    assert why[checkpoint_name(6, 0)] == "the newest that verifies" and "best" in why[checkpoint_name(2, 0)]
    assert why[checkpoint_name(3, 0)] == f"{resumed.path.name} begins from it" and why[checkpoint_name(7, 0)].startswith(
        "does not verify: ")
    assert why[checkpoint_name(4, 0)] == "phase3-c begins from it" and "waits" in why[checkpoint_name(1, 0)]
    assert set(names(run)) == {*why, "best.json"}


def test_nothing_is_removed_when_nothing_verifies_or_the_job_goes_on(make: Callable[..., RunDir]) -> None:
    broken, lives, keeps = make("broken", 1, 2), make("lives", 1, 2, events=[STARTED, LAUNCHED]), make("keeps", 1, 2)
    for step in (1, 2):
        (broken.checkpoints / checkpoint_name(step, 0) / "manifest.json").unlink()
    beat = json.loads(lives.attempt(0).heartbeat.read_bytes()) | {"hostname": "another-host"}
    lives.attempt(0).heartbeat.write_text(json.dumps(beat))
    before = [names(run) for run in (broken, lives, keeps)]
    done = pruned(broken, lives, keeps, keep_last=2)
    assert [names(run) for run in (broken, lives, keeps)] == before
    assert [one["removed"] for one in done] == [[], [], []] and "has not ended: RUNNING" in done[1]["note"]


def test_a_job_that_is_restarted_just_now_is_left_alone(make: Callable[..., RunDir]) -> None:
    run = make("phase1-a", 1, 2)
    with open(run.path / ".supervisor.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is being restarted" in pruned(run)[0]["note"]
    assert len(names(run)) == 2


def test_checkpoints_of_an_older_attempt_that_do_not_count_are_no_reason_to_remove_the_others(
        make: Callable[..., RunDir]) -> None:
    """A process that was believed dead wrote step 9 after attempt 1 had begun from step 1."""
    run = make("phase1-a", 1)
    run.attempt(1).logs.mkdir(parents=True)
    begun = replace(STARTED, attempt=1, checkpoints=(checkpoint_name(1, 0),))
    write_journal(run.attempt(1).journal, [begun, LAUNCHED, DONE])
    checkpoint(run, 9)
    assert names(run) == [checkpoint_name(1, 0), checkpoint_name(9, 0)]
    [done] = pruned(run)
    assert done["removed"] == [] and "does not count" in done["kept"][0]["why"]


def test_what_this_computer_still_holds_keeps_its_checkpoint(make: Callable[..., RunDir], tmp_path: Path) -> None:
    run = make("phase1-a", 1, 2)
    spec = json.dumps({"resume": f"{run.checkpoints / checkpoint_name(1, 0)}"})
    job = Job("t", "phase1-a", None, "local", str(run.path), True, 0.0, 0.0, {"state": "COMPLETED"})
    with open_index(tmp_path / "index.sqlite") as index:
        index.put(job)
        index.hold([Held("h", 0, "g", "local", str(tmp_path), spec, None, None, "[]", 1, 0.0)])
        [done] = prune(index, (), 1, False, tmp_path)
    assert done.removed == [] and len(names(run)) == 2


def test_the_verb(person: Person, tmp_path: Path) -> None:
    job = person.submit("tick", "--set", f"gate={tmp_path}/gate", "--name", "mouse")
    person.until(job, lambda found: found["state"] == "RUNNING")
    assert f"{job}: it has not ended (RUNNING)" in person.run("prune", "mouse", code=4).stderr
    (tmp_path / "gate").touch()
    person.run("wait", job)
    run = RunDir(Path(person.status(job)["run_dir"]))
    for step in (1, 2, 3):
        checkpoint(run, step)
    assert "would free" in person.run("prune", "--dry-run").stdout and len(names(run)) == 3
    said = person.run("prune", "--keep-last", "2").stdout
    assert f"{job} on local: freed " in said and f"keeps {checkpoint_name(2, 0)}: among the newest 2" in said
    [told] = json.loads(person.run("prune", "mouse", "--json").stdout)
    assert [one["name"] for one in told["removed"]] == [checkpoint_name(2, 0)]
    assert person.run("prune").stdout == "nothing to free\n"
