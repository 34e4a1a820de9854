"""PromPrune (arXiv 2603.14892): each picture's own split between attended tokens and a diverse remainder.

As there, on the features that the language model gets, at length 1 (X):
entropy    of the normalized eigenvalues of the centered X Xt, over the log of their number: 0 to 1
salient    round((1 - sigmoid((entropy - 0.42) / 0.02)) * K) tokens, the most attended (mean over heads)
the rest   greedy maximum a posteriori of a determinantal point process (DPP) with kernel X Xt over the other
           tokens; its first pick is the token least similar to the salient set, which otherwise has no say

The numbers are the authors' for LLaVA-1.5. Not done: their bounds on the split, 0 and 1 in the paper's
setting, are no options; kept tokens are sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from prismprune.selection.base import (
    Scores,
    Selection,
    Selector,
    directions,
    exact,
    head_mean,
    highest,
    nothing_of,
)

if TYPE_CHECKING:
    from torch import Tensor

MIDPOINT, WIDTH = 0.42, 0.02
"""The entropy at which the budget is split in halves, and how far from it the split stays mixed."""


@dataclass(frozen=True, slots=True)
class PromPrune(Selector):
    """Attention's top tokens and a DPP's, in a proportion that the features' spectral entropy sets."""

    name: ClassVar[str] = "promprune"
    needs_projected: ClassVar[bool] = True

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`. The two parts differ in size from picture to picture: they are not told apart."""
        if not (k := min(k, scores.candidates)):
            return nothing_of(scores)
        points = directions(scores.embeddings)
        broken = points.isnan().any(dim=2)  # a feature that overflowed 16 bits points nowhere
        points = points.nan_to_num(nan=0.0)
        salient_count = ((1 - _balance(points)) * k).round().long().unsqueeze(1)  # [B, 1]
        order = head_mean(scores.attention).sort(dim=1, descending=True, stable=True).indices
        salient = order.argsort(dim=1) < salient_count
        diverse = _diverse(points, broken, salient, k - salient_count)
        return Selection(highest((salient | diverse).float(), k))


def _balance(points: Tensor) -> Tensor:
    """The diverse share of each picture's budget, [B], float32, from its `points` [B, N, d]."""
    centered = points - points.mean(dim=1, keepdim=True)
    wide = points.shape[1] <= points.shape[2]
    gram = centered @ centered.transpose(1, 2) if wide else centered.transpose(1, 2) @ centered
    values = torch.linalg.eigvalsh(gram).clamp(min=1e-12)
    shares = values / values.sum(dim=1, keepdim=True)
    entropy = -(shares * shares.log()).sum(dim=1) / torch.tensor(max(values.shape[1], 2)).log()
    balance: Tensor = ((entropy - MIDPOINT) / WIDTH).sigmoid().float()
    return balance


def _diverse(points: Tensor, broken: Tensor, salient: Tensor, count: Tensor) -> Tensor:
    """Mask [B, N] of `count` [B, 1] greedy picks of the DPP outside the `salient` [B, N].

    The `broken` [B, N], which are zeros among the points, come last.
    """
    kernel = points @ points.transpose(1, 2)
    images = torch.arange(len(points), device=points.device)
    steps = int(count.max()) if len(points) else 0
    rows = kernel.new_zeros(len(points), steps, points.shape[1])  # of the kernel's Cholesky factor
    explained = torch.zeros_like(kernel[:, 0])
    picked = torch.zeros_like(salient)
    # Of an empty salient set every token is equally unlike.
    unlike = 1 - kernel.float().masked_fill(~salient.unsqueeze(1), -1.0).amax(dim=2)
    unlike = unlike.masked_fill(broken, 0.0)
    for step in range(steps):
        gain = _gain(kernel, explained) if step else unlike
        pick = gain.masked_fill(salient | picked, -torch.inf).argmax(dim=1)
        left = _gain(kernel, explained)[images, pick].clamp(min=1e-8)
        known = (rows[images, :step, pick].unsqueeze(1) @ rows[:, :step]).squeeze(1)
        rows[:, step] = (kernel[images, pick] - known) / exact(left).sqrt().unsqueeze(1)
        explained += rows[:, step].square()
        picked[images, pick] |= step < count.squeeze(1)
    return picked


def _gain(kernel: Tensor, explained: Tensor) -> Tensor:
    """Each token's variance [B, N] that the picked ones do not explain, float32, at least 0."""
    # In float32, on whose even grid near 1 the noise around an explained token vanishes.
    variance = kernel.diagonal(dim1=1, dim2=2).float()
    return (variance - explained.float()).clamp(min=0)
