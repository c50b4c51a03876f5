"""Is a generated sample fit to train on? Alpha, views that differ, silhouettes that belong to one object."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from configs.phase2 import Quality
from jobs.data.inspection import HULL_PX
from models import hull
from models.cameras import Rig

ALPHA, ALIKE, SILHOUETTES, BROKEN = "alpha", "views alike", "silhouettes", "not finite"


@dataclass(frozen=True)
class Verdict:
    """The numbers of one sample, and why it is rejected: (kind, words); nothing: it is good."""

    coverage: tuple[float, ...]  # of each picture, by the object
    difference: float  # least RMSE between two views
    explained: tuple[float, ...]  # of each silhouette, by the others; empty where a view shows no object
    reasons: tuple[tuple[str, str], ...]


def judge(views: Tensor, rgba: Tensor, rig: Rig, config: Quality) -> Verdict:
    """Of RGB [V, 3, S, S] in 0..1 as generated, and uint8 [V, S, S, 4] as it is stored, in the order of `rig`."""
    if not bool(views.isfinite().all()):
        return Verdict((), 0.0, (), ((BROKEN, "the generator made values that are not finite"),))
    alpha = rgba[..., 3].float() / 255
    coverage = (alpha > 0.5).float().mean((1, 2)).tolist()
    distances = torch.pdist(views.flatten(1)) / views[0].numel() ** 0.5
    reasons = _alpha_reasons(rig, coverage, config)
    if (least := distances.min().item()) < config.min_difference:
        reasons.append((ALIKE, f"two views differ by {least:.4f} only (RMSE), the least is {config.min_difference:g}"))
    explained: list[float] = []
    if min(coverage) > 0:
        small = rig.resized(HULL_PX, HULL_PX)
        shrunk = adaptive_avg_pool2d(alpha[:, None], HULL_PX)[:, 0]
        explained = hull.explained(shrunk, small.c2w.to(alpha.device), small.fxfycxcy.to(alpha.device)).tolist()
        reasons += _hull_reasons(rig, explained, config)
    return Verdict(tuple(coverage), least, tuple(explained), tuple(reasons))


def _alpha_reasons(rig: Rig, coverage: list[float], config: Quality) -> list[tuple[str, str]]:
    least, most = config.min_coverage, config.max_coverage
    return [(ALPHA, f"view {name}: the object covers {share:.2%} of the picture, allowed are {least:.2%} to {most:.2%}")
            for name, share in zip(rig.names, coverage) if share == 0 or not least <= share <= most]


def _hull_reasons(rig: Rig, explained: list[float], config: Quality) -> list[tuple[str, str]]:
    worst = min(range(len(explained)), key=explained.__getitem__)
    if explained[worst] >= config.min_explained:
        return []
    return [(SILHOUETTES, f"view {rig.names[worst]}: only {explained[worst]:.3f} of its silhouette agrees with the "
             f"other views, the least is {config.min_explained:g}")]
