"""`python -m jobs.data check`: what good data sets pass and what each way of spoiling one is told as."""
from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.data.__main__ import main
from jobs.data.inspection import Inspection, Options, inspect
from jobs.data.lists import Entry, each, listings
from jobs.data.normalize import cameras_moved_alone
from jobs.data.rigs import rig_of
from jobs.data.samples import read_cameras, read_sample
from jobs.data.toy import make
from jobs.data.writing import write_cameras
from jobs.runtime import JobError, tell
from models import rigs
from models.cameras import mv6, orbit32

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    make(out, 3, 1, 48, 0)
    return out


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, but in this process: loading torch anew takes seconds."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        except JobError as error:
            code = tell(error)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def looked_at(directory: Path, **options: object) -> Inspection:
    return inspect(Options(**options), Entry(directory.name, directory))  # type: ignore[arg-type]


def errors(found: Inspection) -> str:
    return "\n".join(finding.what for finding in found.findings if finding.error)


def swap_pictures(sample: Path, *views: int) -> None:
    """The picture of views[1] goes where that of views[0] was, and so on around."""
    files = [sample / f"images/cam_{view:03d}.png" for view in views]
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1]):
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["mouse_mvrig", "mouse_lab", "mouse_orbit32", "human_mvrig", "human_orbit32"])
def test_good_data_passes(shared: Path, name: str) -> None:
    [entry] = listings(shared / "data" / name / "data_train.txt", limit=1)[0].entries
    found = inspect(Options(), entry)
    assert found.good and found.least >= 0.997, found
    assert bool(found.cut) == name.startswith("human")  # their shoulders are cut by the frame


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["mouse_mvrig", "mouse_lab", "mouse_orbit32", "human_mvrig", "human_orbit32"])
def test_every_sample_of_the_good_data_passes(shared: Path, name: str) -> None:
    done = tool("check", shared / "data" / name)
    assert done.returncode == 0 and "sound: " in done.stdout, done.stdout


def test_cameras_pushed_to_the_radius_alone_fail(shared: Path, tmp_path: Path) -> None:
    sample = Path(shutil.copytree(shared / "data/mouse_lab/sample_000003", tmp_path / "sample"))
    rig = rig_of(read_sample("s", sample))
    images = [frame["file_path"] for frame in read_cameras("s", sample)["frames"]]
    write_cameras(sample / "opencv_cameras.json", "s", cameras_moved_alone(rig, 2.7), images)
    found = looked_at(sample)
    assert not found.good and found.least < 0.85
    assert "agrees with the other views" in errors(found) and "moved there alone" in errors(found)
    write_cameras(sample / "opencv_cameras.json", "s", rigs.at_radius(rig), images)
    assert looked_at(sample).good


@pytest.mark.parametrize("name", ["mouse_mvrig", "mouse_lab"])
def test_shuffled_views_fail(shared: Path, tmp_path: Path, name: str) -> None:
    for number, views in enumerate([(0, 3), (1, 2), (2, 4), (0, 1, 2, 3, 4, 5)]):
        sample = Path(shutil.copytree(shared / f"data/{name}/sample_000001", tmp_path / str(number)))
        swap_pictures(sample, *views)
        found = looked_at(sample)
        assert not found.good and found.least < 0.85 and "agrees with the other views" in errors(found)


