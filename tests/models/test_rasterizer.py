"""The CPU rasteriser against a dense twin, finite differences, gsplat's projection and gsplat itself."""
from __future__ import annotations

import importlib
import math
import resource
import time

import pytest
import torch
from torch import Tensor

from models import rasterizer
from models.cameras import invert_rigid, mv6
from models.gaussians import Gaussians, load_gsplat, render


def some_gaussians(count: int, log_scale: float = -2.3, dtype: torch.dtype = torch.float32,
                   batch: int = 1) -> Gaussians:
    draw = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, count, *shape, generator=draw, dtype=torch.float64).to(dtype)

    return Gaussians(means=normal(3) * 0.4, sh=normal(1, 3), log_scales=log_scale + 0.5 * normal(3),
                     quats=normal(4), opacity_logits=normal(1) * 2)


def cameras(size: int, views: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rig = mv6(size)
    return rig.c2w[None, :views].to(dtype), rig.fxfycxcy[None, :views].to(dtype)


def activated(gaussians: Gaussians) -> tuple[Tensor, ...]:
    return (gaussians.means, gaussians.quats, gaussians.scales,
            torch.nn.functional.logsigmoid(gaussians.opacity_logits[..., 0]), gaussians.colors)


def dense(fields: tuple[Tensor, ...], c2w: Tensor, fxfycxcy: Tensor, size: int,
          stop: float) -> tuple[Tensor, Tensor]:
    """Every Gaussian on every pixel of the first view, one after the other, by plain autograd."""
    means, quats, scales, log_opacities, colors = fields
    splats = rasterizer.project(means, quats, scales, c2w, fxfycxcy, size, size)
    at = torch.arange(size, dtype=means.dtype) + 0.5
    clear, open_ = torch.ones(size, size, dtype=means.dtype), torch.ones(size, size, dtype=torch.bool)
    image = torch.zeros(3, size, size, dtype=means.dtype)
    for n in splats.depths[0, 0].argsort().tolist():
        if splats.depths[0, 0, n] <= rasterizer.NEAR:
            continue
        dx, dy = at - splats.means[0, 0, n, 0], (at - splats.means[0, 0, n, 1])[:, None]
        s, t, r = splats.factors[0, 0, n]
        sigma = 0.5 * (2 * s * s * dx * dx + 2 * (t * t + r * r) * dy * dy) + 2 * s * t * dx * dy
        alpha = (log_opacities[0, n].exp() * torch.exp(-sigma)).clamp(max=rasterizer.ALPHA_MAX)
        open_ = open_ & ~((alpha >= rasterizer.ALPHA_MIN) & (clear * (1 - alpha) <= stop))
        alpha = torch.where((alpha >= rasterizer.ALPHA_MIN) & open_, alpha, 0.0)
        image = image + colors[0, n, :, None, None] * alpha * clear
        clear = clear * (1 - alpha)
    return image, clear


@pytest.mark.parametrize("opacity_shift", [0.0, 8.0])  # 8: pixels close early and alphas are held at .999
def test_image_and_gradients_equal_the_dense_twin(opacity_shift: float) -> None:
    gaussians = some_gaussians(150, dtype=torch.float64)
    c2w, fxfycxcy = cameras(20, views=1, dtype=torch.float64)
    raw = [field.detach().requires_grad_() for field in activated(gaussians)]
    fields = (*raw[:3], torch.nn.functional.logsigmoid(raw[3] + opacity_shift), raw[4])
    weights = torch.rand(4, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for color, clear in (dense(fields, c2w, fxfycxcy, 20, rasterizer.STOP),
                         rasterizer.rasterize(*fields, c2w, fxfycxcy, 20, 20)):
        picture = torch.cat([color.reshape(3, 20, 20), clear.reshape(1, 20, 20)])
        gradients.append((picture, *torch.autograd.grad((picture * weights).sum(), raw, retain_graph=True)))
    for ours, twin in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(ours, twin, atol=1e-9, rtol=1e-7)


def test_gradcheck_in_double_precision() -> None:
    gaussians = some_gaussians(6, log_scale=-1.5, dtype=torch.float64, batch=2)
    rig = mv6(9)
    c2w, fxfycxcy = (field[:4].double().unflatten(0, (2, 2)) for field in (rig.c2w, rig.fxfycxcy))
    fields = [field.detach().requires_grad_() for field in activated(gaussians)]

    def draw(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return rasterizer.rasterize(*inputs, c2w, fxfycxcy, 9, 7, stop=0.0)

    assert torch.autograd.gradcheck(draw, fields, atol=1e-6)


def test_many_overlapping_blocks_equal_the_dense_twin_in_single_precision() -> None:
    gaussians = some_gaussians(300, log_scale=-1.2)
    c2w, fxfycxcy = cameras(16, views=1)
    fields = activated(gaussians)
    color, clear = rasterizer.rasterize(*fields, c2w, fxfycxcy, 16, 16, stop=0.0)
    twin, twin_clear = dense(fields, c2w, fxfycxcy, 16, 0.0)
    torch.testing.assert_close(color[0, 0], twin, atol=2e-5, rtol=0)
    torch.testing.assert_close(clear[0, 0, 0], twin_clear, atol=2e-5, rtol=0)


def test_projection_agrees_with_gsplat() -> None:
    oracle = importlib.import_module("gsplat.cuda._torch_impl")
    gaussians = some_gaussians(400, dtype=torch.float64)
    c2w, fxfycxcy = cameras(64, dtype=torch.float64)
    c2w[:, :, :3, 3] *= 0.3  # close up: Gaussians behind the camera and far outside the frame
    pinhole = torch.diag_embed(torch.cat([fxfycxcy[..., :2], torch.ones(1, 6, 1)], -1))
    pinhole[..., :2, 2] = fxfycxcy[..., 2:]
    covariances, _ = oracle._quat_scale_to_covar_preci(gaussians.quats, gaussians.scales, compute_preci=False)
    _, means, depths, conics, _ = oracle._fully_fused_projection(
        gaussians.means, covariances, invert_rigid(c2w), pinhole, 64, 64)
    ours = rasterizer.project(gaussians.means, gaussians.quats, gaussians.scales, c2w, fxfycxcy, 64, 64)
    s, t, r = ours.factors.unbind(-1)
    seen = depths > rasterizer.NEAR
    torch.testing.assert_close(ours.depths, depths)
    torch.testing.assert_close(ours.means[seen], means[seen])
    ours_conics = torch.stack([2 * s * s, 2 * s * t, 2 * (t * t + r * r)], -1)
    torch.testing.assert_close(ours_conics[seen], conics[seen], atol=1e-9, rtol=1e-5)


def test_what_cannot_be_seen_costs_nothing_and_has_no_gradient() -> None:
    gaussians = some_gaussians(4).map(lambda field: field.clone())
    gaussians.means[0, :, :] = torch.tensor([[0.0, -2.7, 0.0], [0, -9, 0], [50, 0, 0], [0, 0, 0]])
    gaussians.opacity_logits[0, 3] = -20.0
    gaussians = gaussians.map(lambda field: field.requires_grad_())
    c2w, fxfycxcy = cameras(16, views=1)
    image, alpha = render(gaussians, c2w, fxfycxcy, 16, 16)
    image.sum().backward()
    assert bool((image == 1).all()) and bool((alpha == 0).all())
    for field in (gaussians.means, gaussians.quats, gaussians.log_scales, gaussians.opacity_logits):
        assert bool((field.grad == 0).all())


def test_rendering_under_autocast_and_over_a_background() -> None:
    gaussians = some_gaussians(50)
    gaussians = gaussians.map(lambda field: field.requires_grad_())
    c2w, fxfycxcy = cameras(16, views=2)
    black = render(gaussians, c2w, fxfycxcy, 16, 16, background=(0, 0, 0))
    red = render(gaussians, c2w, fxfycxcy, 16, 16, background=(1, 0, 0))
    torch.testing.assert_close(red.image[:, :, 0], black.image[:, :, 0] + 1 - black.alpha[:, :, 0])
    torch.testing.assert_close(red.image[:, :, 1:], black.image[:, :, 1:])
    plain = torch.autograd.grad(black.image.square().sum(), gaussians.means)
    with torch.autocast("cpu", torch.bfloat16):
        again = render(gaussians, c2w, fxfycxcy, 16, 16, background=(0, 0, 0))
    low = torch.autograd.grad(again.image.square().sum(), gaussians.means)
    assert torch.equal(again.image, black.image) and torch.equal(low[0], plain[0])


def test_a_view_does_not_depend_on_the_views_rendered_with_it() -> None:
    gaussians = some_gaussians(200, batch=2)
    c2w, fxfycxcy = (field.expand(2, -1, *field.shape[2:]) for field in cameras(24))
    together = render(gaussians, c2w, fxfycxcy, 24, 20)
    alone = render(gaussians.scene(1), c2w[1:, 4:5], fxfycxcy[1:, 4:5], 24, 20)
    assert together.image.shape == (2, 6, 3, 20, 24) and together.alpha.shape == (2, 6, 1, 20, 24)
    torch.testing.assert_close(together.image[1:, 4:5], alone.image, atol=1e-6, rtol=0)


@pytest.mark.parametrize("log_scale", [-2.3, math.log(0.6 * 2.7 / 68.6)])
def test_a_training_size_scene_is_fast_and_small(log_scale: float) -> None:
    gaussians = some_gaussians(2 + 6 * 64 * 64, log_scale).map(lambda field: field.requires_grad_())
    c2w, fxfycxcy = cameras(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    render(gaussians, c2w, fxfycxcy, 64, 64).image.square().sum().backward()
    took = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"24,578 Gaussians, 6 x 64 x 64 px, log scale {log_scale:.1f}: {took:.2f} s, +{grown:.0f} MB")
    assert took < 5, "wanted: under 1 s on 2 cores"
    assert grown < 800, "MB; a dense Gaussians x pixels table would take 2,400"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with gsplat, which needs a CUDA GPU")
def test_agrees_with_gsplat_on_a_gpu() -> None:
    load_gsplat()
    c2w, fxfycxcy = (field.cuda() for field in cameras(64))
    results = []
    for backend in ("gsplat", "torch"):
        gaussians = some_gaussians(2000).map(lambda field: field.cuda().requires_grad_())
        image, alpha = render(gaussians, c2w, fxfycxcy, 64, 64, backend=backend)
        image.square().mean().backward()
        results.append((image, alpha, gaussians.means.grad, gaussians.log_scales.grad, gaussians.sh.grad))
    for ours, theirs in zip(results[1], results[0]):
        scale = theirs.abs().max().clamp(min=1e-12)
        torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-3, rtol=0)
