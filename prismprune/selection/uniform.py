"""Evenly spaced tokens: a baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prismprune.selection.base import Scores, Selection, Selector


@dataclass(frozen=True, slots=True)
class Uniform(Selector):
    """The raster cut into `k` stretches of equal length; of each, the token at its middle."""

    name: ClassVar[str] = "uniform"

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`."""
        k = min(k, scores.candidates)
        steps = torch.arange(k, device=scores.features.device)
        middles = (2 * steps + 1) * scores.candidates // max(2 * k, 1)
        return Selection(middles.expand(scores.images, k))
