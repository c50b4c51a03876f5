"""Reading files of network weights that a person points at."""
from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Mapping
from zipfile import BadZipFile

import torch
from torch import Tensor

# what torch.load was seen to raise for files that are cut, damaged or something else altogether
_UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, BadZipFile, struct.error, ValueError,
               LookupError, AttributeError, TypeError, AssertionError)


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


def _read(path: str | os.PathLike[str]) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        why = error.strerror or error
        raise WeightsError(f"weights {path}: cannot be read ({why}); check the path") from error
    except _UNREADABLE as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"weights {path}: not a torch file of plain tensors, or cut short ({why}); copy "
                           "or download it again") from error
