"""The most attended tokens: FasterVLM (arXiv 2412.01818, first version), and PrismPrune's salient half alone.

As there: attention of the CLS query in the block whose output is used, averaged over heads, and the top K.
For towers without CLS it is what each patch receives on average. Not done: nothing is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prismprune.selection.base import Scores, Selection, Selector, head_mean, highest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Saliency(Selector):
    """The tokens with the highest mean attention over heads."""

    name: ClassVar[str] = "saliency"
    looks_at_few: ClassVar[bool] = True

    def looks_at(self, attention: Tensor, k: int) -> Tensor:
        """See `Selector`: what it keeps."""
        return highest(head_mean(attention), k)

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`. All kept tokens are salient ones."""
        indices = self.looks_at(scores.attention, k)
        return Selection(indices, salient=indices, diverse=indices[:, :0])
