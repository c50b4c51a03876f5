"""GS-LRM against golden numbers of the public code, its symmetry, its size and its loader."""
from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import gslrm
from models.cameras import rays
from models.gslrm import GSLRM, CheckpointMismatch, GSLRMConfig
from models.weights import WeightsError

TINY = GSLRMConfig(d=32, d_head=16, n_layer=2, patch_size=4)
FIELDS = {"means": "xyz", "sh": "features", "log_scales": "scaling", "quats": "rotation",
          "opacity_logits": "opacity"}  # ours: the public code's


@pytest.fixture
def golden(shared: Path) -> dict:
    return torch.load(shared / "fixtures" / "gslrm_tiny.pt", weights_only=True)


@pytest.fixture
def model(shared: Path) -> GSLRM:
    config = GSLRMConfig(d=64, d_head=16, n_layer=2)
    return GSLRM(config).load_upstream(shared / "fixtures" / "gslrm_tiny.pt")


def inputs(golden: dict) -> tuple[Tensor, Tensor, Tensor]:
    return golden["image"][:, :, :3], golden["c2w"], golden["fxfycxcy"]


def test_raw_gaussians_agree_with_the_public_code(model: GSLRM, golden: dict) -> None:
    found = model(*inputs(golden))
    for ours, theirs in FIELDS.items():
        torch.testing.assert_close(getattr(found, ours)[0], golden["out"][theirs], atol=1e-5, rtol=0)


def test_the_input_has_the_channels_of_the_public_code(golden: dict) -> None:
    images, c2w, fxfycxcy = inputs(golden)
    posed = gslrm.posed_images(images, *rays(c2w, fxfycxcy, 32, 32))
    torch.testing.assert_close(posed, golden["posed"], atol=1e-6, rtol=0)


def test_views_can_come_in_any_order(model: GSLRM, golden: dict) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    straight = model(*inputs(golden))
    mixed = model(*(field[:, order] for field in inputs(golden)))
    for field in fields(straight):
        ours, theirs = getattr(straight, field.name).flatten(2), getattr(mixed, field.name).flatten(2)
        torch.testing.assert_close(ours[:, :2], theirs[:, :2], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.pixel_grid(ours, 6, 32, 32)[:, order],
                                   model.pixel_grid(theirs, 6, 32, 32), atol=1e-5, rtol=0)


def test_pixel_gaussians_lie_on_their_own_rays(model: GSLRM, golden: dict) -> None:
    images, c2w, fxfycxcy = inputs(golden)
    origins, directions = rays(c2w, fxfycxcy, 32, 32)
    points = model.pixel_grid(model(images, c2w, fxfycxcy).means, 6, 32, 32)
    offsets = torch.linalg.cross(points - origins, directions, dim=2)
    assert offsets.abs().max() < 1e-5
    depth = ((points - origins) * directions).sum(2) + (origins * directions).sum(2)
    assert depth.abs().max() <= 1.8 + 1e-4


def test_the_full_size_has_the_names_and_numbers_of_the_checkpoint() -> None:
    with torch.device("meta"):
        state = GSLRM(GSLRMConfig()).state_dict()
    assert len(state) == 151
    assert sum(tensor.numel() for tensor in state.values()) == 303_565_824
    block = {"norm1.weight": [1024], "norm2.weight": [1024], "attn.to_qkv.weight": [3072, 1024],
             "attn.fc.weight": [1024, 1024], "mlp.mlp.0.weight": [4096, 1024],
             "mlp.mlp.2.weight": [1024, 4096]}
    expected = {"gaussian_position_embeddings": [2, 1024], "patch_embedder.1.weight": [1024, 576],
                "input_layer_norm.weight": [1024], "gaussian_upsampler.layernorm.weight": [1024],
                "gaussian_upsampler.linear.weight": [14, 1024], "pixel_gaussian_decoder.0.weight": [1024],
                "pixel_gaussian_decoder.1.weight": [896, 1024]}
    expected |= {f"transformer_layers.{n}.{name}": shape for n in range(24) for name, shape in block.items()}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected


def test_a_public_checkpoint_loads_without_its_prefix_and_its_vgg(tmp_path: Path) -> None:
    source, target = GSLRM(TINY), GSLRM(TINY)
    weights = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    weights["module.loss_calculator.perceptual_loss_module.net.conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save({"model": weights, "optimizer": {}, "fwdbwd_pass_step": 3}, tmp_path / "ckpt.pt")
    target.load_upstream(tmp_path / "ckpt.pt")
    for ours, theirs in zip(target.parameters(), source.parameters()):
        assert torch.equal(ours, theirs)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    weights = GSLRM(TINY).state_dict()
    weights["stray.weight"] = weights.pop("input_layer_norm.weight")
    weights["gaussian_upsampler.linear.weight"] = torch.zeros(14, 99)
    torch.save(weights, path)
    with pytest.raises(CheckpointMismatch) as refused:
        GSLRM(TINY).load_upstream(path)
    for part in (str(path), "1 missing: input_layer_norm.weight", "1 unexpected: stray.weight",
                 "gaussian_upsampler.linear.weight is [14, 99], the model has [14, 32]"):
        assert part in str(refused.value)


@pytest.mark.parametrize(("content", "why"), [
    (None, "cannot be read"), (b"", "not a torch file"), (b"PK\x03\x04 cut", "not a torch file"),
    ({"model": [1, 2]}, "no named tensors"), ([1, 2], "no named tensors"),
    ({"model": Path("x")}, "plain tensors"),
])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: object, why: str) -> None:
    path = tmp_path / "ckpt.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=why):
        GSLRM(TINY).load_upstream(path)


