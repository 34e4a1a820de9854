"""PrismPrune: the salient tokens, and diverse ones from a pool on which the heads disagree (ALGORITHM.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from prismprune.budget import ROUNDING
from prismprune.selection.base import (
    Scores,
    Selection,
    Selector,
    check_choice,
    check_range,
    head_mean,
    head_variance,
    highest,
    take,
)
from prismprune.selection.fps import FPS_STARTS, FpsStart, farthest_points

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prism(Selector):
    """Half of the budget by attention's mean over heads, half by farthest point sampling (FPS).

    salient_share: the salient part of the budget, 0 (diversity only) to 1 (saliency only).
    pool_factor: FPS chooses from the pool_factor * K_div tokens with the highest variance over heads, 1 to
        64; None or "all": from every token that is not salient.
    fps_start: the first diverse token; see `farthest_points`.

    Raises `InvalidOptionError` for an option out of range.
    """

    salient_share: float = 0.5
    pool_factor: float | Literal["all"] | None = 4
    fps_start: FpsStart = "max_variance"
    name: ClassVar[str] = "prism"
    looks_at_few: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("salient_share", self.salient_share, 0, 1)
        if self.pool_factor not in (None, "all"):
            check_range("pool_factor", self.pool_factor, 1, 64)
        check_choice("fps_start", self.fps_start, FPS_STARTS)

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`. `salient` and `diverse` part the kept tokens, also where `k` keeps them all."""
        salient, pool, variance = self._candidates(scores.attention, k)
        k = min(k, scores.candidates)
        picks = farthest_points(
            take(scores.features, pool),
            k - salient.shape[1],
            variance=variance.gather(1, pool),
            start=self.fps_start,
            salient=take(scores.features, salient) if self.fps_start == "farthest_from_salient" else None,
        )
        diverse = pool.gather(1, picks)
        return Selection(torch.cat([salient, diverse], dim=1).sort(dim=1).values, salient, diverse)

    def looks_at(self, attention: Tensor, k: int) -> Tensor:
        """See `Selector`: the salient tokens and the pool."""
        salient, pool, _ = self._candidates(attention, k)
        return torch.cat([salient, pool], dim=1)

    def _candidates(self, attention: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Raster indices of the salient tokens [B, K_sal] and of the pool [B, M]; the variance [B, N]."""
        patches = attention.shape[2]
        k = min(k, patches)
        salient_count = math.floor(self.salient_share * k + ROUNDING)
        salient = highest(head_mean(attention), salient_count)
        # A variance is never negative: the salient tokens come last, and the pool ends before them.
        variance = head_variance(attention).scatter(1, salient, -1.0)
        pool = highest(variance, self._pool_size(k - salient_count, patches - salient_count))
        return salient, pool, variance

    def _pool_size(self, k: int, rest: int) -> int:
        if self.pool_factor is None or isinstance(self.pool_factor, str):
            return rest
        return min(math.floor(self.pool_factor * k + ROUNDING), rest)
