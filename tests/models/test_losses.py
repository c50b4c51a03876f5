"""Losses against golden numbers of the public code and against their definitions."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import losses
from models.perceptual import GSLRM_PREFIX, VGG16_STAGES, Lpips, PerceptualLoss
from models.weights import WeightsError


@pytest.fixture
def golden(shared: Path) -> dict:
    return torch.load(shared / "fixtures" / "gslrm_tiny.pt", weights_only=True)


def pair(size: int = 16, count: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=draw), torch.rand(count, 3, size, size, generator=draw)


def test_losses_agree_with_the_public_code(golden: dict) -> None:
    rendering, target, mask = golden["rendering"], golden["image"][:, :, :3], golden["image"][:, :, 3:]
    patches = golden["out"]["xyz"][2:].view(1, 6, 4, 4, 8, 8, 3)
    points = patches.permute(0, 1, 6, 2, 4, 3, 5).reshape(1, 6, 3, 32, 32)
    found = {
        "l2_loss": losses.l2(rendering, target), "psnr": losses.psnr(losses.l2(rendering, target)),
        "ssim_loss": losses.ssim(rendering, target),
        "pixelalign_loss": losses.pixelalign(points, golden["ray_o"], golden["ray_d"], mask),
        "pointsdist_loss": losses.pointsdist(points, golden["ray_o"]),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(golden["losses"][name], abs=1e-5, rel=1e-5), name
    weights = golden["loss_weights"]
    total = found["l2_loss"] + sum(weights[f"{name}_weight"] * found[name] for name in found if name not in
                                   ("l2_loss", "psnr"))
    assert total.item() == pytest.approx(golden["losses"]["loss"], abs=1e-5)


def test_ssim_of_known_images() -> None:
    image, other = pair()
    assert losses.ssim(image, image).item() == pytest.approx(0, abs=1e-6)
    black, white = torch.zeros(1, 3, 11, 11), torch.ones(1, 3, 11, 11)
    assert losses.ssim(white, black).item() == pytest.approx(1 - 1e-4 / (1 + 1e-4), abs=1e-6)
    assert losses.ssim_map(image, other).shape == (2, 3, 6, 6)
    with pytest.raises(ValueError, match="at least 11 px"):
        losses.ssim(image[..., :10], other[..., :10])


def test_metrics_are_per_image_and_clamp_the_rendering() -> None:
    image, other = pair(count=6)
    image, other = (field.view(2, 3, 3, 16, 16) for field in (image, other))
    db, similarity = losses.image_psnr(image, other), losses.image_ssim(image, other)
    assert db.shape == similarity.shape == (2, 3)
    assert db[1, 2].item() == pytest.approx(-10 * math.log10((image[1, 2] - other[1, 2]).square().mean()))
    alone = losses.ssim(image[0, 1], other[0, 1]).item()
    assert similarity[0, 1].item() == pytest.approx(1 - alone, abs=1e-6)
    white = torch.ones_like(image)
    assert torch.equal(losses.image_psnr(white * 3, other), losses.image_psnr(white, other))


def test_masked_losses_look_only_inside() -> None:
    rendering, target = pair()
    mask = torch.zeros(2, 1, 16, 16)
    assert losses.masked_l2(rendering, target, mask).item() == 0
    assert losses.masked_ssim(rendering, target, mask).item() == pytest.approx(0, abs=1e-6)
    mask[0, 0, 3, 4] = 0.6
    apart = (rendering - target)[0, :, 3, 4].square().mean().item()
    assert losses.masked_l2(rendering, target, mask).item() == pytest.approx(apart)
    full = torch.ones_like(mask)
    assert losses.masked_ssim(rendering, target, full).item() == losses.ssim(rendering, target).item()
    whole = losses.l2(rendering, target).item()
    assert losses.masked_l2(rendering, target, full).item() == pytest.approx(whole)


def test_background_looks_only_outside() -> None:
    rendering, _ = pair()
    mask = torch.ones(2, 1, 16, 16)
    mask[1, 0, 0, 0] = 0.4
    expected = (rendering[1, :, 0, 0] - torch.tensor([1.0, 0.0, 1.0])).square().mean().item()
    assert losses.background_l2(rendering, mask, (1, 0, 1)).item() == pytest.approx(expected)


def test_pointsdist_takes_each_view_by_itself() -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(2, 3, 3, 4, 4, generator=draw)
    origins = torch.randn(2, 3, 3, 1, 1, generator=draw).expand(-1, -1, -1, 4, 4)
    alone = [losses.pointsdist(points[b : b + 1, v : v + 1], origins[b : b + 1, v : v + 1])
             for b in range(2) for v in range(3)]
    torch.testing.assert_close(losses.pointsdist(points, origins), torch.stack(alone).mean())


def vgg19_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 256, *[512] * 8]
    weights = {}
    for n, (inputs, outputs) in enumerate(zip(widths, widths[1:]), 1):
        gain = (2 / (9 * inputs)) ** 0.5
        weights[f"conv{n}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=draw) * gain
        weights[f"conv{n}.bias"] = torch.randn(outputs, generator=draw)
    return weights


def test_perceptual_loss_is_the_sum_of_the_definition(tmp_path: Path) -> None:
    weights = vgg19_weights()
    torch.save({"model": {f"module.{GSLRM_PREFIX}{name}": tensor for name, tensor in weights.items()}},
               tmp_path / "ckpt.pt")
    rendering, target = pair(size=32)
    offset = torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1)
    x, y = rendering * 255 - offset, target * 255 - offset
    expected = (x - y).abs().mean()
    taps = {2: 1 / 2.6, 4: 1 / 4.8, 6: 1 / 3.7, 10: 1 / 5.6, 14: 10 / 1.5}
    for n in range(1, 15):
        kernel, bias = weights[f"conv{n}.weight"], weights[f"conv{n}.bias"]
        x, y = (torch.conv2d(images, kernel, bias, padding=1).relu() for images in (x, y))
        expected = expected + taps.get(n, 0) * (x - y).abs().mean()
        if n in (2, 4, 8, 12):
            x, y = (torch.nn.functional.avg_pool2d(images, 2) for images in (x, y))
    found = PerceptualLoss(tmp_path / "ckpt.pt")(rendering, target)
    assert found.item() == pytest.approx(expected.item() / 255, rel=1e-5)


def test_perceptual_networks_are_frozen_and_pass_gradients() -> None:
    rendering, target = pair(size=32)
    for measure in (PerceptualLoss("random:0"), Lpips("random:0", "random:1")):
        assert not list(measure.parameters()) and not measure.state_dict()
        image = rendering.clone().requires_grad_()
        loss = measure(image, target)
        loss.backward()
        assert loss.item() > 0 and bool(image.grad.isfinite().all())
        assert measure(target, target).item() == 0


def test_lpips_weighs_unit_features_of_five_stages(tmp_path: Path) -> None:
    widths = (64, 128, 256, 512, 512)
    heads = {f"lin{n}.model.1.weight": torch.zeros(1, width, 1, 1) for n, width in enumerate(widths)}
    heads["lin0.model.1.weight"] += 1
    torch.save(heads, tmp_path / "heads.pt")
    trunk = Lpips("random:3", tmp_path / "heads.pt")
    rendering, target = pair()
    features = []
    for images in (rendering, target):
        x = (images * 2 - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) \
            / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for n in VGG16_STAGES[0]:
            x = torch.conv2d(x, getattr(trunk, f"features_{n}_weight"), padding=1).relu()
        features.append(torch.nn.functional.normalize(x, dim=1))
    expected = (features[0] - features[1]).square().sum(1).mean((1, 2))
    torch.testing.assert_close(trunk.per_image(rendering, target), expected, rtol=1e-5, atol=1e-6)


def test_weights_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    weights = vgg19_weights()
    del weights["conv7.bias"]
    torch.save(weights, tmp_path / "vgg.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    for source, why in ((tmp_path / "vgg.pt", "conv7.bias"), (tmp_path / "none.pt", "cannot be read"),
                        (tmp_path / "cut.pt", "not a torch file"), ("random:x", "random:SEED")):
        with pytest.raises(WeightsError, match=why):
            PerceptualLoss(source)
