"""The environment of a run: packages, torchvision, and whether this torch can use these GPUs."""
from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_LEAST_DRIVER = {11: 450, 12: 525, 13: 580}  # CUDA's major version -> NVIDIA's driver that it needs on Linux
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Found:
    """As cluster.node.check.Found, which a job may not import."""

    check: str
    severity: Literal["error", "warning", "info"]
    what: str
    where: str
    why: str
    fix: str


def missing_packages(names: tuple[str, ...]) -> Iterator[Found]:
    """Looked for, not loaded."""
    gone = [name for name in names if importlib.util.find_spec(name) is None]
    if gone:
        wanted = " ".join({"PIL": "pillow"}.get(name, name) for name in gone)
        yield Found("environment", "error", f"no package {', '.join(gone)}", sys.prefix,
                    "the stage imports it", f"{sys.executable} -m pip install {wanted}")


def torchvision(load: bool) -> Iterator[Found]:
    """A torchvision that was built for another torch makes transformers and diffusers fail at their import; none at
    all is well."""
    wanted, there = _torch_that_torchvision_wants(), _version("torch")
    problem = ""
    if wanted and there and there.split("+")[0] != wanted:
        problem = f"torchvision was built for torch {wanted}, and torch {there} is installed"
    elif load and wanted:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as error:  # what its operators say without their library
            problem = f"torchvision cannot be imported: {error}"
    if problem:
        yield Found("environment", "error", problem, sys.prefix,
                    "transformers and diffusers import it where it is there, and fail with it",
                    f"{sys.executable} -m pip uninstall torchvision  # nothing here needs it")


def _torch_that_torchvision_wants() -> str:
    try:
        lines = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    return next((found[1] for line in lines if (found := re.match(r"torch\s*\(?==\s*([\d.]+)", line))), "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def load(names: tuple[str, ...], seconds: dict[str, float]) -> Iterator[Found]:
    """Import them in this order; what one takes is not counted again with the next."""
    for name in names:
        began = time.monotonic()
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError, OSError, AttributeError) as error:  # a broken package raises any of these
            yield Found("environment", "error", f"import {name}: {type(error).__name__}: {error}",
                        sys.prefix, "every rank would end with it",
                        f"{sys.executable} -m pip install --force-reinstall {name.split('.')[0]}"
                        if not name.startswith("jobs.") else f"{sys.executable} -c 'import {name}'")
            return
        seconds[name] = round(time.monotonic() - began, 3)


def cuda(gpus: int, loaded: bool) -> Iterator[Found]:
    """Whether this torch can use these GPUs: by its version and the driver's, and when it is loaded by asking it."""
    version = _cuda_of_torch()
    if version is None:
        yield Found("cuda", "error", f"torch {_version('torch')} is built for the CPU", sys.prefix,
                    f"the job asks for {gpus} GPUs and could use none", "install a torch with CUDA, or --gpus 0")
        return
    driver = _driver()
    if driver and driver < _LEAST_DRIVER.get(version, 0):
        yield Found("cuda", "error", f"torch is built for CUDA {version}, which needs driver {_LEAST_DRIVER[version]} "
                    f"or newer; here is {driver}", str(_DRIVER), "CUDA would not start",
                    "ask for a newer driver, or install a torch built for an older CUDA")
    elif loaded:
        yield from _capability(gpus)


def _cuda_of_torch() -> int | None:
    """The major version, without loading torch."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return None
    text = (Path(found.origin).parent / "version.py").read_text()
    said = re.search(r"^cuda[^=]*=\s*'(\d+)", text, re.MULTILINE)
    return int(said[1]) if said else None


def _driver() -> int | None:
    try:
        said = re.search(r"\b(\d{3})\.\d+", _DRIVER.read_text())
    except OSError:
        return None
    return int(said[1]) if said else None


def _capability(gpus: int) -> Iterator[Found]:
    import torch

    if torch.cuda.device_count() < gpus:
        yield Found("cuda", "error", f"torch sees {torch.cuda.device_count()} GPUs, the job has {gpus}",
                    "CUDA_VISIBLE_DEVICES", "ranks without a GPU would fail", "nvidia-smi on the node: does it hang?")
        return
    built = torch.cuda.get_arch_list()
    for index in range(gpus):
        major, minor = torch.cuda.get_device_capability(index)
        if not runs_on(built, major, minor):
            yield Found("cuda", "error", f"torch {torch.__version__} has no kernels for compute capability "
                        f"{major}.{minor}, only {', '.join(built)}", torch.cuda.get_device_name(index),
                        "every operation on this GPU would fail", "install a torch that is built for it")


def runs_on(built: list[str], major: int, minor: int) -> bool:
    """Whether kernels (sm_NN: the same major version; compute_NN: any later one) serve a capability."""
    for one in built:
        found = re.match(r"(sm|compute)_(\d+)(\d)", one)
        if found is None:
            continue
        have = (int(found[2]), int(found[3]))
        if have <= (major, minor) and (found[1] == "compute" or have[0] == major):
            return True
    return False
