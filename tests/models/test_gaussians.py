"""Gaussians: activations, the PLY layout, and errors of the renderer a person can act on."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.cameras import mv6
from models.gaussians import Gaussians, RenderError, load_gsplat, load_ply, render, save_ply


@pytest.fixture
def twelve(shared: Path) -> Gaussians:
    golden = torch.load(shared / "fixtures" / "ply_12.pt", weights_only=True)
    return Gaussians(*(golden[key][None] for key in ("xyz", "features", "scaling", "rotation", "opacity")))


def test_a_ply_has_the_bytes_of_the_public_code(twelve: Gaussians, shared: Path, tmp_path: Path) -> None:
    save_ply(tmp_path / "scene.ply", twelve)
    assert (tmp_path / "scene.ply").read_bytes() == (shared / "fixtures" / "ply_12.ply").read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["scene.ply"]


def test_a_ply_comes_back_as_it_was(twelve: Gaussians, tmp_path: Path) -> None:
    save_ply(tmp_path / "scene.ply", twelve)
    back = load_ply(tmp_path / "scene.ply")
    for field in ("means", "sh", "log_scales", "quats", "opacity_logits"):
        assert torch.equal(getattr(back, field), getattr(twelve, field)), field


def test_a_cut_or_foreign_ply_is_refused(twelve: Gaussians, tmp_path: Path) -> None:
    path = tmp_path / "scene.ply"
    save_ply(path, twelve)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="cut or damaged"):
        load_ply(path)
    path.write_bytes(whole.replace(b"property uchar red\n", b""))
    with pytest.raises(ValueError, match="not a binary little-endian 3DGS PLY"):
        load_ply(path)


def test_a_ply_holds_one_scene(twelve: Gaussians, tmp_path: Path) -> None:
    two = twelve.map(lambda field: field.repeat(2, *[1] * (field.dim() - 1)))
    with pytest.raises(ValueError, match="batch of 2"):
        save_ply(tmp_path / "scene.ply", two)
    save_ply(tmp_path / "scene.ply", two.scene(1))


def test_activations_agree_with_the_fixture(shared: Path) -> None:
    out = torch.load(shared / "fixtures" / "gslrm_tiny.pt", weights_only=True)["out"]
    raw = Gaussians(*(out[key][None] for key in ("xyz", "features", "scaling", "rotation", "opacity")))
    torch.testing.assert_close(raw.scales[0], out["scale_act"], atol=1e-6, rtol=0)
    torch.testing.assert_close(raw.opacities[0], out["opacity_act"][:, 0], atol=1e-6, rtol=0)
    assert raw.colors.min() >= 0


def test_shapes_that_do_not_fit_are_named(twelve: Gaussians) -> None:
    rig = mv6(16)
    with pytest.raises(ValueError, match=r"c2w \[6, 4, 4\]"):
        render(twelve, rig.c2w, rig.fxfycxcy, 16, 16)


def test_gsplat_without_a_gpu_says_what_to_do(twelve: Gaussians) -> None:
    rig = mv6(16)
    with pytest.raises(RenderError, match="backend='torch'"):
        render(twelve, rig.c2w[None], rig.fxfycxcy[None], 16, 16, backend="gsplat")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_no_gpu_is_said_before_anything_is_compiled() -> None:
    with pytest.raises(RenderError, match="torch sees none"):
        load_gsplat()
