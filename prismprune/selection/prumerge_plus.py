"""PruMerge+ (arXiv 2403.15388, ICCV 2025): attention's outliers, evenly spaced tokens, neighbors merged in.

As there: tokens whose CLS attention lies more than 1.5 interquartile ranges above the third quartile stay, so
do tokens evenly spaced over the others, and to each kept token the 32 tokens with the most similar keys
(cosine) are added, each weighted by its own attention.

A budget: there the number of tokens follows from the picture. Here it is K: the outliers, of more than K the
K most attended, and as many evenly spaced ones as are missing.

Not done: attention is the mean over heads, as for the other methods, where the authors' code runs one softmax
over all heads at once, in the tower's last block; its one extra token, the weighted sum of all that was
dropped, stands for no place in the picture and is left out. Nothing is fine-tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from prismprune.selection.base import (
    Scores,
    Selection,
    Selector,
    cosines,
    exact,
    head_mean,
    highest,
    nothing_of,
    take,
)

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBORS = 32
WHISKER = 1.5
"""Interquartile ranges above the third quartile at which outliers begin."""


@dataclass(frozen=True, slots=True)
class PruMergePlus(Selector):
    """Attention's outliers and evenly spaced tokens, with their neighbors by key, returned as weights."""

    name: ClassVar[str] = "prumerge_plus"
    needs_keys: ClassVar[bool] = True

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`."""
        keys = scores.keys_of(self.name).transpose(1, 2).flatten(2)  # [B, N, H * head_dim]
        attention = head_mean(scores.attention)
        if not (k := min(k, scores.candidates)):
            return nothing_of(scores, merges=True)
        indices = _kept(attention, k)
        return Selection(indices, weights=_weights(keys, attention, indices))


def _kept(attention: Tensor, k: int) -> Tensor:
    """Raster indices [B, k], ascending, of the outliers of `attention` [B, N] and of evenly spaced tokens."""
    values = exact(attention)
    low, high = (values.quantile(share, dim=1, keepdim=True) for share in (0.25, 0.75))
    top = torch.zeros_like(values, dtype=torch.bool).scatter(1, highest(attention, k), value=True)
    outliers = top & (values > high + WHISKER * (high - low))
    return highest((outliers | _evenly(~outliers, k - outliers.sum(dim=1, keepdim=True))).float(), k)


def _evenly(free: Tensor, count: Tensor) -> Tensor:
    """Mask of the middles of `count` [B, 1] equal stretches of the `free` [B, N] tokens, as in `uniform`."""
    size = free.sum(dim=1, keepdim=True).clamp(min=1)
    place = free.cumsum(dim=1)  # of a free token: how many are free up to it
    # A token at this place is a middle if one more middle lies at or before it than before it.
    up_to, before = ((2 * count * at + size - 1) // (2 * size) for at in (place, place - 1))
    return free & (up_to > before)


def _weights(keys: Tensor, attention: Tensor, indices: Tensor) -> Tensor:
    """Weights [B, K, N]: 1 for the kept token itself, and for its nearest by key their own attention."""
    itself = indices.unsqueeze(2)
    similarity = cosines(take(keys, indices), keys).scatter(2, itself, -torch.inf)
    order = similarity.sort(dim=2, descending=True, stable=True).indices
    nearest = order[:, :, : min(NEIGHBORS, keys.shape[1] - 1)]
    everywhere = attention.unsqueeze(1).expand_as(similarity)
    shares = torch.zeros_like(similarity).scatter(2, nearest, everywhere.gather(2, nearest))
    return shares.scatter(2, itself, 1.0)
