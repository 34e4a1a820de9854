"""Evenly spaced tokens: a baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from prismprune.selection.base import Scores, Selection, Selector

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Uniform(Selector):
    """The raster cut into `k` stretches of equal length; of each, the token at its middle."""

    name: ClassVar[str] = "uniform"
    looks_at_few: ClassVar[bool] = True

    def looks_at(self, attention: Tensor, k: int) -> Tensor:
        """See `Selector`: what it keeps."""
        images, _, patches = attention.shape
        k = min(k, patches)
        steps = torch.arange(k, device=attention.device)
        middles = (2 * steps + 1) * patches // max(2 * k, 1)
        return middles.expand(images, k)

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`."""
        return Selection(self.looks_at(scores.attention, k))
