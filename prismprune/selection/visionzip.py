"""VisionZip (arXiv 2412.04467, CVPR 2025): dominant tokens stay, all others merge into a few contextual ones.

As there, on the block whose output is used: the dominant tokens are the most attended ones (CLS attention
over all heads). Of the others, evenly strided ones become the contextual tokens; each token that is neither
goes to the contextual token of the most similar key (cosine of the keys' mean over heads), and the mean of
those that came is added to it. Of K tokens, 5/32 (rounded down) are contextual: the authors' 30 of 192, 20 of
128 and 10 of 64.

Not done: CLS, which the authors keep beside the dominant tokens, is no candidate here, so that every method
has the same budget. Nothing is fine-tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import one_hot

from prismprune.selection.base import Scores, Selection, Selector, cosines, exact, head_mean, highest, take

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class VisionZip(Selector):
    """Dominant tokens by attention; contextual ones that take up the rest, returned as weights."""

    name: ClassVar[str] = "visionzip"
    needs_keys: ClassVar[bool] = True

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`."""
        size = scores.candidates
        k = min(k, size)
        contextual = 5 * k // 32
        dominant = highest(head_mean(scores.attention), k - contextual)
        if contextual == 0:
            return Selection(dominant)
        keys = exact(scores.keys_of(self.name)).mean(dim=1)  # [B, N, head_dim]
        targets, others = _strided(_rest(dominant, size), contextual)
        weights = torch.cat([one_hot(dominant, size).float(), _merged(keys, targets, others)], dim=1)
        indices, order = torch.cat([dominant, targets], dim=1).sort(dim=1)
        return Selection(indices, weights=take(weights, order))


def _rest(taken: Tensor, size: int) -> Tensor:
    """Raster indices [B, N - K], ascending, of the tokens that are not `taken` [B, K]."""
    free = torch.ones(len(taken), size, device=taken.device).scatter(1, taken, 0.0)
    return highest(free, size - taken.shape[1])


def _strided(rest: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Part `rest` [B, R] into `count` evenly strided tokens and the others, both ascending."""
    is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
    is_target[torch.arange(count, device=rest.device) * (rest.shape[1] // count)] = True
    return rest[:, is_target], rest[:, ~is_target]


def _merged(keys: Tensor, targets: Tensor, others: Tensor) -> Tensor:
    """Weights [B, C, N] of each target: 1 for itself, and shares that sum to 1 for those that come to it."""
    images, size, _ = keys.shape
    count = targets.shape[1]
    nearest = cosines(take(keys, others), take(keys, targets)).argmax(dim=2)
    comes = one_hot(nearest, count).float().transpose(1, 2)  # [B, C, R - C]
    shares = comes / comes.sum(dim=2, keepdim=True).clamp(min=1)
    itself = one_hot(targets, size).float()
    return itself.scatter(2, others.unsqueeze(1).expand(images, count, -1), shares)
