"""What a model's PSNR is held against: pictures that need no learning. A number that rose proves nothing."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERDICT = "validation.json"  # in artifacts/: {"metrics": the last evaluation, "bars": [{against, bar, psnr, beaten}]}
WHITE, COPY = "the white picture", "the picture put in, copied"
MEAN = "the mean training picture of each view"


def bars(psnr: float, against: Mapping[str, float]) -> list[dict[str, Any]]:
    """`psnr` beside each of these, in dB."""
    return [{"against": words, "bar": bar, "psnr": psnr, "beaten": psnr > bar} for words, bar in against.items()]


def told(found: list[dict[str, Any]]) -> list[str]:
    """A line for people about each."""
    words = {True: "above", False: "NOT above"}
    return [f"{words[one['beaten']]} {one['against']}: {one['psnr']:.2f} dB, bar {one['bar']:.2f} dB" for one in found]


def write(directory: Path, metrics: Mapping[str, float], found: list[dict[str, Any]]) -> None:
    (directory / VERDICT).write_text(json.dumps({"metrics": metrics, "bars": found}, indent=1))
