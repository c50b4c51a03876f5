"""Cameras and rigs against the fixtures, the data sets and their own invariants."""
from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import cameras
from models.cameras import Rig


def rig_of(folder: Path, names: tuple[str, ...]) -> Rig:
    frames = json.loads((folder / "opencv_cameras.json").read_text())["frames"]
    w2c = torch.tensor([frame["w2c"] for frame in frames], dtype=torch.float64)
    pinhole = torch.tensor([[frame[key] for key in ("fx", "fy", "cx", "cy")] for frame in frames])
    return Rig.from_w2c(names, w2c, pinhole, frames[0]["w"], frames[0]["h"])


@pytest.mark.parametrize("elevation", [0, 20])
def test_turntable_is_the_published_one(shared: Path, elevation: int) -> None:
    golden = np.load(shared / "fixtures" / "turntable_8.npz")
    c2w, fxfycxcy = cameras.turntable(8, 64, 64, elevation_deg=elevation)
    np.testing.assert_allclose(c2w.numpy(), golden[f"c{elevation}"], atol=1e-6)
    np.testing.assert_allclose(fxfycxcy.numpy(), golden[f"k{elevation}"], rtol=1e-6)


def test_turntable_of_a_wide_image_has_square_pixels() -> None:
    _, fxfycxcy = cameras.turntable(3, 96, 64)
    focal = 48 / math.tan(math.radians(25))
    torch.testing.assert_close(fxfycxcy, torch.tensor([[focal, focal, 48.0, 32.0]]).repeat(3, 1))


def test_mv6_is_the_rig_of_the_data_at_any_resolution(shared: Path) -> None:
    rig = cameras.mv6(512)
    assert rig.fxfycxcy[0, 0].item() == pytest.approx(548.9937744)
    for name in ("mouse_mvrig/sample_000000", "human_mvrig"):
        folder = next((shared / "data").glob(f"{name}*/**/opencv_cameras.json")).parent
        found = rig_of(folder, rig.names)
        assert rig.difference(found) == ""
        assert rig.fingerprint == found.fingerprint


def test_orbit32_is_the_rig_of_the_data(shared: Path) -> None:
    rig = cameras.orbit32(128)
    folder = next((shared / "data" / "mouse_orbit32").glob("**/opencv_cameras.json")).parent
    found = rig_of(folder, rig.names)
    assert rig.difference(found) == ""
    assert rig.fingerprint == found.fingerprint


def test_a_fingerprint_tells_rigs_apart() -> None:
    rig = cameras.mv6(64)
    moved = rig.c2w.clone()
    moved[3, :3, 3] *= 1.01
    others = [replace(rig, c2w=moved), replace(rig, names=("x", *rig.names[1:])),
              replace(rig, fxfycxcy=rig.fxfycxcy * 1.01),
              replace(rig, c2w=rig.c2w.flip(0), fxfycxcy=rig.fxfycxcy.flip(0))]
    assert rig.resized(512, 512).fingerprint == rig.fingerprint == cameras.mv6(512).fingerprint
    assert len({rig.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert "back" in rig.difference(others[0])
    assert all(rig.difference(other) for other in others)


def test_rays_pass_through_pixel_centres() -> None:
    rig = cameras.mv6(32)
    origins, directions = cameras.rays(rig.c2w, rig.fxfycxcy, 32, 32)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(6, 32, 32))
    points = origins + 2.0 * directions
    in_camera = (points[2, :, 5, 9] - rig.c2w[2, :3, 3]) @ rig.c2w[2, :3, :3]
    fx, fy, cx, cy = rig.fxfycxcy[2].tolist()
    assert (fx * in_camera[0] / in_camera[2] + cx).item() == pytest.approx(9.5, abs=1e-4)
    assert (fy * in_camera[1] / in_camera[2] + cy).item() == pytest.approx(5.5, abs=1e-4)


def test_rays_agree_with_the_fixture(shared: Path) -> None:
    golden = torch.load(shared / "fixtures" / "gslrm_tiny.pt", weights_only=True)
    origins, directions = cameras.rays(golden["c2w"], golden["fxfycxcy"], 32, 32)
    torch.testing.assert_close(origins, golden["ray_o"], atol=1e-6, rtol=0)
    torch.testing.assert_close(directions, golden["ray_d"], atol=1e-6, rtol=0)


def test_look_at_refuses_a_camera_without_up() -> None:
    with pytest.raises(ValueError, match="straight above"):
        cameras.look_at(torch.tensor([0.0, 0.0, 2.0]))


W2C = cameras.invert_rigid(cameras.mv6(64).c2w[0].double())


def changed(row: int, column: int, value: float) -> torch.Tensor:
    w2c = W2C.clone()
    w2c[row, column] = value
    return w2c


@pytest.mark.parametrize(("w2c", "name"), [
    (W2C[:3], "shape"),
    (changed(1, 2, math.nan), "non-finite"),
    (torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)) @ W2C, "mirrored"),
    (torch.diag(torch.tensor([2.0, 2, 2, 1], dtype=torch.float64)) @ W2C, "not-rigid"),
    (changed(2, 3, -2.7), "behind-camera"),
    (changed(0, 3, 2.0), "misses-object"),
])
def test_a_camera_defect_has_a_name(w2c: torch.Tensor, name: str) -> None:
    (defect,) = cameras.camera_defects(w2c.tolist(), 68.6, 68.6, 32.0, 32.0, 64, 64)
    assert defect.startswith(f"{name}: ")


def test_sound_cameras_have_no_defects(shared: Path) -> None:
    assert cameras.camera_defects(W2C, 0.0, 68.6, 32.0, 32.0, 64, 64)[0].startswith("intrinsics: ")
    for file in (shared / "data").glob("*/**/sample_00000*/opencv_cameras.json"):
        for frame in json.loads(file.read_text())["frames"]:
            numbers = [frame[key] for key in ("w2c", "fx", "fy", "cx", "cy", "w", "h")]
            assert cameras.camera_defects(*numbers) == []
