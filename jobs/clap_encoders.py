"""Who judges pictures and sounds: embeddings in one space, that of similarities to the classes.

Without weights a picture is compared with the mean training picture of each class, a sound with the mean embedding of
each class under the checkpoint's own audio tower. With a CLIP folder pictures and class names are CLIP's. Another judge
is an object with the same three methods.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.runtime import JobError
from models.mvdiffusion import without_progress_bars

_SHARPNESS = 100.0  # CLIP's learned scale of its cosines


class Judge(Protocol):
    """Each answer [n, classes]: how much it is of each class; the greatest is what it is taken for."""

    name: str

    def pictures(self, pictures: Tensor) -> Tensor:
        """Of RGB [n, 3, H, W] in 0..1."""

    def sounds(self, embeddings: Tensor) -> Tensor:
        """Of the checkpoint's audio embeddings [n, E]."""


class Templates:
    """Nearest class mean, of pictures and of sounds."""

    name = "nearest class template of the training pictures"

    def __init__(self, pictures: Tensor, embeddings: Tensor, labels: Sequence[str], classes: Sequence[str]) -> None:
        rows = [[index for index, label in enumerate(labels) if label == one] for one in classes]
        self._pictures = torch.stack([pictures[chosen].mean(0) for chosen in rows])
        self._mean = embeddings.mean(0)
        self._sounds = torch.stack([embeddings[chosen].mean(0) for chosen in rows]) - self._mean

    def pictures(self, pictures: Tensor) -> Tensor:
        distance = torch.cdist(pictures.flatten(1).double(), self._pictures.flatten(1).double())
        return (-distance).softmax(1)

    def sounds(self, embeddings: Tensor) -> Tensor:
        return sound_classes(embeddings, self._mean, self._sounds)


def sound_classes(embeddings: Tensor, mean: Tensor, centres: Tensor) -> Tensor:
    """Cosine to each class, around the mean of all."""
    similar = F.normalize(embeddings - mean, dim=1).double() @ F.normalize(centres, dim=1).double().T
    return (similar / 0.1).softmax(1)


class Clip(Templates):
    """Pictures by a CLIP model and the names of the classes."""

    def __init__(self, folder: Path, pictures: Tensor, embeddings: Tensor, labels: Sequence[str],
                 classes: Sequence[str], device: torch.device) -> None:
        """Raises JobError when the folder holds no CLIP."""
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        super().__init__(pictures, embeddings, labels, classes)
        try:
            with without_progress_bars():
                self._model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
                self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
                tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise JobError(f"image_encoder: no CLIP can be read from {folder}: {error}") from None
        self.name = f"CLIP of {folder}"
        self._device = device
        texts = tokenizer([f"a photo of {one}" for one in classes], padding=True, return_tensors="pt").to(device)
        with torch.no_grad():
            self._names = F.normalize(self._model.get_text_features(**texts).pooler_output, dim=1)

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        found = []
        for picture in pictures:
            pixels = self._processor(images=(picture * 255).round().byte(), return_tensors="pt").pixel_values
            image = F.normalize(self._model.get_image_features(pixels.to(self._device)).pooler_output, dim=1)
            found.append((_SHARPNESS * image @ self._names.T).softmax(1).double().cpu()[0])
        return torch.stack(found)
