"""The rig of a sample, the rigs of a data set, and whether two data sets share one."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable

from jobs.data.samples import Sample, rig_of_frames
from jobs.runtime import JobError
from models import rigs
from models.cameras import Rig


def rig_of(sample: Sample) -> Rig:
    """The rig of a sample: the one it carries, or a standard one (mv6, orbit32) that its cameras are those of,
    so that its fingerprint is the same in every phase; else its cameras under the names view_00, view_01 …"""
    size = sample.frames[0].size
    if sample.rig is not None:
        return sample.rig.resized(size, size)
    for make in rigs.STANDARD.values():
        standard = make(size)
        if len(standard.names) == len(sample.frames):
            if not standard.difference(rig_of_frames(sample, standard.names)):
                return standard
    return rig_of_frames(sample, tuple(f"view_{index:02d}" for index in range(len(sample.frames))))


def rigs_of(samples: Iterable[Sample]) -> dict[str, Rig]:
    """The different rigs of a data set by fingerprint; one is the usual number."""
    seen: dict[tuple, Rig] = {}
    for sample in samples:
        cameras = tuple((frame.w2c, tuple(value / frame.size for value in frame.fxfycxcy)) for frame in sample.frames)
        key = (cameras, sample.rig.names if sample.rig else ())
        if key not in seen:
            seen[key] = rig_of(sample)
    return {rig.fingerprint: rig for rig in seen.values()}


def rigs_digest(fingerprints: Iterable[str]) -> str:
    """One fingerprint for several rigs."""
    return hashlib.sha256("\n".join(sorted(fingerprints)).encode()).hexdigest()


def rig_identity(train: list[Sample], val: list[Sample]) -> dict[str, str]:
    """What a checkpoint trained on these samples carries of their rig, and a resume must share: in words and as
    fingerprint. Validation must use no other rig; where every training sample has its own (cropped one by
    one), it may have its own as well.

    Raises JobError that says which side has what.
    """
    found, of_val = rigs_of(train), rigs_of(val)
    first = next(iter(found.values()))
    if len(found) == 1:
        for rig in of_val.values():
            if rig.fingerprint != first.fingerprint:
                said = rigs.mismatch("the training data", first, "the validation data", rig)
                raise JobError(f"the validation samples were taken with another rig than the training samples: {said}",
                               "cameras, view order and views must be the same in both lists")
        return {"rig in words": rigs.describe(first), "rig": first.fingerprint}
    if odd := [rig for rig in of_val.values() if rig.names not in {other.names for other in found.values()}]:
        raise JobError(f"the validation samples have other views: {', '.join(odd[0].names)}; the training samples "
                       f"have {', '.join(first.names)}", "views and their order must be the same in both lists")
    return {"rig in words": f"{len(found)} rigs, one of them {rigs.describe(first)}",
            "rig": f"{len(found)} rigs {rigs_digest(found)}"}
