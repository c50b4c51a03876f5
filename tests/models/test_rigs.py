"""Rigs as wholes: records, conversions, messages, and what may be done to the cameras of a lab."""
from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from models import rigs
from models.cameras import Rig, intrinsics, look_at, mv6, orbit32, turntable


def lab(seed: int, views: int = 6) -> Rig:
    """Cameras around the origin at distances, heights and focal lengths of their own."""
    generator = torch.Generator().manual_seed(seed)
    azimuth = 2 * torch.pi * torch.rand(views, generator=generator, dtype=torch.float64)
    elevation = 0.6 * torch.rand(views, generator=generator, dtype=torch.float64) - 0.1
    distance = 2 + 1.4 * torch.rand(views, 1, generator=generator, dtype=torch.float64)
    direction = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], 1)
    focal = 1 + 0.1 * torch.rand(views, 1, generator=generator, dtype=torch.float64)
    fxfycxcy = intrinsics(128, 128, 35) * torch.cat([focal, focal, torch.ones(views, 2, dtype=torch.float64)], 1)
    names = tuple(f"lab {view}" for view in range(views))
    return Rig(names, look_at(direction * distance).float(), fxfycxcy.float(), 128, 128)


def pixels(rig: Rig, points: torch.Tensor) -> torch.Tensor:
    """[V, N, 2] where the rig sees world points [N, 3]."""
    c2w = rig.c2w.double()
    inside = (points[None] - c2w[:, None, :3, 3]) @ c2w[:, :3, :3]
    k = rig.fxfycxcy.double()[:, None]
    return inside[..., :2] / inside[..., 2:] * k[..., :2] + k[..., 2:]


def points(seed: int, reach: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return reach * (2 * torch.rand(200, 3, generator=generator, dtype=torch.float64) - 1)


@pytest.mark.parametrize("rig", [mv6(64), orbit32(512), lab(0), lab(1)], ids=["mv6", "orbit32", "lab 0", "lab 1"])
def test_a_record_in_a_json_file_gives_back_the_rig_exactly(rig: Rig) -> None:
    again = rigs.from_record(json.loads(json.dumps(rigs.to_record(rig))))
    assert again.names == rig.names and again.fingerprint == rig.fingerprint
    assert torch.equal(again.c2w, rig.c2w) and torch.equal(again.fxfycxcy, rig.fxfycxcy)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda record: record.pop("views"), "incomplete"),
    (lambda record: record["c2w"].pop(), "c2w"),
    (lambda record: record.update(fxfycxcy="wide"), "malformed"),
    (lambda record: record["c2w"][2][0].__setitem__(3, 1.0), "it was edited"),
    (lambda record: record["views"].reverse(), "it was edited"),
])
def test_a_damaged_record_is_refused(damage, said: str) -> None:
    record = json.loads(json.dumps(rigs.to_record(mv6(64))))
    damage(record)
    with pytest.raises(ValueError, match=said):
        rigs.from_record(record)


def test_views_of_one_rig_in_another() -> None:
    c2w, fxfycxcy = turntable(8, 64, 64)
    table = Rig(tuple(map(str, range(8))), c2w, fxfycxcy, 64, 64)
    found = rigs.matching_views(mv6(64), table)  # the turntable begins at the front and turns counter-clockwise
    assert found == [0, 7, 6, 4, 2, 1]
    assert rigs.select(table, [view for view in found if view is not None]).difference(
        replace(mv6(64), names=tuple(map(str, (0, 7, 6, 4, 2, 1))))) == ""
    assert rigs.matching_views(mv6(64), orbit32(64)) == [None] * 6  # other elevation
    assert rigs.matching_views(mv6(512), mv6(64)) == [0, 1, 2, 3, 4, 5]
    indices, distances = rigs.nearest_views(mv6(64), orbit32(64))
    assert indices.tolist() == [24, 20, 16, 8, 0, 28]  # the same azimuths, at elevation 20
    assert 1.0 < distances.min() and distances.max() < 1.2


def test_the_message_of_a_mismatch_says_which_side_has_what() -> None:
    said = rigs.mismatch("the checkpoint", mv6(64), "the data", orbit32(64))
    assert "the checkpoint has mv6: 6 views (front, front_right, right, back, left, front_left), distance 2.70" in said
    assert "the data has orbit32: 32 views" in said and "elevation 20 deg" in said
    assert mv6(64).fingerprint[:12] in said and orbit32(64).fingerprint[:12] in said
    shuffled = rigs.select(mv6(64), [2, 1, 0, 5, 4, 3])
    assert "the same cameras in another order" in rigs.mismatch("a", mv6(64), "b", shuffled)
    moved = replace(mv6(64), c2w=rigs.scaled(mv6(64), 1.1).c2w)
    assert "view front: camera poses differ by 0.27" in rigs.mismatch("a", mv6(64), "b", moved)


def test_prompts_are_made_from_the_names_of_the_views() -> None:
    assert rigs.prompts(mv6(64))[5] == "a rendering image of 3D models, front_left view, color map."
    with pytest.raises(ValueError, match="no {view}"):
        rigs.prompts(mv6(64), "a mouse")


@pytest.mark.parametrize("seed", range(8))
def test_scaling_the_scene_changes_no_picture(seed: int) -> None:
    rig, seen = lab(seed), points(seed)
    scaled = rigs.scaled(rig, 137.0)
    torch.testing.assert_close(pixels(scaled, 137.0 * seen), pixels(rig, seen), atol=1e-4, rtol=0)
    torch.testing.assert_close(rigs.distances(scaled.c2w), 137.0 * rigs.distances(rig.c2w))
    assert torch.equal(scaled.fxfycxcy, rig.fxfycxcy)


@pytest.mark.parametrize("seed", range(8))
def test_moving_the_origin_changes_no_picture(seed: int) -> None:
    rig, seen, origin = lab(seed), points(seed), torch.tensor([0.3, -0.2, 0.5])
    moved = rigs.translated(rig, origin)
    torch.testing.assert_close(pixels(moved, seen - origin.double()), pixels(rig, seen), atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_virtual_cameras_stand_at_the_radius_and_keep_the_picture(seed: int) -> None:
    rig, seen = lab(seed), points(seed)
    virtual = rigs.at_radius(rig)
    torch.testing.assert_close(rigs.distances(virtual.c2w), torch.full((6,), 2.7))
    off = (pixels(virtual, seen) - pixels(rig, seen)).norm(dim=2)
    alone = replace(virtual, fxfycxcy=rig.fxfycxcy)  # what poisoned the mouse runs
    off_alone = (pixels(alone, seen) - pixels(rig, seen)).norm(dim=2)
    assert off.median() < 0.3 and off_alone.median() > 5 * off.median()
    origin = torch.zeros(1, 3, dtype=torch.float64)
    torch.testing.assert_close(pixels(virtual, origin), pixels(rig, origin), atol=1e-4, rtol=0)  # exact there


@pytest.mark.parametrize("seed", range(4))
def test_the_point_the_cameras_look_at_is_found(seed: int) -> None:
    target = torch.tensor([0.4, -0.1, 0.2])
    rig = lab(seed)
    c2w = look_at(rig.c2w[:, :3, 3], target)
    torch.testing.assert_close(rigs.looked_at(c2w), target.double(), atol=1e-5, rtol=0)


def test_cameras_side_by_side_look_at_no_point() -> None:
    with pytest.raises(ValueError, match="parallel"):
        rigs.looked_at(mv6(64).c2w[:1].repeat(2, 1, 1))
