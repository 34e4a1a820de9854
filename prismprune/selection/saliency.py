"""The most attended tokens: the salient half of PrismPrune alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prismprune.selection.base import Scores, Selection, head_mean, highest


@dataclass(frozen=True, slots=True)
class Saliency:
    """The tokens with the highest mean attention over heads."""

    name: ClassVar[str] = "saliency"

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`. All kept tokens are salient ones."""
        indices = highest(head_mean(scores.attention), k)
        return Selection(indices, salient=indices, diverse=indices[:, :0])
