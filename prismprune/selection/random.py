"""Tokens drawn by lot: the baseline that any method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prismprune.selection.base import Scores, Selection, Selector, check_seed


@dataclass(frozen=True, slots=True)
class Random(Selector):
    """The first `k` tokens of a permutation that `seed` (0 to 2**63 - 1) and the number of tokens decide.

    The same for every image of that size, in any batch and on every device. Raises `InvalidOptionError` for a
    seed that is none.
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`."""
        # Drawn on the CPU: each kind of device has a generator of its own.
        order = torch.randperm(scores.candidates, generator=torch.Generator().manual_seed(self.seed))
        indices = order[:k].sort().values.to(scores.features.device)
        return Selection(indices.expand(scores.images, -1))
