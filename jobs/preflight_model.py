"""Whether the weights that a run begins from fit it, whether it may go on from them, and what memory it needs."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from jobs.checkpoint import STATE, check_fit, check_identity
from jobs.made_with import leaves
from jobs.preflight_data import LATER
from jobs.preflight_env import Found
from jobs.preflight_networks import STAGES, Looked, Networks, rigs_seen, with_towers

_TRAINED_BYTES = 16  # in fp32: the weight, its gradient, AdamW's two moments
_ONE = re.compile(r"[0-9a-f]{64}")  # the fingerprint of one rig
_BEGINS_FROM = ("pretrained", "init_from", "checkpoint", "generator.checkpoint", "reconstructor.checkpoint")


def look(schema: str, run: Any, resume: Path | None) -> Looked:
    """Everything that the run reads weights from. Raises nothing that a person can have got wrong."""
    looked = Looked()
    build = STAGES.get(schema)
    if build is None or any(_comes_later(run, key) for key in _BEGINS_FROM):
        return looked
    networks = looked.networks = build(run, resume, looked)
    if networks is None:
        return looked
    if networks.trains and not networks.trained:
        looked.found.append(Found("updates", "error", "no parameter has a gradient", "model",
                                  "nothing would be learned", "unfreeze a part of it"))
    if resume is not None and networks.trains:
        model = leaves(msgspec.to_builtins(getattr(run, "model", {})), "model")
        looked.sure("resume", lambda: check_fit(resume, networks.tensors(), model=model))
        of_data = schema in ("phase1", "phase3")
        looked.sure("resume, training.dataset.path" if of_data else "resume",
                    lambda: _same_identity(schema, run, resume, networks), check="rig")
    return looked


def _comes_later(run: Any, key: str) -> bool:
    """Whether another job is still to make it."""
    for name in key.split("."):
        run = getattr(run, name, None)
    return isinstance(run, str) and LATER in run


# --- what a resume must share -------------------------------------------------------------------------------

def _same_identity(schema: str, run: Any, resume: Path, networks: Networks) -> None:
    """Raises JobError. The weights of frozen diffusion networks are compared by the start alone: it reads them all."""
    try:
        state = json.loads((resume / STATE).read_bytes())
        there = state["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # told as a checkpoint that cannot be read
    check_identity(resume, state, _identity(schema, run, str(there.get("rig")), networks))


def _identity(schema: str, run: Any, rig: str, networks: Networks) -> dict[str, str]:
    if schema in ("phase1", "phase3"):
        rigs = list(rigs_seen(run)) if _ONE.fullmatch(rig) else []
        one = {"rig": rigs[0] if len(rigs) == 1 else f"{len(rigs)} rigs or more"} if rigs else {}
        return one | ({"attention": networks.modules["unet"].attention} if schema == "phase1" else {})
    if schema != "face-voice":
        return {"prompt": run.training.prompt}
    if run.model.freeze != "all":
        return {}
    from jobs.towers import build_face, build_voice, digest_of

    model, seed = with_towers(run.model), run.training.seed
    return {"face tower": digest_of(build_face(model.face, seed).tower),
            "voice tower": digest_of(build_voice(model.voice, seed).tower)}


def needs(networks: Networks) -> tuple[float, float, str]:
    """(MiB that one GPU has to give at least, bytes of one checkpoint, both in words)."""
    trained = sum(parameter.numel() for parameter in networks.trained.values())
    others = {id(one): one for module in (*networks.modules.values(), *networks.frozen) for one in module.parameters()}
    for parameter in networks.trained.values():
        others.pop(id(parameter), None)
    rest = sum(parameter.numel() for parameter in others.values()) * networks.frozen_bytes
    averages = [module for name, module in networks.modules.items() if networks.trains and name not in networks.trains]
    rest += 4 * sum(parameter.numel() for module in averages for parameter in module.parameters())
    total = trained * _TRAINED_BYTES + rest + networks.activations_gb * 1e9
    saved = sum(tensor.numel() * 4 for named in networks.tensors().values() for tensor in named.values())
    words = [f"{trained / 1e6:.4g} M trained weights with gradients and AdamW" if trained else "",
             f"{rest / 1e9:.2g} GB of weights that are not trained" if rest else "",
             f"activations {networks.activations_gb:.2g} GB" if networks.activations_gb else ""]
    return total / 2**20, saved if networks.trains else 0.0, ", ".join(filter(None, words))
