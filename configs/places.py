"""Where configuration files are looked for. Standard library only: without a cluster.yaml none is read."""
from __future__ import annotations

import os
from pathlib import Path


def find_cluster(start: Path) -> Path | None:
    """$LAUNCH_CLUSTER, else configs/cluster.yaml upward from `start`, else the one in ~/.config/launch."""
    if named := os.environ.get("LAUNCH_CLUSTER"):
        return Path(named).expanduser()
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    places = [above / "configs" / "cluster.yaml" for above in upward(start)]
    return next((place for place in [*places, home / "launch" / "cluster.yaml"] if place.is_file()), None)


def upward(start: Path) -> list[Path]:
    start = start.absolute()
    return [start, *start.parents]
