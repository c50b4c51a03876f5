"""Sample directories are written here and nowhere else: cameras with the record of their rig, and whole data sets
made from another one.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models import rigs
from models.cameras import Rig, invert_rigid


def write_cameras(path: Path, name: str, rig: Rig, images: list[str], keep: dict[str, Any] | None = None) -> None:
    """opencv_cameras.json of a sample: the cameras of `rig` with its record, and `images` relative to `path`.

    `keep`: a file of the same views whose other keys are kept.
    """
    keep = keep or {}
    before = keep.get("frames") or [{}] * len(images)
    w2c = invert_rigid(rig.c2w.double()).tolist()
    frames = [{**old, "w": rig.width, "h": rig.height, "fx": k[0], "fy": k[1], "cx": k[2], "cy": k[3], "w2c": pose,
               "file_path": image}
              for old, pose, k, image in zip(before, w2c, rig.fxfycxcy.tolist(), images)]
    path.write_text(json.dumps({"id": name, **keep, "rig": rigs.to_record(rig), "frames": frames}, indent=1))
