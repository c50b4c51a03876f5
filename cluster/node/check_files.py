"""Inputs of a job looked at from outside: lists of samples, headers of weights, which rig they belong to.

Only names, sizes and headers are read, so a checkpoint of many GB costs as much as a small one.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cluster.contract import MANIFEST, BadCheckpoint, read_manifest

LOOKED_AT = 16  # samples of a list: the first, the last, and others between them
_LIST_KEYS = ("path", "mean_of")
_CAMERAS = "opencv_cameras.json"
_PROMPTS = "prompt_embeds.pt"
_HEADER_MAX = 100_000_000  # bytes, the format's own limit
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")


class Unsound(Exception):
    """What is wrong with a file, for a person."""


# --- lists --------------------------------------------------------------------------------------------------

def lists_of(key: str, path: Path) -> list[Path]:
    """The lists of samples that an input is: a list itself, or a data set's folder."""
    if path.is_dir():
        return sorted(path.glob("data_*.txt"))
    return [path] if path.suffix == ".txt" and key.rpartition(".")[2] in _LIST_KEYS else []


def look_at_list(path: Path) -> tuple[int, list[str], int]:
    """(how many it names, those that are not there, how many were looked for). Raises Unsound."""
    names = _lines(path)
    looked = spread(names)
    return len(names), [name for name in looked if not (place(path, name) / _CAMERAS).is_file()], len(looked)


def place(path: Path, name: str) -> Path:
    """The folder of a sample: absolute, or relative to its list."""
    return path.parent / name


def spread(items: Sequence[T], count: int = LOOKED_AT) -> list[T]:
    """The first, the last, and others between them at equal distances."""
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def _lines(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise Unsound(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Unsound(f"{path} is not a text file") from None
    if not names:
        raise Unsound(f"{path} names no sample")
    return names


# --- weights ------------------------------------------------------------------------------------------------

def check_weights(path: Path) -> None:
    """Of one of our checkpoints every size, of every safetensors file its header. Raises Unsound."""
    if path.is_file():
        if path.suffix == ".safetensors":
            tensors(path)
        return
    if (path / MANIFEST).exists() or re.fullmatch(r"step-\d+-a\d+", path.name):
        _check_sizes(path)
    for file in weight_files(path):
        tensors(file)


def weight_files(path: Path) -> Iterator[Path]:
    """The safetensors files of a checkpoint or a folder in the format of diffusers or transformers."""
    if path.is_file():
        yield from [path] if path.suffix == ".safetensors" else []
        return
    for folder in (path, *sorted(one for one in path.iterdir() if one.is_dir())):
        yield from sorted(folder.glob("*.safetensors"))


def tensors(path: Path) -> dict[str, list[int]]:
    """Name -> shape of what a safetensors file holds. Raises Unsound: it is none, or cut off."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _HEADER_MAX:
                raise ValueError("no header")
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            end = max((one["data_offsets"][1] for one in entries.values()), default=0)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise Unsound(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unsound(f"{path} is no safetensors file") from None
    if size < 8 + length + end:
        raise Unsound(f"{path} is cut off: {size} of {8 + length + end} bytes")
    return {name: one["shape"] for name, one in entries.items()}


def _check_sizes(path: Path) -> None:
    try:
        manifest = read_manifest(path)
    except BadCheckpoint as error:
        raise Unsound(str(error)) from None
    for name, expected in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise Unsound(f"{path / name}: {error.strerror}") from None
        if size != expected["size"]:
            raise Unsound(f"{path / name} has {size} bytes, its manifest says {expected['size']}")


# --- what they belong to ------------------------------------------------------------------------------------

def step_of(path: Path) -> int | None:
    """The step of one of our checkpoints."""
    said = _json(path / "state.json").get("progress")
    step = said.get("step") if isinstance(said, dict) else None
    return step if isinstance(step, int) else None


def rig_of(path: Path) -> str | None:
    """The fingerprint of the one rig that a checkpoint or a data set says it belongs to; None: it does not say."""
    said = _json(path / "mvdiffusion.json").get("rig") or _mapping(_json(path / "state.json"), "identity").get("rig")
    if said is None and (sample := _first_sample(path)):
        said = _mapping(_json(sample / _CAMERAS), "rig").get("fingerprint")
    return said if isinstance(said, str) and _FINGERPRINT.fullmatch(said) else None


def trained_views(path: Path) -> int | None:
    """How many views a generator makes."""
    found = _json(path / "mvdiffusion.json").get("num_views")
    return found if isinstance(found, int) else None


def views_of(path: Path) -> int | None:
    """How many views the first sample of a data set has."""
    sample = _first_sample(path)
    frames = _json(sample / _CAMERAS).get("frames") if sample else None
    return len(frames) if isinstance(frames, list) and frames else None


def prompts_shape(path: Path) -> list[int] | None:
    """[views, tokens, width] of the prompt embeddings in a torch file, or in the folder of a checkpoint; None: nobody
    can say. Only the description of the tensor is read, and nothing in it is called."""
    import pickle
    import zipfile

    class Shape(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:  # noqa: ARG002
            return (lambda storage, start, size, *_: list(size)) if name.startswith("_rebuild_tensor") else dict

        def persistent_load(self, pid: Any) -> None:
            return None

    try:
        with zipfile.ZipFile(path / _PROMPTS if path.is_dir() else path) as file:
            [name] = [one for one in file.namelist() if one.endswith("/data.pkl")]
            with file.open(name) as stream:
                found = Shape(stream).load()
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, TypeError, IndexError, EOFError,
            AttributeError):
        return None
    return found if isinstance(found, list) and len(found) == 3 else None


def unet_takes(path: Path) -> tuple[int, int] | None:
    """(views, width of a prompt) of the UNet in the folder of a generator; a public one does not say that it makes 6
    views."""
    for name in ("unet_ema", "unet"):
        said = _json(path / name / "config.json")
        width, views = said.get("cross_attention_dim"), said.get("num_views", 6)
        if isinstance(width, int) and isinstance(views, int):
            return views, width
    return None


def _first_sample(path: Path) -> Path | None:
    lists = lists_of("path", path)
    try:
        return place(lists[0], _lines(lists[0])[0]) if lists else None
    except Unsound:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    found = raw.get(key)
    return found if isinstance(found, dict) else {}
