"""Random subsets of visual tokens, which most of the training shows instead of all of them.

No selection method takes part. What an object must not be is lost (a question about it would have a false
answer) or told by the number of its tokens (pruning would change its size): every object keeps at least one
token, and how densely it is shown is drawn for each object on its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismprune.demo.scenes import Thing

FIELD = 1.5  # spread of the log weights of a smooth field
DENSITY = (0.0, 3.5)  # log weight of an object's patches against the background's, from, to


def shown(things: Sequence[Thing], side: int) -> Tensor:
    """What each of side x side patches shows, [side^2] int64: 0 the background, k `things[k - 1]`."""
    centers = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    numbers = torch.zeros(side, side, dtype=torch.int64)
    slack = 0.25 / side
    for number, thing in enumerate(things, start=1):
        inside_x = (x - thing.x).abs() < thing.width / 2 + slack
        inside_y = (y - thing.y).abs() < thing.height / 2 + slack
        numbers[inside_x & inside_y] = number
    return numbers.reshape(-1)


def draw(numbers: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` random tokens of each image, raster indices [B, count] ascending.

    `numbers` [B, N] is what the patches show (`shown`). Half of the images are sampled through a random
    smooth field, half with a density for each object; every object keeps a token while `count` allows it.
    """
    images, available = numbers.shape
    side = round(available**0.5)
    coarse = torch.randn(images, 1, 5, 5, generator=rng)
    field = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").reshape(images, available)
    through_field, through_objects = (torch.rand(2, images, 1, generator=rng) < 0.5).float()
    low, high = DENSITY
    density = low + (high - low) * torch.rand(images, int(numbers.max()) + 1, generator=rng)
    density[:, 0] = 0.0
    weight = FIELD * through_field * field + through_objects * density.gather(1, numbers)
    # Gumbel noise on log weights and a top-k: sampling by weight without replacement.
    noisy = weight - torch.log(-torch.log(torch.rand(images, available, generator=rng)))
    for number in range(1, int(numbers.max()) + 1):
        here = noisy.masked_fill(numbers != number, -torch.inf)
        best, at = here.max(1, keepdim=True)
        noisy.scatter_(1, at, torch.where(best.isfinite(), torch.inf, noisy.gather(1, at)))
    chosen: Tensor = noisy.topk(count).indices.sort(dim=1).values
    return chosen
