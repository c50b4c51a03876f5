"""Reading files of network weights that a person points at.

Under `with torch.device("meta")` the same functions read names, shapes and types alone, so that whether files fit a
network is known in a moment, by the rules of their loading.
"""
from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

# what torch.load was seen to raise for files that are cut, damaged or something else altogether
_UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, BadZipFile, struct.error, ValueError,
               LookupError, AttributeError, TypeError, AssertionError)

_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin",
          "pytorch_model.bin")  # of a folder of diffusers or transformers
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}
_SHOWN = 5  # names in a message


class WeightsError(ValueError):
    """A file of weights that is absent, unreadable or not what the network needs; the message names it."""


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The named tensors of a torch file: a state dict, or a checkpoint with one as `model` or `state_dict`.

    A `module.` prefix is stripped. Nothing but plain data is unpickled. Raises WeightsError.
    """
    saved = _read(path)
    if isinstance(saved, Mapping):
        inner = (saved.get(key) for key in ("model", "state_dict"))
        saved = next((value for value in inner if isinstance(value, Mapping)), saved)
        named = {str(name).removeprefix("module."): value for name, value in saved.items()
                 if isinstance(value, Tensor)}
        if named:
            return named
    raise WeightsError(f"weights {path}: holds no named tensors, neither itself nor under 'model'")


def read_tensor(path: str | os.PathLike[str]) -> Tensor:
    """The one tensor of a torch file. Raises WeightsError."""
    saved = _read(path)
    if not isinstance(saved, Tensor):
        raise WeightsError(f"weights {path}: holds no tensor but {type(saved).__name__}")
    return saved


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises SafetensorError and OSError."""
    if not names_alone():
        return load_file(path)
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: torch.empty(one.get_shape(), dtype=_DTYPES.get(one.get_dtype(), torch.float32))
                for name, one in slices.items()}


def from_folder(kind: Any, folder: Path, **given: Any) -> Any:
    """`kind.from_pretrained` of a folder of diffusers or transformers, never of the hub.

    On the meta device the network and the names and shapes of its files, by the library's own rules for names; raises
    ValueError when the files lack a weight or have one of another shape. Else raises what the library does.
    """
    if not names_alone():
        return kind.from_pretrained(folder, local_files_only=True, **given)
    if not issubclass(kind, nn.Module):
        with torch.device("cpu"):
            return kind.from_pretrained(folder, local_files_only=True, **given)
    return _by_diffusers(kind, folder) if hasattr(kind, "load_config") else _by_transformers(kind, folder, **given)


def names_alone() -> bool:
    return torch.get_default_device().type == "meta"


def _by_diffusers(kind: Any, folder: Path) -> nn.Module:
    network = kind.from_config(kind.load_config(folder, local_files_only=True))
    there = _shapes_in(folder)
    network._fix_state_dict_keys_on_load(there)  # names of attention in files of before 2023
    here = network.state_dict()
    _refuse(folder, misfits(here, {name: tensor for name, tensor in there.items() if name in here}))
    return network


def _by_transformers(kind: Any, folder: Path, config: Any = None, output_loading_info: bool = False,
                     **given: Any) -> Any:
    config = config or kind.config_class.from_pretrained(folder, local_files_only=True)
    there = _shapes_in(folder)
    with torch.device("cpu"):  # the library refuses to load under another default
        network, info = kind.from_pretrained(None, config=config, state_dict=there, device_map="meta",
                                             output_loading_info=True, **given)
    if output_loading_info:
        return network, info
    _refuse(folder, [*_some("missing", info["missing_keys"]),
                     *_some("of another shape", [str(one[0]) for one in info["mismatched_keys"]])])
    return network


def _shapes_in(folder: Path) -> dict[str, Tensor]:
    """Of the file that the libraries would take, or of all its parts."""
    for name in _FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _named(folder / name)
        if index.is_file():
            parts = set(json.loads(index.read_bytes())["weight_map"].values())
            return {key: tensor for part in sorted(parts) for key, tensor in _named(folder / part).items()}
    raise OSError(f"{folder}: there is none of {', '.join(_FILES)}")


def _named(path: Path) -> dict[str, Tensor]:
    return read_weights(path) if path.suffix == ".bin" else read_safetensors(path)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")


def misfits(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> list[str]:
    """What the weights `there` lack, have besides and have in another shape than those of a network: numbers, and the
    first names."""
    wrong = [f"{name} {list(there[name].shape)}, here {list(here[name].shape)}"
             for name in here.keys() & there.keys() if here[name].shape != there[name].shape]
    return [*_some("missing", here.keys() - there.keys()), *_some("unknown", there.keys() - here.keys()),
            *_some("of another shape", wrong)]


def _some(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    more = ", …" if len(found) > _SHOWN else ""
    return [f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{more}"] if found else []


def _read(path: str | os.PathLike[str]) -> object:
    try:
        if names_alone():
            return torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        why = error.strerror or error
        raise WeightsError(f"weights {path}: cannot be read ({why}); check the path") from error
    except _UNREADABLE as error:
        said = str(error) if isinstance(error, RuntimeError) else ""  # the others advise to run what is in it
        why = f" ({said.splitlines()[0]})" if said else ""
        raise WeightsError(f"weights {path}: not a torch file of plain tensors, or cut short{why}; copy "
                           "or download it again") from error
