"""The visual hull of silhouettes: a solid seen by right cameras agrees with itself, and by wrong ones does not."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import hull, rigs
from models.cameras import Rig, intrinsics, mv6, orbit32, rays
from tests.models.test_rigs import lab


def solid(seed: int) -> torch.Tensor:
    """Spheres [N, 4] (centre, radius) that together look different from every side: a body, a head, a tail."""
    generator = torch.Generator().manual_seed(seed)
    at = 0.6 * torch.rand(4, 3, generator=generator) - 0.3
    return torch.cat([at, torch.tensor([[0.3], [0.2], [0.12], [0.08]])], 1)


def silhouettes(rig: Rig, spheres: torch.Tensor) -> torch.Tensor:
    """alpha [V, H, W] of a union of spheres."""
    origins, directions = rays(rig.c2w, rig.fxfycxcy, rig.height, rig.width)
    towards = spheres[:, :3, None, None] - origins[:, None]  # [V, N, 3, H, W]
    depth = (towards * directions[:, None]).sum(2, keepdim=True)
    distance = (towards - depth * directions[:, None]).norm(dim=2)
    return (distance < spheres[:, 3, None, None]).any(1).float()


def least(alpha: torch.Tensor, rig: Rig) -> float:
    return hull.explained(alpha, rig.c2w, rig.fxfycxcy).min().item()


@pytest.mark.parametrize("seed", range(3))
def test_right_cameras_explain_every_silhouette(seed: int) -> None:
    for rig in (mv6(128), lab(seed), rigs.select(orbit32(96), list(range(0, 32, 4)))):
        assert least(silhouettes(rig, solid(seed)), rig) >= 0.997


@pytest.mark.parametrize("seed", range(3))
def test_cameras_moved_alone_do_not(seed: int) -> None:
    rig = lab(seed)
    alpha = silhouettes(rig, solid(seed))
    virtual = rigs.at_radius(rig)
    assert least(alpha, virtual) > hull.THRESHOLD  # the focal length went along
    assert least(alpha, replace(virtual, fxfycxcy=rig.fxfycxcy)) < hull.THRESHOLD


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_views_do_not(seed: int) -> None:
    rig = mv6(128)
    alpha = silhouettes(rig, solid(seed))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert least(alpha[order], rig) < hull.THRESHOLD


@pytest.mark.parametrize("seed", range(3))
def test_a_crop_with_the_old_principal_point_does_not(seed: int) -> None:
    rig = mv6(128)
    alpha = silhouettes(rig, solid(seed))
    alpha[2] = alpha[2].roll(12, 1)
    assert least(alpha, rig) < hull.THRESHOLD


@pytest.mark.parametrize("seed", range(3))
def test_what_lies_outside_a_frame_is_unknown(seed: int) -> None:
    """Half of the views see only a part of the object: nothing that they do not see may count against the others."""
    rig = mv6(128)
    close = intrinsics(128, 128, 14).float()
    mixed = replace(rig, fxfycxcy=torch.stack([rig.fxfycxcy[0], close, rig.fxfycxcy[2], close, close, close]))
    alpha = silhouettes(mixed, solid(seed))
    assert hull.reaches_edge(alpha).any() and not hull.reaches_edge(alpha)[0]
    assert least(alpha, mixed) >= 0.997


def test_the_unit_of_the_world_does_not_matter() -> None:
    rig = lab(3)
    alpha = silhouettes(rig, solid(3))
    in_mm = rigs.scaled(rig, 122.0)
    torch.testing.assert_close(hull.explained(alpha, in_mm.c2w, in_mm.fxfycxcy),
                               hull.explained(alpha, rig.c2w, rig.fxfycxcy), atol=4e-3, rtol=0)


def test_an_empty_view_has_nothing_explained_and_one_view_alone_is_refused() -> None:
    rig = mv6(64)
    alpha = silhouettes(rig, solid(0))
    alpha[4] = 0
    assert hull.explained(alpha, rig.c2w, rig.fxfycxcy)[4] == 0
    with pytest.raises(ValueError, match="two"):
        hull.explained(alpha[:1], rig.c2w[:1], rig.fxfycxcy[:1])
