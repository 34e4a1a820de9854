"""VisPruner (arXiv 2412.01818, ICCV 2025): the most attended tokens, and what is left when duplicates go.

As there: K/2 tokens (rounded down) by CLS attention, averaged over heads. The others stand in the order of
their attention; in rounds, each token at an even place is compared with those at odd places (cosine of the
features before the projector), and the 8 with the highest similarity go, until the rest of the budget is
left. In the next round the even ones that stay come before the odd ones, the most similar first.

Not done: newline tokens and unpadding are the family's business, and kept in its own layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from prismprune.selection.base import Scores, Selection, Selector, cosines, head_mean

if TYPE_CHECKING:
    from torch import Tensor

DROPPED_A_ROUND = 8


@dataclass(frozen=True, slots=True)
class VisPruner(Selector):
    """Half by attention, half by dropping, round by round, the tokens most similar to another."""

    name: ClassVar[str] = "vispruner"

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`. `salient` are the most attended tokens, `diverse` those that outlast the rounds."""
        k = min(k, scores.candidates)
        order = head_mean(scores.attention).sort(dim=1, descending=True, stable=True).indices
        salient = order[:, : k // 2].sort(dim=1).values
        diverse = _without_duplicates(scores.features, order[:, k // 2 :], k - k // 2).sort(dim=1).values
        return Selection(torch.cat([salient, diverse], dim=1).sort(dim=1).values, salient, diverse)


def _without_duplicates(features: Tensor, rest: Tensor, k: int) -> Tensor:
    """The `k` tokens of `rest` [B, R] that outlast the rounds, in no order: [B, k]."""
    if k == 0:
        return rest[:, :0]
    similarity = cosines(features, features)  # [B, N, N]
    images = torch.arange(len(rest), device=rest.device)[:, None, None]
    while rest.shape[1] > k:
        even, odd = rest[:, ::2], rest[:, 1::2]
        drop = min(DROPPED_A_ROUND, rest.shape[1] - k, even.shape[1])
        nearest = similarity[images, even[:, :, None], odd[:, None, :]].amax(dim=2)
        stay = nearest.sort(dim=1, descending=True, stable=True).indices[:, drop:]
        rest = torch.cat([even.gather(1, stay), odd], dim=1)
    return rest
