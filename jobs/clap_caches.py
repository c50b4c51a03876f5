"""Where the model libraries may write, and whether they may ask a hub. They look once, at import: this imports none."""
from __future__ import annotations

import os
from pathlib import Path

HUB = "hub:"  # hub:OWNER/NAME in place of a model's folder: it is downloaded


def use_caches(directory: Path, offline: bool) -> None:
    """Before the model libraries are imported: where each of them may write, and that none asks a hub."""
    for name, below in (("HF_HOME", "hf"), ("HF_HUB_CACHE", "hf/hub"), ("HF_XET_CACHE", "hf/xet"),
                        ("TORCH_HOME", "torch"), ("XDG_CACHE_HOME", "xdg")):
        os.environ[name] = str(directory / below)
    os.environ["HF_HUB_OFFLINE"] = "1" if offline else "0"
