"""`python -m jobs.data normalize | center | split`: data sets made from others, and what must not change by it."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.data.center import crop, windows
from jobs.data.inspection import Options, inspect
from jobs.data.lists import Entry, listings
from jobs.data.rigs import rig_of, rigs_of
from jobs.data.samples import Sample, read_cameras, read_list, read_sample
from jobs.data.split import divide
from jobs.data.toy import make
from jobs.data.writing import write_cameras
from jobs.runtime import JobError
from models import rigs
from models.cameras import Rig, mv6
from tests.jobs.test_data_check import tool
from tests.models.test_rigs import pixels


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "data"
    make(out, 3, 1, 48, 0)
    return out


def copy_of(toy: Path, target: Path, change: object = None, **kept: object) -> Path:
    """The toy set under other cameras: `change(rig)` of each sample's; `kept` are further keys of the cameras' file."""
    shutil.copytree(toy, target)
    for directory in sorted(target.glob("sample_*")):
        rig = rig_of(read_sample("s", directory))
        images = [frame["file_path"] for frame in read_cameras("s", directory)["frames"]]
        changed = change(rig) if change else rig  # type: ignore[operator]
        write_cameras(directory / "opencv_cameras.json", directory.name, changed, images, dict(kept) or None)
    return target


def first(data: Path) -> Sample:
    return read_sample("s", sorted(data.glob("sample_*"))[0])


def sound(data: Path) -> bool:
    return all(inspect(Options(), entry).good for listing in listings(data) for entry in listing.entries)


def in_mm(rig: Rig) -> Rig:
    return rigs.scaled(Rig(tuple(f"lab {view}" for view in range(6)), rig.c2w, rig.fxfycxcy, rig.width, rig.height), 122.0)


def test_a_rig_in_millimetres_comes_to_the_radius_by_one_scale(toy: Path, tmp_path: Path) -> None:
    lab = copy_of(toy, tmp_path / "lab", in_mm, note="kept")
    assert not sound(lab)
    done = tool("normalize", lab, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["scale"] == pytest.approx(1 / 122, rel=1e-5) and report["off_px_at_512"] < 1e-3
    assert report["distances_after"] == pytest.approx([2.7, 2.7, 2.7], abs=1e-4)
    assert sound(tmp_path / "out")
    before, after = first(lab), first(tmp_path / "out")
    assert torch.equal(before.fxfycxcy(48), after.fxfycxcy(48))
    assert after.frames[0].image.read_bytes() == before.frames[0].image.read_bytes()
    assert os.path.samefile(after.frames[0].image, before.frames[0].image)  # linked, not copied
    raw = read_cameras("s", tmp_path / "out/sample_000000")
    assert raw["note"] == "kept" and rig_of(after).names[0] == "lab 0"
    assert [name for name, _ in read_list(tmp_path / "out/data_val.txt")[0]] == ["sample_000003"]


def test_the_lab_rig_by_virtual_cameras(shared: Path, tmp_path: Path) -> None:
    listing = tmp_path / "two.txt"
    listing.write_text("".join(f"{shared / 'data/mouse_lab' / name}\n" for name in ("sample_000000", "sample_000001")))
    done = tool("normalize", listing, tmp_path / "out", "--method", "virtual", "--json", "--copy")
    report = json.loads(done.stdout)
    assert report["distances_after"] == pytest.approx([2.7, 2.7, 2.7], abs=1e-5)
    assert report["off_px_at_512"] < 0.3 and report["cameras_alone_would_be_off_px_at_512"] > 3
    assert sound(tmp_path / "out")
    before, after = (rig_of(read_sample("s", home / "sample_000000"))
                     for home in (shared / "data/mouse_lab", tmp_path / "out"))
    ratio = 2.7 / rigs.distances(before.c2w)
    torch.testing.assert_close(after.fxfycxcy[:, 0], before.fxfycxcy[:, 0] * ratio)
    assert not os.path.samefile(tmp_path / "out/sample_000000/images/cam_000.png",
                                shared / "data/mouse_lab/sample_000000/images/cam_000.png")


@pytest.mark.parametrize("centre", ["axes", "object"])
def test_an_object_that_no_camera_has_at_the_origin_is_brought_there(toy: Path, tmp_path: Path, centre: str) -> None:
    beside = copy_of(toy, tmp_path / "beside", lambda rig: rigs.translated(rig, torch.tensor([3.0, 1.0, 0.2])))
    assert not sound(beside)
    done = tool("normalize", beside, tmp_path / "out", "--centre", centre)
    assert done.returncode == 0, done.stderr
    found = inspect(Options(), Entry("s", tmp_path / "out/sample_000001"))
    assert found.good and found.object_at is not None and found.object_at < (1e-3 if centre == "object" else 0.4)


def test_normalize_leaves_nothing_half_done(toy: Path, tmp_path: Path) -> None:
    broken = copy_of(toy, tmp_path / "broken")
    (broken / "sample_000002/images/cam_003.png").unlink()
    done = tool("normalize", broken, tmp_path / "out")
    assert done.returncode == 2 and "sample_000002" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    assert tool("normalize", toy, tmp_path / "broken").returncode == 2  # it is not empty


@pytest.mark.parametrize("arguments", [["--size", "40"], ["--one-window"], ["--margin", "0", "--size", "96"]])
def test_center_crops_at_one_scale_and_the_intrinsics_follow(toy: Path, tmp_path: Path, arguments: list[str]) -> None:
    done = tool("center", toy, tmp_path / "out", *arguments, "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    assert sound(tmp_path / "out") and (tmp_path / "sheet.png").is_file()
    for name in ("sample_000000", "sample_000001"):
        before, after = (rig_of(read_sample("s", home / name)) for home in (toy, tmp_path / "out"))
        assert torch.equal(before.c2w, after.c2w) and before.names == after.names
        scales = after.fxfycxcy[:, :2] / before.fxfycxcy[:, :2]
        assert bool((scales - scales[0, 0]).abs().max() < 1e-5) and scales[0, 0] > 0.5
        assert_same_silhouettes(toy / name, tmp_path / "out" / name, before, after)
    listing = listings(tmp_path / "out")[0]
    count = len(rigs_of(read_sample(entry.name, entry.directory) for entry in listing.entries))
    assert count == (1 if "--one-window" in arguments else 3)


def assert_same_silhouettes(before: Path, after: Path, rig: Rig, cropped: Rig) -> None:
    """A world point that the old picture shows as object the new one shows as object."""
    generator = torch.Generator().manual_seed(0)
    points = 0.8 * (2 * torch.rand(400, 3, generator=generator, dtype=torch.float64) - 1)
    found = [shown(directory, one, points) for directory, one in ((before, rig), (after, cropped))]
    sure = (found[0] < 0.02) | (found[0] > 0.98)
    inside = found[1] >= 0
    assert (sure & inside).sum() > 500
    assert ((found[0] - found[1]).abs() > 0.6)[sure & inside].float().mean() < 0.02


def shown(directory: Path, rig: Rig, points: torch.Tensor) -> torch.Tensor:
    """[V, N] alpha where the rig sees the points; -1 outside the picture."""
    values = []
    for view, where in enumerate(pixels(rig, points).floor().long()):
        with Image.open(directory / f"images/cam_{view:03d}.png") as image:
            alpha = torch.from_numpy(np.array(image)[..., 3]).float() / 255
        inside = ((where >= 0) & (where < rig.width)).all(1)
        column, row = where.clamp(0, rig.width - 1).unbind(1)
        values.append(torch.where(inside, alpha[row, column], -torch.ones(())))
    return torch.stack(values)


@pytest.mark.parametrize("seed", range(20))
def test_a_window_is_inside_the_frame_and_holds_the_object(seed: int) -> None:
    generator = np.random.default_rng(seed)
    boxes = []
    for _ in range(6):
        (left, right), (top, bottom) = (sorted(generator.choice(65, 2, replace=False).tolist()) for _ in range(2))
        boxes.append((left, top, right, bottom))
    side, corners = windows(tuple(boxes), 64, 0.1)
    for (left, top, right, bottom), (x, y) in zip(boxes, corners):
        assert 0 <= x <= left and right <= x + side <= 64
        assert 0 <= y <= top and bottom <= y + side <= 64
    largest = max(max(right - left, bottom - top) for left, top, right, bottom in boxes)
    assert side == 64 or side >= largest * 1.2


def test_a_resized_crop_does_not_darken_the_silhouette() -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[4:11, 4:11] = (200, 100, 50, 255)
    rgba[4:11, 11] = (200, 100, 50, 100)
    found = np.asarray(crop(rgba, (2, 2), 12, 30)).astype(int)
    solid = found[..., 3] > 8
    assert np.abs(found[solid][:, :3] - (200, 100, 50)).max() <= 16
    assert not found[found[..., 3] == 0].any()


def test_center_says_what_to_do_when_the_object_is_not_at_the_origin(toy: Path, tmp_path: Path) -> None:
    beside = copy_of(toy, tmp_path / "beside", lambda rig: rigs.translated(rig, torch.tensor([1.0, 0.5, 0.6])))
    done = tool("center", beside, tmp_path / "out", "--margin", "0")
    assert done.returncode == 2 and "normalize --centre object" in done.stderr


def test_split_keeps_all_views_of_a_source_frame_on_one_side(tmp_path: Path) -> None:
    for frame in range(10):
        for view in range(3):
            directory = tmp_path / f"frame_{frame:02d}_view_{view}"
            directory.mkdir()
            (directory / "opencv_cameras.json").write_text("{}")
            if frame % 2:  # what phase 2 writes beats the name
                (directory / "metadata.json").write_text(json.dumps({"source_frame": f"{frame:02d}"}))
    done = tool("split", tmp_path, "--source", r"frame_(\d+)_", "--val", "0.3", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["train"], report["val"], report["source_frames"]) == (21, 9, 10)
    train, val = ([line.split("_")[1] for line in (tmp_path / f"data_{side}.txt").read_text().split()]
                  for side in ("train", "val"))
    assert len(train) == 21 and not set(train) & set(val)
    again = tool("split", tmp_path, "--source", r"frame_(\d+)_", "--val", "0.3")
    assert again.returncode == 2 and "exist already" in again.stderr
    assert tool("split", tmp_path, "--out", tmp_path / "elsewhere").returncode == 0
    assert len((tmp_path / "elsewhere/data_val.txt").read_text().split()) == 2  # 25 frames: five, and twenty alone
    assert sorted(read_list(tmp_path / "elsewhere/data_val.txt")[0])[0][1] is not None


@pytest.mark.parametrize("seed", range(10))
def test_the_sides_are_a_function_of_the_seed_and_the_names(seed: int) -> None:
    sources = {f"frame {number}" for number in range(40)}
    chosen = divide(sources, 0.1, seed)
    assert len(chosen) == 4 and chosen < sources
    assert divide(set(sorted(sources, reverse=True)), 0.1, seed) == chosen
    assert divide({"a", "b"}, 0.9, seed) < {"a", "b"}
    with pytest.raises(JobError, match="one source frame"):
        divide({"a"}, 0.5, seed)


def test_toy_is_a_verb_and_carries_its_rig(tmp_path: Path) -> None:
    done = tool("toy", tmp_path / "toy", "--samples", "1", "--val", "1", "--size", "16")
    assert done.returncode == 0 and "1 + 1 samples" in done.stdout
    assert read_cameras("s", tmp_path / "toy/sample_000000")["rig"]["fingerprint"] == mv6(512).fingerprint
    assert json.loads((tmp_path / "toy/metadata.json").read_text())["rig"] == mv6(512).fingerprint
    assert tool("toy", tmp_path / "other", "--samples", "0").returncode == 2