def rewritten(change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    def damage(sample: Path) -> None:
        path = sample / "images/cam_002.png"
        with Image.open(path) as image:
            changed = change(image.copy())
        changed.save(path)
    return damage


def opaque(image: Image.Image) -> Image.Image:
    image.putalpha(255)
    return image


def far_away(sample: Path) -> None:
    far = rigs.scaled(rig_of(read_sample("s", sample)), 100.0)
    images = [frame["file_path"] for frame in read_cameras("s", sample)["frames"]]
    write_cameras(sample / "opencv_cameras.json", "s", far, images)


def duplicate(sample: Path) -> None:
    shutil.copyfile(sample / "images/cam_001.png", sample / "images/cam_005.png")


@pytest.mark.parametrize(("damage", "said"), [
    (rewritten(opaque), "view right: alpha is opaque everywhere"),
    (rewritten(lambda image: Image.new("RGBA", image.size)), "fully transparent"),
    (rewritten(lambda image: image.crop((0, 0, 40, 40))), "its camera is for 48 x 48"),
    (far_away, "median camera distance is 270, not 2.7"),
    (duplicate, "views front_right and front_left are the same picture"),
    (lambda sample: (sample / "images/cam_004.png").unlink(), "the image does not exist"),
], ids=["opaque", "transparent", "other size", "not normalised", "copied view", "missing file"])
def test_a_defect_is_told(data: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(data / "sample_000001")
    assert said in errors(looked_at(data / "sample_000001"))


def test_an_object_beside_the_origin_is_warned_about(data: Path) -> None:
    sample = data / "sample_000001"
    beside = rigs.translated(rig_of(read_sample("s", sample)), read_origin(0.8))
    images = [frame["file_path"] for frame in read_cameras("s", sample)["frames"]]
    write_cameras(sample / "opencv_cameras.json", "s", beside, images)
    found = looked_at(sample)
    assert found.object_at and abs(found.object_at - 0.8) < 0.15
    assert found.looked_at == pytest.approx(0.8, abs=1e-3)
    assert any("from the world origin" in finding.what for finding in found.findings)


def read_origin(x: float) -> object:
    import torch

    return torch.tensor([x, 0.0, 0.0])


def test_another_rig_than_the_expected_one_is_told_by_both_sides(data: Path) -> None:
    assert looked_at(data / "sample_000001", rig=mv6(512)).good
    said = errors(looked_at(data / "sample_000001", rig=orbit32(512)))
    assert "--rig has orbit32: 32 views" in said and "the sample has mv6: 6 views" in said


def test_a_sound_set_is_exit_0_with_a_table_json_and_a_sheet(data: Path, tmp_path: Path) -> None:
    done = tool("check", data, "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert "mv6: 6 views" in done.stdout and "sound: 4 samples, 0 bad" in done.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 6 * 128 and sheet.size[1] > 4 * 128
    report = json.loads(tool("check", data / "data_train.txt", "--json").stdout)
    assert report["sound"] and [one["good"] for one in report["lists"][0]["samples"]] == [True] * 3
    assert report["lists"][0]["rigs"] == {mv6(48).fingerprint: 3}


def test_a_bad_set_is_exit_1_and_names_every_defect_and_shows_them_first(data: Path, tmp_path: Path) -> None:
    swap_pictures(data / "sample_000002", 0, 4)
    (data / "sample_000001/opencv_cameras.json").write_text("{")
    lines = (data / "data_train.txt").read_text()
    (data / "data_train.txt").write_text(f"{lines}sample_000000\nsample_000009\n")
    (data / "data_val.txt").write_text("sample_000000\n")
    done = tool("check", data, "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error  sample_000001" in done.stdout and "is not JSON" in done.stdout
    assert "error  sample_000002: view" in done.stdout and "agrees with the other views" in done.stdout
    assert "error  sample_000009: directory: does not exist" in done.stdout
    assert "1 samples are listed more than once: sample_000000" in done.stdout
    assert "source frames are in more than one list: sample_000000" in done.stdout
    assert "NOT sound: 6 samples, 3 bad" in done.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:  # the worst one that can be shown is on top, marked red
        top = np.asarray(sheet)[:140].reshape(-1, 3)
    assert (top == (230, 30, 30)).all(1).sum() > 50


@pytest.mark.parametrize(("arguments", "said"), [
    (["check", "gone"], "list file gone: No such file"),
    (["check", "."], "neither a list"),
    (["check", "DATA", "--rig", "mv7"], "--rig mv7: no such rig"),
    (["check", "DATA", "--limit", "0"], "--limit must be at least 1"),
    (["check", "DATA", "--source", "frame_(\\d+)"], "finds nothing in its name"),
    (["check", "DATA", "--sheet", "gone/sheet.png"], "contact sheet gone/sheet.png"),
    (["polish"], "invalid choice"),
])
def test_a_mistake_is_exit_2(
        data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    done = tool(*(data if word == "DATA" else word for word in arguments))
    assert done.returncode == 2 and said in done.stderr


def test_as_a_command(data: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "jobs.data", *arguments], cwd=tmp_path, text=True, timeout=200,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

    sample = data / "sample_000001"
    assert command("check", str(sample)).returncode == 0
    wrong = command("check", "gone")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: list file gone") and "Traceback" not in wrong.stderr
    swap_pictures(sample, 0, 4)
    assert command("check", str(sample)).returncode == 1


def test_several_processes_find_the_same_in_the_same_order(data: Path) -> None:
    entries = [entry for listing in listings(data) for entry in listing.entries]
    alone = list(each(partial(inspect, Options()), entries, 1, "check"))
    together = list(each(partial(inspect, Options()), entries, 2, "check"))
    assert together == alone and [one.name for one in alone] == [entry.name for entry in entries]
