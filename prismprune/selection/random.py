"""Tokens drawn by lot: the baseline that any method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from prismprune.selection.base import Scores, Selection, Selector, check_seed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Random(Selector):
    """The first `k` tokens of a permutation that `seed` (0 to 2**63 - 1) and the number of tokens decide.

    The same for every image of that size, in any batch and on every device. Raises `InvalidOptionError` for a
    seed that is none.
    """

    seed: int = 0
    name: ClassVar[str] = "random"
    looks_at_few: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def looks_at(self, attention: Tensor, k: int) -> Tensor:
        """See `Selector`: what it keeps."""
        images, _, patches = attention.shape
        # Drawn on the CPU: each kind of device has a generator of its own.
        order = torch.randperm(patches, generator=torch.Generator().manual_seed(int(self.seed)))
        return order[:k].sort().values.to(attention.device).expand(images, -1)

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`."""
        return Selection(self.looks_at(scores.attention, k))
