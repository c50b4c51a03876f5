"""Safetensors files, written and hashed in one pass.

Written here because a checkpoint of several GB is hashed anyway: the library writes it and then it would
have to be read back. Reading is the library's. Writing and hashing release the GIL, so a training thread goes
on meanwhile.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_BLOCK = 1 << 24  # bytes written and hashed at a time
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int | str]:
    """Write contiguous CPU tensors to the new file `path` and sync it -> {"size": bytes, "sha256": hex}."""
    header = _header(tensors)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for part in (header, *map(_bytes_of, tensors.values())):
            for start in range(0, len(part), _BLOCK):
                block = part[start:start + _BLOCK]
                file.write(block)
                digest.update(block)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def _header(tensors: Mapping[str, torch.Tensor]) -> memoryview:
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors start on 8 bytes
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The names and shapes in a file, from its header alone. Raises ValueError when it is no safetensors
    file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_into(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the file's tensors into `tensors`, in place; names and shapes have been compared before."""
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))
