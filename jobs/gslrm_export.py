"""A checkpoint of phase 3 as the public GS-LRM code reads it, training state included.

    python -m jobs.gslrm_export RUN_OR_CHECKPOINT OUT.pt [--take best|last]

OUT.pt holds `model, optimizer, lr_scheduler, fwdbwd_pass_step, param_update_step`; if OUT is a directory the file is
called as theirs are, ckpt_<16 digits>.pt. The other way round is `init_from:` of a run file.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.contract import list_checkpoints
from configs.reconstruct import Reconstructor
from jobs.checkpoint import read_best, read_state
from jobs.gslrm_stage import decays
from jobs.reconstructor import load_reconstructor
from jobs.runtime import JobError, run_job
from jobs.schedule import Plan
from jobs.tensorfile import read_into, read_shapes
from models.gslrm import GSLRM, GSLRMConfig

_CONSTANTS = ("scale_bias", "scale_max", "opacity_bias", "depth_half", "clip_xyz")  # built into the public code
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.gslrm_export", description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT",
                        help="a run directory, or one of its checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT.pt", help="the file, or a directory for it")
    parser.add_argument("--take", choices=("best", "last"), default="best", help="of a run; default: best")
    given = parser.parse_args()
    written, notes = export(given.source, given.out, given.take)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(written)


def export(source: Path, out: Path, take: str = "best") -> tuple[Path, list[str]]:
    """Write it -> the file, and what its reader should know. Raises JobError."""
    path = source if not (source / "checkpoints").is_dir() else chosen(source / "checkpoints", take)
    if not path.is_dir():
        raise JobError(f"there is no checkpoint directory {path}",
                       "name a run, or one of its checkpoints: …/checkpoints/step-NNNNNNNN-aNNN")
    state = read_state(path)
    model = load_reconstructor(Reconstructor(checkpoint=str(path)), torch.device("cpu")).model
    plan, progress = Plan(**_tupled(state["plan"])), state["progress"]
    optimizer, scheduler = training_state(model, path, plan, progress["applied"])
    file = out / f"ckpt_{progress['step']:016d}.pt" if out.is_dir() or out.suffix != ".pt" else out
    _save(file, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "lr_scheduler": scheduler.state_dict(), "fwdbwd_pass_step": progress["step"],
                 "param_update_step": progress["applied"]})
    return file, [f"from {path}", *_warnings(model.config)]


def chosen(checkpoints: Path, take: str) -> Path:
    """The best checkpoint of a run, if one is known, or its last. Raises JobError."""
    best = read_best(checkpoints) if take == "best" else None
    found = [checkpoints / best["checkpoint"]] if best else list_checkpoints(checkpoints)
    if not found:
        raise JobError(f"there is no finished checkpoint in {checkpoints}", "let the run write one first")
    return found[0]


def training_state(model: GSLRM, path: Path, plan: Plan,
                   applied: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer with its moments, decayed weights first, and the schedule after `applied` updates."""
    named = dict(model.named_parameters())
    groups = [{"params": [p for name, p in named.items() if decays(name, p) is decayed],
               "weight_decay": plan.weight_decay if decayed else 0.0} for decayed in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: plan.lr_of(update) / plan.lr)
    for parameter, moments in zip(named.values(), _moments(path, named)):
        optimizer.state[parameter] = moments
    now = plan.lr_of(applied)
    for group in optimizer.param_groups:
        group["lr"] = now
    # stepping to it `applied` times would give the same
    scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = applied, applied + 1, [now, now]
    return optimizer, scheduler


def _moments(path: Path, named: Mapping[str, nn.Parameter]) -> list[dict[str, torch.Tensor]]:
    file = path / "optimizer.safetensors"
    shapes = read_shapes(file)
    found = {f"gslrm.{name}.{key}": torch.empty(shapes[f"gslrm.{name}.{key}"]) for name in named for key in _MOMENTS}
    read_into(file, found)
    return [{key: found[f"gslrm.{name}.{key}"] for key in _MOMENTS} for name in named]


def _warnings(config: GSLRMConfig) -> list[str]:
    """The public code has its constants built in, so with others it draws something else from these weights."""
    public = GSLRMConfig()
    other = [f"{name} {getattr(config, name)} (there {getattr(public, name)})" for name in _CONSTANTS
             if getattr(config, name) != getattr(public, name)]
    sizes = ", ".join(f"{field.name} {getattr(config, field.name)}" for field in fields(config)
                      if field.name not in _CONSTANTS)
    warned = [f"the public code draws other Gaussians from these weights, unless you change there: {', '.join(other)}"]
    return [f"its configuration must say: {sizes}", *(warned if other else [])]


def _tupled(plan: dict[str, Any]) -> dict[str, Any]:
    return plan | {"betas": tuple(plan["betas"])}


def _save(file: Path, content: dict[str, Any]) -> None:
    """Complete or not at all."""
    aside = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, aside)
        os.replace(aside, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        raise JobError(f"cannot write {file}: {error}", "choose another place, or free some disk space") from None
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    run_job(main, 0)
