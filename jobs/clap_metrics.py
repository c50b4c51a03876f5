"""How well generated pictures fit the sounds they were made from: numbers over embeddings, whoever made those.

    AIS  how often a sound is more similar to its own picture than to another one's     (chance .5)
    IIS  how often a generated picture is more similar to the true one than another      (chance .5)
    AIC  how often the sound's most similar class is that of its picture                  (chance 1/classes)
    R@k  how often the own picture is among the k most similar to a sound                 (chance k/n)
    FID  distance of the two clouds of picture embeddings, as Gaussians                   (0: the same)
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.clap_validation import bootstrap


def pair_wins(left: Tensor, right: Tensor) -> np.ndarray:
    """For each row i of `left` [n, E], how often right[i] is more similar to it than right[j], j != i. [n] in 0..1."""
    similar = F.normalize(left.double(), dim=1) @ F.normalize(right.double(), dim=1).T
    own = similar.diagonal()[:, None]
    wins = (own > similar).double() + 0.5 * (own == similar).double()
    wins.fill_diagonal_(0)
    return (wins.sum(1) / (len(left) - 1)).numpy()


def recall(sounds: Tensor, pictures: Tensor, k: int) -> np.ndarray:
    """Whether picture i is among the k most similar to sound i. [n] of 0 and 1."""
    similar = F.normalize(sounds.double(), dim=1) @ F.normalize(pictures.double(), dim=1).T
    before = (similar > similar.diagonal()[:, None]).sum(1)
    return (before < k).double().numpy()


def frechet(first: Tensor, second: Tensor) -> float:
    """FID of two clouds [n, E] and [m, E]. In its true sense only for the embeddings of one agreed network."""
    a, b = first.double(), second.double()
    covariances = [torch.atleast_2d(torch.cov(cloud.T)) for cloud in (a, b)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * roots
    return max(0.0, distance.item())


def scores(sounds: Tensor, generated: Tensor, truth: Tensor, resamples: int, seed: int) -> dict[str, dict[str, float]]:
    """Every number with its interval, its chance value and without an opinion.

    sounds and generated [n, E] in one space, truth [n, E] the embeddings of the true pictures. Sounds are in the space
    of class similarities for encoders without a space of their own (jobs.clap_encoders).
    """
    count = len(sounds)
    per_item = {"AIS": (pair_wins(sounds, generated), 0.5), "IIS": (pair_wins(generated, truth), 0.5),
                "AIC": ((sounds.argmax(1) == generated.argmax(1)).double().numpy(), 1 / sounds.shape[1])}
    per_item |= {f"R@{k}": (recall(sounds, generated, k), k / count) for k in (1, 5, 10) if k < count}
    found = {}
    for name, (values, chance) in per_item.items():
        interval = bootstrap(values, resamples, seed)
        found[name] = {"value": interval.mean, "low": interval.low, "high": interval.high, "chance": chance}
    return found | {"FID": {"value": frechet(generated, truth)}}
