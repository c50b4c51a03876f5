"""What surrounded jobs: their environments and their inputs, as names and values that can be laid side by side."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Facts = dict[str, str]

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
HIDDEN = "(hidden)"
_PLAIN = {"python": "Python", "torch": "torch", "cuda": "CUDA", "nccl": "NCCL", "driver": "driver",
          "prefix": "environment", "hostname": "host"}
_TORCH = ("torch",)  # has a row of its own
# Packages that change what a training does: named before all others.
_TELLING = ("numpy", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "gsplat", "xformers",
            "flash-attn", "bitsandbytes", "torchvision", "torchaudio", "pillow", "soundfile")


def environment(recorded: Mapping[str, Any] | None, spec: Mapping[str, Any]) -> Facts:
    """What the newest attempt recorded, and the variables that launch set; those that may be secrets without a value.
    """
    env = recorded or {}
    facts = {title: str(env[key]) for key, title in _PLAIN.items() if env.get(key)}
    if env:
        facts["GPUs"] = _cards(env.get("gpus") or (), env.get("cards") or ())
    facts |= {f"package {name}": str(version) for name, version in _ordered(env.get("packages") or {})}
    return facts | {f"${name}": HIDDEN if _SECRET.search(name) else str(value)
                    for name, value in sorted((spec.get("env") or {}).items())}


def _cards(uuids: Sequence[str], names: Sequence[str]) -> str:
    """`8 x NVIDIA H100`; an attempt of an older launch tells how many, not which."""
    kinds = {name: names.count(name) for name in names}
    return ", ".join(f"{count} x {name}" for name, count in kinds.items()) or (str(len(uuids)) if uuids else "none")


def _ordered(packages: Mapping[str, Any]) -> list[tuple[str, Any]]:
    def rank(name: str) -> tuple[int, str]:
        plain = name.lower().replace("_", "-")
        return _TELLING.index(plain) if plain in _TELLING else len(_TELLING), plain

    return [(name, packages[name]) for name in sorted(packages, key=rank) if name.lower() not in _TORCH]


def inputs(taken: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any], began_from: str | None) -> Facts:
    """Name -> fingerprint or words: what other jobs gave, what a training said of its data, and its beginning."""
    facts = {str(one["reference"]): str(one["fingerprint"]) for one in taken}
    facts |= {name: value if isinstance(value, str) else str(value) for name, value in provenance.items()
              if value not in (None, "")}
    return facts | ({"resumed from": began_from} if began_from else {})


def differing(facts: Sequence[Facts]) -> dict[str, tuple[str | None, ...]]:
    """The names whose values are not the same in all of which anything is known; None: it has none."""
    known = [one for one in facts if one]
    names = {name: None for one in known for name in one}
    return {name: tuple(one.get(name) for one in facts) for name in names
            if len({one.get(name) for one in known}) > 1}


def alike(facts: Sequence[Facts]) -> list[str]:
    """The names whose values all have, and the same."""
    first, *others = facts or [{}]
    return [name for name, value in first.items() if all(one.get(name) == value for one in others)]


def command(argvs: Sequence[Sequence[str]]) -> tuple[str, ...] | None:
    """The words in which command lines differ, with the option before them; None: they are the same."""
    if len({tuple(argv) for argv in argvs}) < 2:
        return None
    shortest = min(map(len, argvs))
    front = next((i for i in range(shortest) if len({argv[i] for argv in argvs}) > 1), shortest)
    back = next((i for i in range(shortest - front) if len({argv[-1 - i] for argv in argvs}) > 1), shortest - front)
    if front and argvs[0][front - 1].startswith("-"):
        front -= 1
    return tuple(" ".join(argv[front:len(argv) - back]) or "-" for argv in argvs)
