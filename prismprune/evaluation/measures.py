"""What a comparison counts: right answers with their interval, and how kept tokens lie among the others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prismprune.selection.base import cosines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor

Z_95 = 1.959963984540054
"""Half of the central 95 % of a normal distribution, in standard deviations."""

LEAST_PICTURES = 10
"""Of fewer the spread is not known well enough for an interval: two that agree by chance would have none."""


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share, by Wilson's score (1927): inside 0 to 1 and of use at the ends too.

    It takes answers as independent. Those about one picture are not quite, so it is a little narrow.
    """
    if asked == 0:
        return 0.0, 1.0
    share, z2 = right / asked, Z_95**2
    center = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z_95 / (1 + z2 / asked) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked**2))
    return (center - half if right else 0.0), (center + half if right < asked else 1.0)


def paired_difference(
    right: Sequence[int], reference: Sequence[int], asked: Sequence[int]
) -> tuple[float, float, float]:
    """How much more often one of two is right about the same questions, and its 95 % interval.

    right, reference, asked: numbers a picture. Questions about one picture are right or wrong together, so
    pictures are what varies: the difference is a ratio of sums over clusters, with that ratio's variance
    (Cochran, Sampling Techniques, 1977, section 2.11).
    The interval is all there can be, -1 to 1, for fewer than `LEAST_PICTURES`, and where nothing was asked.
    """
    pictures, questions = len(asked), sum(asked)
    gained = [one - other for one, other in zip(right, reference, strict=True)]
    difference = sum(gained) / questions if questions else 0.0
    if pictures < LEAST_PICTURES or not questions:
        return difference, -1.0, 1.0
    squares = sum((more - difference * count) ** 2 for more, count in zip(gained, asked, strict=True))
    half = Z_95 * math.sqrt(pictures / (pictures - 1) * squares) / questions
    return difference, max(-1.0, difference - half), min(1.0, difference + half)


def overlap(kept: AbstractSet[tuple[int, int]], reference: AbstractSet[tuple[int, int]]) -> float:
    """Share of the kept tokens that the reference keeps as well; 1 where nothing is kept."""
    return len(kept & reference) / len(kept) if kept else 1.0


def nearest_cosines(features: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
    """Cosine of each dropped patch to its nearest kept one: [D], float32; 0 where none is kept.

    features: [N, d] of one image, crop or frame; kept [K] and dropped [D]: indices of its patches.
    """
    if len(kept) == 0:
        return features.new_zeros(len(dropped)).float()
    nearest: Tensor = cosines(features[None, dropped], features[None, kept])[0].amax(dim=1)
    return nearest
