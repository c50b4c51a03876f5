"""What is done with whole rigs: named ones, their record on disk, conversions, and bringing a lab to |c| = 2.7.

A rig as one object and the geometry of its cameras are in models.cameras.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.cameras import RADIUS, Rig, mv6, orbit32

STANDARD = {"mv6": mv6, "orbit32": orbit32}
PROMPT = "a rendering image of 3D models, {view} view, color map."  # what the public checkpoints were trained with
SAME = 2e-3  # of `nearest_views`: cameras closer than this are one camera


def prompts(rig: Rig, template: str = PROMPT) -> list[str]:
    """The prompt of each view, from its name. Raises ValueError for a template without {view}."""
    if "{view}" not in template:
        raise ValueError(f"the prompt {template!r} has no {{view}}: all views would get the same one")
    return [template.replace("{view}", name) for name in rig.names]


def to_record(rig: Rig) -> dict[str, Any]:
    """The rig for a JSON file; `from_record` gives it back exactly, with the same fingerprint."""
    return {"fingerprint": rig.fingerprint, "views": list(rig.names), "width": rig.width, "height": rig.height,
            "c2w": rig.c2w[:, :3].tolist(), "fxfycxcy": rig.fxfycxcy.tolist()}


def from_record(record: Mapping[str, Any]) -> Rig:
    """Raises ValueError when the record is incomplete or is not what its fingerprint says."""
    try:
        upper = torch.tensor(record["c2w"], dtype=torch.float32)
        last = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(len(upper), 1, 4)
        rig = Rig(tuple(map(str, record["views"])), torch.cat([upper, last], 1),
                  torch.tensor(record["fxfycxcy"], dtype=torch.float32), int(record["width"]), int(record["height"]))
        said = record["fingerprint"]
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"a rig's record is incomplete or malformed: {error}") from None
    if said != rig.fingerprint:
        raise ValueError(f"a rig's record says {said} and holds the cameras of {rig.fingerprint}: it was edited")
    return rig


def standard_name(rig: Rig) -> str:
    """`mv6`, `orbit32`, or an empty word."""
    for name, make in STANDARD.items():
        standard = make(rig.width)
        if standard.names == rig.names and not standard.difference(rig):
            return name
    return ""


def describe(rig: Rig) -> str:
    """One line for people; the same for rigs of the same fingerprint."""
    centres = torch.round(rig.c2w[:, :3, 3].double(), decimals=3)
    distances = centres.norm(dim=1)
    elevations = torch.rad2deg(torch.asin((centres[:, 2] / distances.clamp(min=1e-9)).clamp(-1, 1)))
    shown = rig.names if len(rig.names) <= 8 else (*rig.names[:2], "…", rig.names[-1])
    name = f"{standard}: " if (standard := standard_name(rig)) else ""
    return (f"{name}{len(rig.names)} views ({', '.join(shown)}), distance {_span(distances, 2)}, "
            f"elevation {_span(elevations, 0)} deg")


def _span(values: Tensor, digits: int) -> str:
    low, high = (f"{round(value.item(), digits) + 0.0:.{digits}f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"  # + 0.0 above: no "-0"


def mismatch(here: str, ours: Rig, there: str, theirs: Rig) -> str:
    """Which side has what, and what tells them apart: "the checkpoint has …; the data has …; …"."""
    said = [f"{here} has {describe(ours)} ({ours.fingerprint[:12]})",
            f"{there} has {describe(theirs)} ({theirs.fingerprint[:12]})"]
    order = matching_views(ours, theirs)
    if len(ours.names) == len(theirs.names) and None not in order and order != sorted(order):  # type: ignore[type-var]
        said.append(f"the same cameras in another order: {[theirs.names[view] for view in order if view is not None]}")
    elif ours.names == theirs.names:
        said.append(ours.difference(theirs) or "their cameras differ slightly")
    return "; ".join(said)


def nearest_views(rig: Rig, other: Rig) -> tuple[Tensor, Tensor]:
    """For each view of `rig` the view of `other` whose camera is nearest, [V], and how far it is, [V]: the
    Frobenius norm of the difference of c2w (place in world units and direction together)."""
    distances = (rig.c2w[:, None] - other.c2w[None]).flatten(2).norm(dim=2)
    nearest = distances.min(1)
    return nearest.indices, nearest.values


def matching_views(rig: Rig, other: Rig) -> list[int | None]:
    """Which views of `other` are those of `rig`: for each view of `rig` the index of the same camera, or None.

    Only where a camera stands and looks counts; a picture of another focal length is cropped or resized.
    """
    indices, distances = nearest_views(rig, other)
    return [index if distance <= SAME else None for index, distance in zip(indices.tolist(), distances.tolist())]


def select(rig: Rig, views: list[int]) -> Rig:
    """The rig of some of its views, in the given order."""
    return Rig(tuple(rig.names[view] for view in views), rig.c2w[views], rig.fxfycxcy[views], rig.width, rig.height)


def distances(c2w: Tensor) -> Tensor:
    """[V] distances of the cameras from the origin."""
    return c2w[:, :3, 3].norm(dim=1)


def meeting_point(origins: Tensor, directions: Tensor) -> Tensor:
    """The point [3] nearest to lines through `origins` [N, 3] along unit `directions` [N, 3], by least squares.

    Raises ValueError when the lines are parallel.
    """
    across = torch.eye(3, dtype=origins.dtype) - directions[:, :, None] * directions[:, None]  # [N, 3, 3]
    system = across.sum(0)
    if len(origins) < 2 or torch.linalg.cond(system) > 1e6:
        raise ValueError("the lines are parallel: they meet nowhere")
    return torch.linalg.solve(system, (across @ origins[:, :, None]).sum(0))[:, 0]


def looked_at(c2w: Tensor) -> Tensor:
    """The world point [3] that the optical axes of c2w [V, 4, 4] meet at. Raises ValueError when parallel."""
    return meeting_point(c2w[:, :3, 3].double(), c2w[:, :3, 2].double())


def translated(rig: Rig, origin: Tensor) -> Rig:
    """The same rig in a world whose origin is at `origin` [3]. Exact: no picture changes."""
    c2w = rig.c2w.double().clone()
    c2w[:, :3, 3] -= origin.double()
    return replace(rig, c2w=c2w.float())


def scaled(rig: Rig, factor: float) -> Rig:
    """The whole scene scaled uniformly, object and cameras. Exact: intrinsics and pictures stay."""
    c2w = rig.c2w.double().clone()
    c2w[:, :3, 3] *= factor
    return replace(rig, c2w=c2w.float())


def at_radius(rig: Rig, radius: float = RADIUS) -> Rig:
    """Virtual cameras: each moved to |c| = radius along its line to the origin and its focal length changed by
    as much, so that the pictures stay. Exact at the origin's depth, .3 px (median, 512 px) over a mouse.

    Moving a camera without its focal length puts every picture off by pixels (7.8 in the lab rig), which is
    why nothing here does.
    """
    factor = radius / distances(rig.c2w).double()
    c2w, fxfycxcy = rig.c2w.double().clone(), rig.fxfycxcy.double().clone()
    c2w[:, :3, 3] *= factor[:, None]
    fxfycxcy[:, :2] *= factor[:, None]
    return replace(rig, c2w=c2w.float(), fxfycxcy=fxfycxcy.float())
