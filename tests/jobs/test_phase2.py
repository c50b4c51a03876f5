"""Phase 2 as a person runs it: what it leaves, that nothing depends on ranks or kills, and what it refuses."""
from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cluster.contract import RunDir, list_checkpoints, read_json_lines, sha256_file, verify_artifact, verify_checkpoint
from configs.phase2 import Phase2Run
from jobs import phase2, synthesis
from jobs.data.multiview import find_samples
from jobs.data.rigs import rig_identity, rig_of
from jobs.data.samples import read_sample
from jobs.data.toy import make_mouse, write_sample
from jobs.runtime import AgreedError, JobError, StopFlag
from jobs.synthetic import Store
from jobs.world import World
from models.cameras import mv6, orbit
from models.rigs import describe
from tests.jobs.conftest import Start
from tests.jobs.small_chain import make_generator, phase2_of

FRAMES = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real samples of a laboratory's own rig, which is not the generator's."""
    out = tmp_path_factory.mktemp("lab")
    rig = replace(mv6(16), c2w=orbit([-90, -140, 170, 80, 10, -50], 20.0, 3.1).float())
    for index in range(FRAMES):
        write_sample(out / f"frame_{index:02d}", make_mouse(torch.Generator().manual_seed(index)), rig)
    (out / "data_train.txt").write_text("".join(f"frame_{index:02d}\n" for index in range(FRAMES)))
    return out


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_generator(tmp_path_factory.mktemp("phase1") / "step-00000008-a000")


@pytest.fixture(scope="module")
def whole(start: Start, data: Path, generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_phase2(start, run, phase2_of(data, generator), 2) == [0, 0], output(run)
    return run


def run_phase2(start: Start, run: Path, config: dict[str, Any], ranks: int, attempt: int = 0, fault: str = "") -> list[int]:
    path = run.with_suffix(".json")
    path.write_text(json.dumps(config))
    RunDir(run).attempt(attempt).path.mkdir(parents=True)
    checkpoints = list_checkpoints(RunDir(run).checkpoints)
    return start(run, ranks, attempt, checkpoints[0] if checkpoints else None, fault, module="tests.jobs.small_chain",
                 argv=[str(path)])


def run_here(run: Path, config: dict[str, Any]) -> Path:
    """The same in this process, alone. Raises AgreedError."""
    given = argparse.Namespace(run_dir=str(run), resume=None)
    world = World(0, 1, torch.device("cpu"))
    phase2._generate(msgspec.convert(config, Phase2Run), given, world, StopFlag())
    return run


def output(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.parent.glob(f"{run.name}.out.*")))


def files_of(run: Path) -> dict[str, str]:
    """Everything that was made -> its hash. A manifest also names the job: of it, what it lists."""
    artifacts = RunDir(run).artifacts
    found = {str(path.relative_to(artifacts)): sha256_file(path)
             for path in sorted(artifacts.rglob("*")) if path.is_file() and path.name != "manifest.json"}
    return {**found, "manifest": json.dumps(verify_artifact(artifacts / "dataset").files, sort_keys=True)}


def test_a_data_set_for_phase_3_with_the_generators_rig(whole: Path, data: Path, generator: Path, alone: World) -> None:
    dataset = RunDir(whole).artifacts / "dataset"
    lists = {name: find_samples(dataset / f"data_{name}.txt", "error", alone).samples for name in ("train", "val")}
    assert {name: len(samples) for name, samples in lists.items()} == {"train": 4, "val": 2}
    identity = rig_identity(lists["train"], lists["val"])
    assert identity["rig"] == mv6(16).fingerprint
    source = rig_of(read_sample("frame_00", data / "frame_00"))
    assert source.fingerprint != identity["rig"], describe(source)
    verify_artifact(dataset)
    about = json.loads((dataset / "frame_02-v00" / "metadata.json").read_bytes())
    assert {"source_frame", "view", "seed", "checkpoint", "steps", "guidance"} <= about.keys()
    assert (about["source_frame"], about["view"], about["steps"], about["guidance"]) == ("frame_02", 0, 2, 1.5)


def test_what_it_says_and_what_launch_reads(whole: Path) -> None:
    lines = list(read_json_lines(RunDir(whole).attempt(0).metrics))
    assert (lines[0]["event"], lines[0]["step"], lines[-1]["event"], lines[-1]["step"]) == ("resumed", 0, "done", FRAMES)
    assert {line["total"] for line in lines} == {FRAMES}
    assert {"it_s", "eta_s", "accepted", "rejected"} <= next(line for line in lines if line["step"]).keys()
    said = output(whole)
    assert "disk: at most" in said and "measured:" in said and said.index("disk: at most") < said.index("measured:")
    assert "done: 6 of 6 samples accepted" in said


def test_killed_twice_it_makes_exactly_the_same(start: Start, whole: Path, data: Path, generator: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", phase2_of(data, generator)
    for attempt, fault in enumerate(["KILL:1:2:middle", "KILL:0:1:after"]):
        codes = run_phase2(start, run, config, 2, attempt, fault)
        assert -9 in codes and 0 not in codes
        assert not (RunDir(run).artifacts / "dataset" / "manifest.json").exists()
    assert run_phase2(start, run, config, 2, 2) == [0, 0], output(run)
    assert files_of(run) == files_of(whole)


def test_stopped_it_keeps_its_samples_and_another_number_of_ranks_goes_on(
        start: Start, whole: Path, data: Path, generator: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", phase2_of(data, generator)
    assert run_phase2(start, run, config, 2, 0, "TERM:1:1:after") == [0, 0], output(run)
    last = list(read_json_lines(RunDir(run).attempt(0).metrics))[-1]
    assert last["event"] == "stopped" and 1 <= last["step"] < FRAMES
    kept = [path for path in (RunDir(run).artifacts / "dataset").iterdir() if path.is_dir()]
    assert len(kept) == last["step"] == verify_checkpoint(list_checkpoints(RunDir(run).checkpoints)[0]).step
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert run_phase2(start, run, config, 1, 1) == [0], output(run)
    first = next(read_json_lines(RunDir(run).attempt(1).metrics))
    assert (first["event"], first["step"]) == ("resumed", last["step"])
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert files_of(run) == files_of(whole)


@pytest.mark.campaign
def test_killed_ten_times_at_random_moments_it_makes_exactly_the_same(
        start: Start, whole: Path, data: Path, generator: Path, tmp_path: Path) -> None:
    run, config, moments = tmp_path / "run", phase2_of(data, generator), random.Random(0)
    began = time.monotonic()
    assert run_phase2(start, tmp_path / "timed", config, 2) == [0, 0]
    seconds, kills = time.monotonic() - began, 0
    for attempt in range(40):
        codes = run_phase2(start, run, config, 2, attempt, f"TIMER:{attempt % 2}:{moments.uniform(0, seconds)}")
        kills += -9 in codes
        if kills == 10:
            break
        if codes == [0, 0]:  # nothing is left to be killed at: anew
            assert files_of(run) == files_of(whole)
            shutil.rmtree(RunDir(run).artifacts)
            shutil.rmtree(RunDir(run).checkpoints)
    assert kills == 10
    assert run_phase2(start, run, config, 2, 50) == [0, 0], output(run)
    assert files_of(run) == files_of(whole)


# --- going on ---------------------------------------------------------------------------------------------------------

def small(data: Path, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    changes["sources"] = {"limit": 2, **changes.get("sources", {})}
    changes["generator"] = {"steps": 1, "guidance": 1, "eta": 0, **changes.get("generator", {})}
    return phase2_of(data, checkpoint, **changes)


def test_a_damaged_sample_is_made_again_and_another_recipe_is_refused(
        data: Path, generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(data, generator)
    run = run_here(tmp_path / "run", config)
    before = files_of(run)
    picture = next((RunDir(run).artifacts / "dataset").glob("*/images/cam_003.png"))
    picture.write_bytes(picture.read_bytes()[:-4])
    with pytest.raises(AgreedError, match=r"made in another way:\n +steps: 1 there, 2 now"):
        run_here(run, small(data, generator, generator={"steps": 2}))
    capsys.readouterr()
    run_here(run, config)
    said = capsys.readouterr().out
    assert f"damaged, it is made again: {picture} is not what was written" in said
    assert files_of(run) == before
    assert next(read_json_lines(RunDir(run).attempt(2).metrics))["step"] == 1


def test_the_lists_name_only_what_was_read_again(data: Path, generator: Path, tmp_path: Path) -> None:
    config = small(data, generator)
    run = run_here(tmp_path / "run", config)
    before, dataset = files_of(run), RunDir(run).artifacts / "dataset"
    for name in ("data_train.txt", "data_val.txt", "manifest.json"):
        (dataset / name).unlink()
    picture = next(dataset.glob("*/images/cam_001.png"))
    content = bytearray(picture.read_bytes())
    content[len(content) // 2] ^= 1  # of the same size: only its hash tells
    picture.write_bytes(content)
    with pytest.raises(AgreedError, match="1 samples are damaged on the disk"):
        run_here(run, config)
    assert not (dataset / "data_train.txt").exists()
    run_here(run, config)
    assert files_of(run) == before


def test_nodes_that_do_not_see_one_place_are_refused(tmp_path: Path) -> None:
    recipe = Store(tmp_path / "here").open({"batch": 2}, superseded=False)
    Store(tmp_path / "here").check_seen(recipe)
    with pytest.raises(JobError, match="does not see the .*dataset that rank 0 made"):
        Store(tmp_path / "there").check_seen(recipe)


def test_what_the_job_did_not_make_is_not_handed_over(data: Path, generator: Path, tmp_path: Path) -> None:
    (RunDir(tmp_path / "run").artifacts / "dataset" / "older").mkdir(parents=True)
    with pytest.raises(AgreedError, match="holds what this job did not make: older"):
        run_here(tmp_path / "run", small(data, generator))


def test_rejected_samples_are_counted_kept_aside_and_not_made_again(
        data: Path, generator: Path, tmp_path: Path) -> None:
    config = small(data, generator, quality={"max_coverage": 0.9})  # this generator fills its pictures
    with pytest.raises(AgreedError, match=r"none of 2 samples passed the quality gate: 2 alpha"):
        run_here(tmp_path / "run", config)
    rejected = sorted((RunDir(tmp_path / "run").artifacts / "rejected").iterdir())
    why = json.loads((rejected[0] / "metadata.json").read_bytes())["rejected"]
    assert len(rejected) == 2 and why[0][0] == "alpha" and "covers 100.00% of the picture" in why[0][1]
    with pytest.raises(AgreedError, match="none of 2"):
        run_here(tmp_path / "run", config)
    first = next(read_json_lines(RunDir(tmp_path / "run").attempt(1).metrics))
    assert (first["event"], first["step"]) == ("resumed", 2)
    with pytest.raises(AgreedError, match=r"2 of 2 samples were rejected \(2 alpha\); quality.max_rejected is 0.4"):
        run_here(tmp_path / "poor", small(data, generator, quality={"max_coverage": 0.9, "max_rejected": 0.4}))


def test_a_disk_that_will_not_do_is_told_after_the_first_batch(
        data: Path, generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis.shutil, "disk_usage", lambda place: argparse.Namespace(free=5000))
    with pytest.raises(AgreedError, match=r"has 5 kB left, the 1 missing samples need 1\d(\.\d)? kB"):
        run_here(tmp_path / "run", {**small(data, generator), "batch": 1})


def test_a_sample_that_an_older_attempt_wrote_meanwhile_is_there_once(data: Path, generator: Path, tmp_path: Path) -> None:
    store, item = Store(tmp_path), items(data)[0]
    store.open({"batch": 1}, superseded=False)
    picture = torch.full((6, 16, 16, 4), 200, dtype=torch.uint8)
    about = {"quality": {"explained": [1.0]}, "rejected": []}
    first = store.put(item, picture, mv6(16), about, True)
    assert store.put(item, picture, mv6(16), about, True) == first == store.find(item, deep=True)
    assert [path.name for path in store.dataset.iterdir() if path.is_dir()] == [item.name]


# --- which items ------------------------------------------------------------------------------------------------------

def items(data: Path, **sources: Any) -> list[Any]:
    config = msgspec.convert(phase2_of(data, Path("none"), sources=sources), Phase2Run)
    return phase2._work(phase2._with_found_paths(config), World(0, 1, torch.device("cpu"))).items


def test_a_seed_belongs_to_a_sample_and_a_view_not_to_a_place_in_the_list(data: Path, tmp_path: Path) -> None:
    (data / "turned.txt").write_text("".join(f"frame_{index:02d}\n" for index in reversed(range(FRAMES))))
    listed, turned = items(data, view="all"), items(data, view="all", path=str(data / "turned.txt"))
    assert len({item.seed for item in listed}) == len(listed) == 6 * FRAMES
    assert {item.name: item.seed for item in listed} == {item.name: item.seed for item in turned}
    assert [item.seed for item in items(data, view=2)] == [item.seed for item in listed if item.view == 2]
    assert len(items(data, view="all", limit=5)) == 5
    assert items(data, path=str(data)) == items(data)  # a data set's folder


def test_all_views_of_a_frame_are_on_one_side(data: Path, tmp_path: Path) -> None:
    store, kept = Store(tmp_path), []
    for item in items(data, view="all", frame=r"frame_(\d\d)"):
        (store.dataset / item.name).mkdir(parents=True)
        kept.append(synthesis.Kept(item, True, {"quality": {"explained": [1.0]}}, 1))
    sides = store.lists(kept, 0.3)
    frames = {name: {line.split("-")[0] for line in lines} for name, lines in sides.items()}
    assert not frames["data_train.txt"] & frames["data_val.txt"]
    assert {name: len(lines) for name, lines in sides.items()} == {"data_train.txt": 24, "data_val.txt": 12}


@pytest.mark.parametrize(("sources", "said"), [
    ({"view": 6}, r"sources.view = 6: the samples have 6 views, 0 to 5"),
    ({"frame": "(frame)"}, r"all samples come from one source frame \(frame\)"),
    ({"path": "twice.txt"}, r"1 samples would be made twice, the first is frame_01-v00"),
])
def test_sources_that_cannot_be_are_refused(data: Path, sources: dict[str, Any], said: str) -> None:
    (data / "twice.txt").write_text("frame_00\nframe_01\nframe_01\n")
    if "path" in sources:
        sources = {"path": str(data / sources["path"])}
    with pytest.raises(AgreedError, match=said):
        items(data, **sources)
