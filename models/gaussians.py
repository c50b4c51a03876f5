"""3D Gaussians as the network makes them: raw fields, rendering, and the 3DGS PLY layout.

Fields are raw (log scales, opacity logits, unnormalised quaternions, SH coefficients) because that is what
checkpoints, PLY files and losses speak; the properties are the activated values that a renderer uses.
Rendering goes to gsplat on CUDA and to `models.rasterizer` elsewhere, with the same semantics.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.cameras import invert_rigid
from models.rasterizer import BLUR, NEAR, rasterize

SH_C0 = 0.28209479  # the constant band of spherical harmonics: colour = SH_C0 * f + 0.5
PLY_REST = 45  # higher-order SH coefficients of the layout; always zero here
Backend = Literal["auto", "gsplat", "torch"]


class RenderError(RuntimeError):
    """The wanted renderer cannot run here; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Gaussians:
    """A batch of scenes with N Gaussians each, world frame, unactivated."""

    means: Tensor  # [B, N, 3] world
    sh: Tensor  # [B, N, 1, 3] SH coefficients, band 0 only
    log_scales: Tensor  # [B, N, 3] log world units
    quats: Tensor  # [B, N, 4] wxyz, any length
    opacity_logits: Tensor  # [B, N, 1]

    @property
    def scales(self) -> Tensor:
        """[B, N, 3] world units."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Tensor:
        """[B, N] in 0..1."""
        return self.opacity_logits[..., 0].sigmoid()

    @property
    def colors(self) -> Tensor:
        """[B, N, 3] RGB, not below 0; above 1 is possible."""
        return (SH_C0 * self.sh[..., 0, :] + 0.5).clamp(min=0)

    def map(self, change: Callable[[Tensor], Tensor]) -> Gaussians:
        """The Gaussians with `change` (Tensor -> Tensor) applied to every field."""
        return Gaussians(*(change(getattr(self, field.name)) for field in fields(self)))

    def scene(self, index: int) -> Gaussians:
        """One scene of the batch, as a batch of one."""
        return self.map(lambda field: field[index : index + 1])


class Rendering(NamedTuple):
    image: Tensor  # [B, V, 3, H, W] RGB over the background, not clamped
    alpha: Tensor  # [B, V, 1, H, W] in 0..1


def render(gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, width: int, height: int,
           background: tuple[float, float, float] = (1.0, 1.0, 1.0), backend: Backend = "auto") -> Rendering:
    """Render every scene into its views; differentiable in the Gaussians.

    Args:
        gaussians: B scenes; c2w: [B, V, 4, 4] OpenCV; fxfycxcy: [B, V, 4] px of a width x height image.
        background: RGB behind the Gaussians.
        backend: `auto` is gsplat for CUDA tensors and the torch rasteriser for the rest.
    Raises:
        ValueError for shapes that do not fit; RenderError when gsplat is needed and cannot run.
    """
    batch, views = c2w.shape[:2]
    if len(gaussians.means) != batch or fxfycxcy.shape != (batch, views, 4):
        raise ValueError(f"cannot render {len(gaussians.means)} scenes with c2w {list(c2w.shape)} and "
                         f"fxfycxcy {list(fxfycxcy.shape)}: c2w must be [B, V, 4, 4] and fxfycxcy [B, V, 4]")
    if backend == "auto":
        backend = "gsplat" if gaussians.means.is_cuda else "torch"
    draw = _render_gsplat if backend == "gsplat" else _render_torch
    # bf16 has 8 bits: a splat would land on the wrong pixel
    with torch.autocast(gaussians.means.device.type, enabled=False):
        gaussians = gaussians.map(lambda field: field if field.dtype == torch.float64 else field.float())
        dtype = gaussians.means.dtype
        color, clear = draw(gaussians, c2w.to(dtype), fxfycxcy.to(dtype), width, height)
        behind = color.new_tensor(background).view(3, 1, 1)
        return Rendering(color + clear * behind, 1 - clear)


def _render_torch(gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, width: int,
                  height: int) -> tuple[Tensor, Tensor]:
    log_opacities = F.logsigmoid(gaussians.opacity_logits[..., 0])
    return rasterize(gaussians.means, gaussians.quats, gaussians.scales, log_opacities, gaussians.colors,
                     c2w, fxfycxcy, width, height)


def _render_gsplat(gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, width: int,
                   height: int) -> tuple[Tensor, Tensor]:
    if not gaussians.means.is_cuda:
        raise RenderError("gsplat renders CUDA tensors only, and these are on the CPU: move the Gaussians "
                          "and cameras to a GPU, or use backend='torch'")
    gsplat = load_gsplat()
    pinhole = torch.zeros(*fxfycxcy.shape[:-1], 3, 3, dtype=fxfycxcy.dtype, device=fxfycxcy.device)
    pinhole[..., [0, 1, 0, 1], [0, 1, 2, 2]] = fxfycxcy
    pinhole[..., 2, 2] = 1
    # every Gaussian of an object-centred rig is in nearly every frame: packing would only add an index
    color, alpha, _ = gsplat.rasterization(
        gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.colors,
        invert_rigid(c2w), pinhole, width, height, near_plane=NEAR, eps2d=BLUR, packed=False)
    return color.movedim(-1, -3), 1 - alpha.movedim(-1, -3)


def load_gsplat() -> ModuleType:
    """gsplat with its CUDA kernels. The first call on a machine compiles them (minutes): make it in one
    process before torchrun starts several, which would delete each other's build.

    Raises RenderError with the remedy when a GPU, the package, the CUDA compiler or a sound build is missing.
    """
    if not torch.cuda.is_available():
        raise RenderError("gsplat needs a CUDA GPU, and torch sees none: check nvidia-smi, "
                          "CUDA_VISIBLE_DEVICES and whether torch is a CUDA build, or render with "
                          "backend='torch'")
    try:
        import gsplat
        from gsplat.cuda import _backend  # importing gsplat alone succeeds without its kernels
    except ImportError as error:
        raise RenderError(f"gsplat cannot be imported ({error}): install the [train] extra (pip install "
                          "gsplat packaging), or render with backend='torch'") from error
    except (RuntimeError, OSError) as error:
        raise RenderError(f"gsplat's CUDA kernels did not build: {error}\nCheck that nvcc fits torch's CUDA "
                          f"{torch.version.cuda}, set TORCH_CUDA_ARCH_LIST and MAX_JOBS, remove the build "
                          "folder under ~/.cache/torch_extensions and try again") from error
    if _backend._C is None:
        raise RenderError("gsplat is installed but has no CUDA kernels, because it found no nvcc: install "
                          f"the CUDA toolkit {torch.version.cuda} or set CUDA_HOME, or render with "
                          "backend='torch'")
    return gsplat


def _ply_dtype() -> np.dtype:
    floats = [*(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(PLY_REST)), "opacity",
              *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    return np.dtype([(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
                    + [(name, "<f4") for name in floats])


def _ply_header(count: int) -> bytes:
    kinds = {"f": "float", "u": "uchar"}
    dtype = _ply_dtype()
    properties = [f"property {kinds[dtype[name].kind]} {name}" for name in dtype.names or ()]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {count}", *properties, "end_header"]
    return ("\n".join(lines) + "\n").encode("ascii")


def save_ply(path: str | os.PathLike[str], gaussians: Gaussians) -> None:
    """Write one scene in the binary 3DGS layout, vertices in the order given; the file appears complete or
    not at all. Raises ValueError for a batch of several scenes."""
    if gaussians.means.dim() == 3 and len(gaussians.means) != 1:
        raise ValueError(f"a PLY file holds one scene, not a batch of {len(gaussians.means)}: save each "
                         "scene(i)")
    scene = gaussians.map(lambda field: field.detach().float().cpu())
    sh = scene.sh.reshape(-1, 3).numpy()
    shade = np.clip(np.float32(SH_C0) * sh + np.float32(0.5), 0, 1) * 255
    vertices = np.zeros(len(sh), _ply_dtype())
    _fill(vertices, ("x", "y", "z"), scene.means)
    _fill(vertices, ("red", "green", "blue"), torch.from_numpy(shade.astype(np.uint8)))
    _fill(vertices, ("f_dc_0", "f_dc_1", "f_dc_2"), scene.sh)
    _fill(vertices, ("opacity",), scene.opacity_logits)
    _fill(vertices, ("scale_0", "scale_1", "scale_2"), scene.log_scales)
    _fill(vertices, ("rot_0", "rot_1", "rot_2", "rot_3"), scene.quats)
    aside = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    aside.write_bytes(_ply_header(len(vertices)) + vertices.tobytes())
    os.replace(aside, path)


def _fill(vertices: np.ndarray, names: tuple[str, ...], values: Tensor) -> None:
    for name, column in zip(names, values.reshape(len(vertices), len(names)).unbind(-1)):
        vertices[name] = column.numpy()


def load_ply(path: str | os.PathLike[str]) -> Gaussians:
    """Read what `save_ply` wrote, as a batch of one. Raises ValueError for another layout or a cut file."""
    raw = Path(path).read_bytes()
    head, mark, body = raw.partition(b"end_header\n")
    count = next((line.split()[2] for line in head.splitlines() if line.startswith(b"element vertex ")), b"")
    if not count.isdigit() or head + mark != _ply_header(int(count)):
        raise ValueError(f"{path}: not a binary little-endian 3DGS PLY of degree 0 with colours; its "
                         "properties must be x y z red green blue f_dc f_rest_0..44 opacity scale rot")
    dtype = _ply_dtype()
    if len(body) != int(count) * dtype.itemsize:
        raise ValueError(f"{path}: {len(body)} bytes of vertices where {int(count)} need "
                         f"{int(count) * dtype.itemsize}; the file is cut or damaged: copy or make it again")
    vertices = np.frombuffer(body, dtype)

    def read(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([vertices[name] for name in names], -1).astype(np.float32))[None]

    return Gaussians(means=read("x", "y", "z"), sh=read("f_dc_0", "f_dc_1", "f_dc_2")[..., None, :],
                     log_scales=read("scale_0", "scale_1", "scale_2"),
                     quats=read("rot_0", "rot_1", "rot_2", "rot_3"), opacity_logits=read("opacity"))
