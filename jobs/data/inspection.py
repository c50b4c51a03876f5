"""One sample, looked at closely: files, pictures, cameras, and whether its silhouettes agree with its cameras."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jobs.data.lists import Entry, source_of
from jobs.data.multiview import read_rgba
from jobs.data.rigs import rig_of
from jobs.data.samples import BadSample, Sample, read_sample
from models import hull, rigs
from models.cameras import RADIUS, Rig, rays

HULL_PX = 128  # the size at which silhouettes are compared
_DISTANCE_OFF = 0.1  # share of the radius by which the median distance may differ from it
_CENTRE_OFF = 0.25  # share of the median distance by which object and look-at may miss the origin
_FEW_PX = 32  # of HULL_PX squared: a silhouette this small says nothing


@dataclass(frozen=True)
class Options:
    threshold: float = hull.THRESHOLD
    radius: float = RADIUS
    rig: Rig | None = None  # the one that is expected
    source: str | None = None  # pattern of the source frame in a name


@dataclass(frozen=True)
class Finding:
    error: bool
    what: str
    remedy: str


@dataclass(frozen=True)
class Inspection:
    """What was found; the numbers are empty for a sample that cannot be read."""

    name: str
    source: str
    findings: tuple[Finding, ...]
    views: tuple[str, ...] = ()
    rig: str = ""  # fingerprint
    rig_words: str = ""
    size: int = 0  # px
    distances: tuple[float, ...] = ()  # of the cameras from the origin
    looked_at: float | None = None  # distance of the point the optical axes meet at from the origin
    object_at: float | None = None  # distance of the point the silhouettes' centres meet at from the origin
    cut: tuple[str, ...] = ()  # views whose frame cuts the object
    explained: tuple[float, ...] = ()  # of each view's silhouette, the fraction that agrees

    @property
    def good(self) -> bool:
        return not any(finding.error for finding in self.findings)

    @property
    def least(self) -> float:
        """The smallest explained fraction; 0 where there is none, so that unreadable samples come first."""
        return min(self.explained, default=0.0)


def inspect(options: Options, entry: Entry) -> Inspection:
    """Never raises BadSample: a defect is what is looked for. Raises JobError for a wrong --source."""
    source = source_of(entry, options.source)
    try:
        sample = read_sample(entry.name, entry.directory)
        return _look(sample, source, options)
    except BadSample as bad:
        return Inspection(entry.name, source, (Finding(True, f"{bad.file}: {bad.defect}", bad.remedy),))


def _look(sample: Sample, source: str, options: Options) -> Inspection:
    rig = rig_of(sample)
    alpha, same = read_alpha(sample)
    findings = [*_picture_findings(rig, alpha, same), *_rig_findings(rig, options)]
    looked_at, object_at = _looked_at(rig), _distance(object_centre(rig, alpha))
    findings += _centre_findings(rig, looked_at, object_at)
    small = rig.resized(HULL_PX, HULL_PX)
    explained = hull.explained(alpha, small.c2w, small.fxfycxcy).tolist() if len(alpha) > 1 else []
    findings += _hull_findings(rig, explained, options.threshold)
    return Inspection(
        sample.name, source, tuple(findings), rig.names, rig.fingerprint, rigs.describe(rig), rig.width,
        tuple(rigs.distances(rig.c2w).tolist()), looked_at, object_at,
        tuple(name for name, cut in zip(rig.names, hull.reaches_edge(alpha).tolist()) if cut), tuple(explained))


def read_alpha(sample: Sample) -> tuple[Tensor, list[tuple[int, int]]]:
    """The silhouettes [V, HULL_PX, HULL_PX] in 0..1, and the pairs of views that are one picture. Raises
    BadSample."""
    seen: dict[str, int] = {}
    same, alpha = [], []
    for view, frame in enumerate(sample.frames):
        rgba = read_rgba(sample.name, frame.image)
        first = seen.setdefault(hashlib.sha256(rgba.tobytes()).hexdigest(), view)
        if first != view:
            same.append((first, view))
        picture = Image.fromarray(np.ascontiguousarray(rgba[..., 3]))
        alpha.append(np.asarray(picture.resize((HULL_PX, HULL_PX), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(alpha)).float() / 255, same


def object_centre(rig: Rig, alpha: Tensor) -> Tensor | None:
    """The world point [3] that the lines through the silhouettes' centres of mass meet at; None: nowhere."""
    size = alpha.shape[-1]
    small = rig.resized(size, size)
    origins, directions = rays(small.c2w.double(), small.fxfycxcy.double(), size, size)
    middle = (directions * alpha[:, None]).flatten(2).sum(2)
    try:
        return rigs.meeting_point(origins[..., 0, 0], middle / middle.norm(dim=1, keepdim=True))
    except ValueError:
        return None


