"""Tiny checkpoints of phase 1 made on the spot, untrained, and phase 2 on them; imported once for all forked ranks."""
from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

import jobs.reconstructor  # noqa: F401
import jobs.synthesis  # noqa: F401
from cluster.contract import MANIFEST, sha256_file
from configs.phase1 import Phase1Run
from jobs import phase2
from jobs.mv_components import WEIGHTS_FILE, load_components, write_folder
from jobs.synthetic import Store
from jobs.tensorfile import write_tensors
from models.cameras import Rig, mv6
from models.gslrm import GSLRM, GSLRMConfig
from models.mvdiffusion import EMA, UNET
from tests.jobs.small_phase1 import config_of

OPEN_GATE = {"min_coverage": 0, "max_coverage": 1, "min_difference": 0, "min_explained": 0, "max_rejected": 1}


def make_generator(folder: Path, rig: Rig | None = None, reference: Any = 0, seed: int = 0) -> Path:
    """A checkpoint folder as phase 1 leaves it, at 16 px; its averaged weights are others than its last ones."""
    rig = rig or mv6(16)
    config = msgspec.convert({**config_of(folder), "pretrained": f"random:{seed}"}, Phase1Run)
    components = load_components(config, None, rig)
    about = {"version": 1, "rig": rig.fingerprint, "image_size": 16, "background": [1, 1, 1],
             "reference_view_idx": reference}
    write_folder(folder, components, folder, about, rig)
    weights = {name: tensor.contiguous() for name, tensor in components.unet.state_dict().items()}
    torch.manual_seed(seed)
    save_file(weights, folder / UNET / f"{WEIGHTS_FILE}.safetensors")
    save_file({name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in weights.items()},
              folder / EMA / f"{WEIGHTS_FILE}.safetensors")
    sign(folder, step=8)
    return folder


def make_reconstructor(folder: Path, rig: str, size: int = 16, about: bool = True) -> Path:
    """A checkpoint folder of phase 3, untrained."""
    sizes = {"d": 32, "d_head": 16, "n_layer": 1, "patch_size": 4, "image_size": size, "scale_bias": -2.5,
             "scale_max": -1.8}
    torch.manual_seed(1)
    model = GSLRM(GSLRMConfig(**{name: value for name, value in sizes.items() if name != "image_size"}))  # type: ignore
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors",
                  {f"gslrm.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()})
    (folder / "state.json").write_text(json.dumps({"identity": {"rig": rig, "rig in words": "some rig"}}))
    if about:
        (folder / "gslrm.json").write_text(json.dumps({"model": sizes}))
    sign(folder, step=8)
    return folder


def sign(folder: Path, step: int) -> None:
    """The manifest of a checkpoint."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_file(path)}
             for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {"version": 1, "job": "phase1", "attempt": 0, "step": step, "resumed_from": None, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def phase2_of(data: Path, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """A run of 2 sampling steps over the toy mice in `data`: seconds."""
    return {"generator": {"checkpoint": str(checkpoint), "steps": 2, "guidance": 1.5, "precision": "fp32",
                          **changes.pop("generator", {})},
            "sources": {"path": str(data / "data_train.txt"), **changes.pop("sources", {})},
            "batch": 2, "val_share": 0.3, "quality": {**OPEN_GATE, **changes.pop("quality", {})}, **changes}


def main() -> None:
    """Phase 2; FAULT=KILL:rank:sample:place or TERM:…: the signal at that sample of this rank, before it is written,
    in the middle of it, or just after. TIMER:rank:seconds: SIGKILL then, wherever it is."""
    kind, *where = os.environ.get("FAULT", "NONE").split(":")
    if kind == "TIMER" and int(where[0]) == int(os.environ.get("RANK", 0)):
        timer = threading.Timer(float(where[1]), os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    if kind in ("KILL", "TERM") and int(where[0]) == int(os.environ.get("RANK", 0)):
        _strike(getattr(signal, f"SIG{kind}"), int(where[1]), where[2])
    phase2.main()


def _strike(number: int, which: int, place: str) -> None:
    put, count = Store.put, 0

    def struck(self: Store, *given: Any) -> Any:
        nonlocal count
        count += 1
        if count == which and place == "middle":
            os.replace = os.rename = lambda *_: os.kill(os.getpid(), number)  # type: ignore[assignment]
        if count == which and place == "before":
            os.kill(os.getpid(), number)
        kept = put(self, *given)
        if count == which and place == "after":
            os.kill(os.getpid(), number)
        return kept

    Store.put = struck  # type: ignore[method-assign]
