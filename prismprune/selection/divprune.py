"""DivPrune (arXiv 2503.02175, CVPR 2025): the K tokens that lie farthest apart, without a look at attention.

As there: the max-min diversity problem over 1 - cosine of the embeddings that the language model gets, solved
greedily; the first token is the one farthest from its nearest neighbor, each next one the one farthest from
its nearest picked one. That is `fps` on other features and with another start.

Not done: newline tokens are no candidates (in LLaVA-NeXT the authors' code counts them in), and tokens keep
raster order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from prismprune.selection.base import Scores, Selection, Selector
from prismprune.selection.fps import Fps


@dataclass(frozen=True, slots=True)
class DivPrune(Selector):
    """Max-min distance over all tokens, on their projected features."""

    name: ClassVar[str] = "divprune"
    needs_projected: ClassVar[bool] = True

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`. All kept tokens are diverse ones."""
        return Fps(fps_start="most_isolated")(replace(scores, features=scores.embeddings), k)