class Counted(TorchDispatchMode):
    """How often attention was computed, and any matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attention += "scaled_dot_product" in op.name() and "backward" not in op.name()
        self.products += op.name() in ("aten::mm", "aten::addmm")
        return op(*args, **(kwargs or {}))


def test_checkpointed_activations_change_no_gradient_and_selective_ones_spare_attention(golden: dict) -> None:
    gradients, counts = [], []
    for flag in (False, "selective", True):
        torch.manual_seed(0)
        model = GSLRM(TINY, checkpoint_activations=flag)
        loss = model(*inputs(golden)).means.square().sum()
        with Counted() as counted:
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        counts.append((counted.attention, counted.products))
    assert all(torch.equal(plain, again) for plain, *others in zip(*gradients) for again in others)
    (kept, kept_products), (selective, selective_products), (recomputed, recomputed_products) = counts
    assert (kept, selective, recomputed) == (0, 0, TINY.n_layer)
    assert kept_products < selective_products == recomputed_products


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the tracer's own look at it
def test_compiled_blocks_compute_the_same_under_the_same_names(golden: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated ahead of time as with the real backend, which would take minutes to compile here."""
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # the tracer's progress bar leaves a thread otherwise
    compiled: list[str] = []
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **how: compiled.append(how["backend"]) or plain(self, **how))
    torch.manual_seed(0)
    model = GSLRM(TINY, checkpoint_activations="selective")
    names, outputs = list(model.state_dict()), []
    for again in (False, True):
        if again:
            model.compile_blocks("aot_eager")
        found = model(*inputs(golden)).means
        found.square().sum().backward()
        outputs.append((found.detach(), [parameter.grad.clone() for parameter in model.parameters()
                                         if parameter.grad is not None]))
        model.zero_grad()
    assert compiled == ["aot_eager"] * TINY.n_layer and list(model.state_dict()) == names
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)


def test_activations_at_full_size_are_those_of_the_design() -> None:
    tokens = 2 + 6 * 64 * 64
    need = gslrm.activation_gb(GSLRMConfig(), tokens, 2)
    assert [round(gb, 1) for gb in need.values()] == [19.3, 2.4, 1.2]


def test_autocast_keeps_geometry_in_single_precision(golden: dict) -> None:
    model = GSLRM(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs(golden))
    assert {getattr(found, field.name).dtype for field in fields(found)} == {torch.float32}
    points = model.pixel_grid(found.means, 6, 32, 32)
    offsets = torch.linalg.cross(points - golden["ray_o"], golden["ray_d"], dim=2)
    assert offsets.abs().max() < 1e-5


def test_initial_weights_and_output_limits(golden: dict) -> None:
    torch.manual_seed(0)
    config = replace(TINY, d=64, scale_bias=-1.0, scale_max=-1.2, opacity_bias=3.0, depth_half=4.0,
                     clip_xyz=True)
    model = GSLRM(config)
    assert bool((model.transformer_layers[0].norm1.weight == 1).all())
    for name in ("gaussian_position_embeddings", "patch_embedder.1.weight",
                 "transformer_layers.1.mlp.mlp.2.weight"):
        assert model.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.2)
    found = model(*inputs(golden))
    assert found.log_scales.max().item() == pytest.approx(-1.2)
    assert found.opacity_logits.mean().item() == pytest.approx(3.0, abs=0.2)
    assert found.means.abs().max().item() == 1


def test_inputs_that_do_not_fit_are_named(golden: dict) -> None:
    images, c2w, fxfycxcy = inputs(golden)
    model = GSLRM(TINY)
    with pytest.raises(ValueError, match="images \\[B, V, 3, H, W\\]"):
        model(golden["image"], c2w, fxfycxcy)
    with pytest.raises(ValueError, match="c2w must be"):
        model(images, c2w[:, :5], fxfycxcy)
    with pytest.raises(ValueError, match="30 x 32 px cannot be cut into patches of 4"):
        model(images[..., :30], c2w, fxfycxcy)
    with pytest.raises(ValueError, match="not a multiple of d_head"):
        GSLRMConfig(d=100)
