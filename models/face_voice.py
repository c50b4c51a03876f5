"""Matching faces and voices: two heads into one space, and the contrastive loss between them.

The temperature is a parameter like any other (CLIP's logit_scale, arXiv 2103.00020): its logarithm is learned, and it
is clamped in place after a step of the optimizer. Clamped in forward it would have no gradient at the bound, and never
come back from there.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FIRST_SCALE = 1 / 0.07
MAX_SCALE = 100.0
_EPS = 1e-6  # least norm that an embedding is divided by


class FaceVoice(nn.Module):
    """Features of the two towers to embeddings of length 1."""

    def __init__(self, face_width: int, voice_width: int, width: int = 512, dropout: float = 0.1,
                 first_scale: float = FIRST_SCALE) -> None:
        super().__init__()
        self.face, self.voice = _head(face_width, width, dropout), _head(voice_width, width, dropout)
        self.log_scale = nn.Parameter(torch.tensor(math.log(first_scale)))

    def faces(self, features: Tensor) -> Tensor:
        """[B, face width] -> [B, width], fp32."""
        return functional.normalize(self.face(features).float(), dim=1, eps=_EPS)

    def voices(self, features: Tensor) -> Tensor:
        """[B, voice width] -> [B, width], fp32."""
        return functional.normalize(self.voice(features).float(), dim=1, eps=_EPS)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """After each step of the optimizer: 1 <= scale <= 100."""
        self.log_scale.clamp_(0.0, math.log(MAX_SCALE))


def _head(features: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.ReLU(), nn.Dropout(dropout),
                         nn.Linear(width, width))


@dataclass(frozen=True)
class Contrast:
    """0-d each; `accuracy`: the share of rows and columns whose best match is of their own identity."""

    loss: Tensor
    accuracy: Tensor


def contrast(
    faces: Tensor,  # [B, D] of length 1
    voices: Tensor,  # [B, D] of length 1
    identities: Tensor,  # [B] whole numbers
    log_scale: Tensor,
) -> Contrast:
    """Symmetric InfoNCE over the B x B similarities. It is ln(B) when all similarities are the same.

    All pairs of one identity are positives with equal shares (L_out of SupCon, arXiv 2004.11362): an identity that is
    twice in the batch is not pushed away from itself.
    """
    logits = log_scale.exp() * faces @ voices.T
    positive = identities[:, None] == identities[None]
    shares = positive / positive.sum(1, keepdim=True)  # [B, B], symmetric in its zeros and, per identity, its values
    loss = torch.stack([-(shares * functional.log_softmax(way, 1)).sum(1).mean() for way in (logits, logits.T)]).mean()
    with torch.no_grad():
        hits = [positive.gather(1, way.argmax(1, keepdim=True)).float().mean() for way in (logits, logits.T)]
    return Contrast(loss, torch.stack(hits).mean())


@dataclass(frozen=True)
class Spread:
    """How far embeddings are from having collapsed into one point; 0-d each."""

    std: Tensor  # mean over dimensions, times sqrt(D): 1 for points spread evenly over the sphere, 0 for one point
    cosine: Tensor  # mean over all pairs: 0 and 1


def spread(embeddings: Tensor) -> Spread:
    """Of [B, D] of length 1, B >= 2."""
    count, width = embeddings.shape
    total = embeddings.sum(0)
    cosine = (total @ total - embeddings.square().sum()) / (count * (count - 1))
    return Spread(embeddings.std(0).mean() * math.sqrt(width), cosine)
