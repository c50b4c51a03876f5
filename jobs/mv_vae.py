"""The tiny autoencoder of a run from random weights: trained before the first step, and only used when it is good."""
from __future__ import annotations

import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from configs.phase1 import TinyVae
from jobs.data.multiview import MultiView
from jobs.metrics import duration
from jobs.pretraining import pretrain
from jobs.runtime import JobError, StopFlag
from jobs.world import World
from models.losses import image_psnr

_KL = 1e-6  # weight of the posterior's divergence from the normal distribution
_SCALE_OF = 64  # training samples whose latents set the scaling factor


class VaeTooPoor(JobError):
    """The autoencoder cannot show what the UNet would learn."""

    exit_code = 1


def train_vae(vae: AutoencoderKL, sizes: TinyVae, train: MultiView, val: MultiView, seed: int, world: World,
              stop: StopFlag, say: Callable[[str], None]) -> bool:
    """Train `vae` in place on pictures of `train`, alike on all ranks, and set its scaling factor.

    False when the ranks agreed to stop meanwhile. Raises AgreedError (VaeTooPoor) when pictures of `val` come back
    below `sizes.min_psnr`. A function of the seed, the ranks and the data: a restart makes the same one.
    """
    began = time.monotonic()
    if not pretrain("vae", vae, lambda: _loss(vae, _pictures(train, sizes.batch, world.device)), sizes.train_steps,
                    sizes.lr, seed, world, stop, say):
        return False
    vae.register_to_config(scaling_factor=world.value_from_main(_scaling(vae, train, world.device)))
    found = reconstruction_psnr(vae, val, world)
    say(f"vae trained in {duration(time.monotonic() - began)}: validation pictures come back with {found:.2f} dB")
    poor = VaeTooPoor(f"the autoencoder reconstructs the validation pictures with {found:.2f} dB only; "
                      f"model.tiny.vae.min_psnr is {sizes.min_psnr:g}",
                      "no UNet can be better than that; raise model.tiny.vae.train_steps or its channels")
    world.agree(None if found >= sizes.min_psnr else poor)
    return True


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, views: MultiView, world: World) -> float:
    """Mean PSNR in dB of all pictures after encoding (mode) and decoding: the most a UNet can reach."""
    table = torch.zeros(len(views), dtype=torch.float64, device=world.device)
    for index in range(world.rank, len(views), world.size):
        truth = views.views(index).pixels[:, :3].to(world.device).float() / 255
        again = vae.decode(vae.encode(truth * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        table[index] = image_psnr(again, truth).double().mean()
    return world.sum(table).mean().item()


def _loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    posterior = vae.encode(pictures).latent_dist
    return (vae.decode(posterior.sample()).sample - pictures).square().mean() + _KL * posterior.kl().mean()


def _pictures(train: MultiView, count: int, device: torch.device) -> Tensor:
    """[count, 3, S, S] in -1..1, any view of any sample."""
    chosen = []
    for index in torch.randint(len(train), (count,)).tolist():
        pixels = train.views(index).pixels
        chosen.append(pixels[torch.randint(len(pixels), ()), :3])
    return torch.stack(chosen).to(device).float() / 127.5 - 1


@torch.no_grad()
def _scaling(vae: AutoencoderKL, train: MultiView, device: torch.device) -> float:
    """What makes the latents of unit variance."""
    latents = [vae.encode(train.views(index).pixels[:, :3].to(device).float() / 127.5 - 1).latent_dist.mode()
               for index in range(min(len(train), _SCALE_OF))]
    return 1 / torch.cat(latents).std().item()
