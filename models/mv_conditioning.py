"""What tells the multi-view UNet which object it is to draw, and how its errors are weighted. Functions of tensors;
random numbers are given, never drawn.
"""
from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

SnrWeighting = Literal["public", "paper", "none"]
NOISE_LEVEL = 0  # of the unCLIP noising, in training and sampling


def class_labels(embeds: Tensor, noise: Tensor, normalizer: Any, noising_scheduler: Any) -> Tensor:
    """The noised CLIP embedding and the sinusoidal embedding of its noise level, [..., 2E].

    Args: embeds [n, E] (`image_embeds` of the CLIP vision model), noise [n, E] (a row per view); the normalizer has
    `mean` and `std` [1, E]. Level 0 of the noising scheduler is noise all the same, not the identity.
    """
    mean, std = (part.detach().to(embeds) for part in (normalizer.mean, normalizer.std))
    level = torch.full((len(embeds),), NOISE_LEVEL, dtype=torch.long, device=embeds.device)
    noised = noising_scheduler.add_noise((embeds - mean) / std, noise, level) * std + mean
    waves = get_timestep_embedding(level, embeds.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, waves.to(noised)], -1)


def drop_conditions(labels: Tensor, latents: Tensor, chance: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Zero the whole label (its level half too) where chance < 2 rate, the condition latents where
    rate <= chance < 3 rate: so each alone, and both, with probability `rate`.

    Args: labels [B, V, 2E], latents [B, V, 4, h, w], chance [B] in 0..1.
    """
    keep_label = (chance >= 2 * rate).to(labels)
    keep_latents = ((chance < rate) | (chance >= 3 * rate)).to(latents)
    return labels * keep_label[:, None, None], latents * keep_latents[:, None, None, None, None]


def snr_weights(alphas_cumprod: Tensor, t: Tensor, kind: SnrWeighting, gamma: float, prediction: str) -> Tensor:
    """Min-SNR weights of the squared errors at time steps t [n] -> [n].

    `public`: min(SNR, gamma) / SNR whatever is predicted, as the public code does. `paper`: Hang et al. (2023), for
    v min(SNR, gamma) / (SNR + 1), which all but ignores the noisiest steps, where the layout is decided.
    """
    if kind == "none":
        return torch.ones_like(t, dtype=torch.float32)
    alpha = alphas_cumprod.to(t.device)[t].double()
    snr = alpha / (1 - alpha)
    capped = snr.clamp(max=gamma)
    if kind == "paper" and prediction == "v_prediction":
        return (capped / (snr + 1)).float()
    if kind == "paper" and prediction == "sample":
        return capped.float()
    return torch.where(snr > 0, capped / snr, 1.0).float()


def training_target(scheduler: Any, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the scheduler wants predicted. Raises ValueError for a prediction type it does not define."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, t)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    raise ValueError(f"the scheduler's prediction_type {kind!r} is none of v_prediction, epsilon, sample")
