"""Alpha for pictures that a generator drew on one plain background."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

_LOOK_EVERY = 16  # steps of the flood between two looks whether it still grows


def rgba_of(views: Tensor, background: tuple[float, float, float], low: float, high: float) -> Tensor:
    """uint8 [V, S, S, 4], straight alpha, RGB 0 where alpha is 0, of RGB [V, 3, S, S] in 0..1.

    A pixel's alpha grows from 0 to 1 while its distance from the background (0..1 per channel, as a share of what
    the channel allows) goes from `low` to `high`; what the object encloses is the object: white fur on white. On
    the background the result looks like `views` where alpha is not 0.
    """
    behind = views.new_tensor(background).view(3, 1, 1)
    room = torch.where(views < behind, behind, 1 - behind).clamp(min=1e-6)
    distance = ((views - behind).abs() / room).amax(1, keepdim=True)  # [V, 1, S, S]: the least alpha that explains it
    alpha = ((distance - low) / (high - low)).clamp(0, 1)
    alpha = torch.where(alpha > 0, torch.maximum(alpha, distance.clamp(max=1)), alpha)
    alpha = torch.where(_outside(alpha < 0.5), alpha, 1)
    straight = torch.where(alpha > 0.5 / 255, (views - behind * (1 - alpha)) / alpha.clamp(min=1e-6), 0)
    both = torch.cat([straight.clamp(0, 1), alpha], 1)
    return (both * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def _outside(clear: Tensor) -> Tensor:
    """bool [V, 1, S, S]: the clear pixels that the border of the picture reaches through clear pixels, and their
    neighbours: the soft edge of the object."""
    edge = torch.ones_like(clear[:1, :1])
    edge[..., 1:-1, 1:-1] = False
    reached, size = (clear & edge).float(), -1.0
    allowed = clear.float()
    while (now := reached.sum().item()) != size:
        size = now
        for _ in range(_LOOK_EVERY):
            reached = max_pool2d(reached, 3, 1, 1) * allowed
    return max_pool2d(reached, 3, 1, 1) > 0