def _looked_at(rig: Rig) -> float | None:
    try:
        return _distance(rigs.looked_at(rig.c2w))
    except ValueError:
        return None


def _distance(point: Tensor | None) -> float | None:
    return None if point is None else point.norm().item()


def _picture_findings(rig: Rig, alpha: Tensor, same: list[tuple[int, int]]) -> list[Finding]:
    found = [Finding(True, f"views {rig.names[a]} and {rig.names[b]} are the same picture",
                     "restore the picture that was overwritten") for a, b in same]
    for name, covered in zip(rig.names, (alpha > 0.5).flatten(1).sum(1).tolist()):
        if covered == HULL_PX**2:
            found.append(Finding(True, f"view {name}: alpha is opaque everywhere: there is no mask",
                                 "segment the object and store its mask as alpha"))
        elif covered < _FEW_PX:
            found.append(Finding(False, f"view {name}: the object covers {covered / HULL_PX**2:.2%} of the picture",
                                 "crop the data set with `center`, or check the segmentation"))
    return found


def _rig_findings(rig: Rig, options: Options) -> list[Finding]:
    found = []
    if options.rig is not None and rig.fingerprint != options.rig.fingerprint:
        found.append(Finding(True, rigs.mismatch("--rig", options.rig, "the sample", rig),
                             "use the data set of that rig, or another --rig"))
    middle = rigs.distances(rig.c2w).median().item()
    if abs(middle / options.radius - 1) > _DISTANCE_OFF:
        found.append(Finding(True, f"the median camera distance is {middle:.4g}, not {options.radius:g}",
                             "bring the whole scene there with `normalize` (never the cameras alone)"))
    return found


def _centre_findings(rig: Rig, looked_at: float | None, object_at: float | None) -> list[Finding]:
    reach = _CENTRE_OFF * rigs.distances(rig.c2w).median().item()
    remedy = "put the object at the origin: `normalize --centre object`"
    found = []
    if object_at is not None and object_at > reach:
        found.append(Finding(False, f"the object is {object_at:.2f} from the world origin", remedy))
    if looked_at is not None and looked_at > reach:
        found.append(Finding(False, f"the cameras look at a point {looked_at:.2f} from the world origin", remedy))
    return found


def _hull_findings(rig: Rig, explained: list[float], threshold: float) -> list[Finding]:
    if not explained or min(explained) >= threshold:
        return []
    worst = min(range(len(explained)), key=explained.__getitem__)
    said = (f"view {rig.names[worst]}: only {explained[worst]:.3f} of its silhouette agrees with the other views "
            f"(threshold {threshold:g})")
    distances, focal = rigs.distances(rig.c2w), rig.fxfycxcy[:, 0]
    if distances.max() / distances.min() < 1.001 and focal.max() / focal.min() > 1.01:
        return [Finding(True, f"{said}; every camera is {distances[0].item():.3g} away but each has a focal length of "
                        "its own: they were probably moved there alone",
                        "go back to the calibrated cameras and use `normalize`, which keeps both together")]
    return [Finding(True, said, "cameras and pictures do not belong together: check the order of the views, the "
                    "calibration, and that crops moved cx, cy")]
