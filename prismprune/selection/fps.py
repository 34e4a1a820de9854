"""Farthest point sampling (FPS) by cosine distance, and FPS over all tokens as a method of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch

from prismprune.selection.base import Scores, Selection, Selector, check_choice, cosines, head_variance

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

log = logging.getLogger(__name__)

FpsStart = Literal["max_variance", "farthest_from_salient", "most_isolated"]
FPS_STARTS: tuple[FpsStart, ...] = get_args(FpsStart)


@dataclass(frozen=True, slots=True)
class Fps(Selector):
    """FPS over every token; attention has a say in the first one only (`fps_start`, see `farthest_points`).

    Raises `InvalidOptionError` for an unknown start.
    """

    fps_start: FpsStart = "max_variance"
    name: ClassVar[str] = "fps"

    def __post_init__(self) -> None:
        check_choice("fps_start", self.fps_start, FPS_STARTS)

    def __call__(self, scores: Scores, k: int) -> Selection:
        """See `Selector`. All kept tokens are diverse ones."""
        k = min(k, scores.candidates)
        variance = head_variance(scores.attention)
        indices = farthest_points(scores.features, k, variance=variance, start=self.fps_start)
        return Selection(indices, salient=indices[:, :0], diverse=indices)


def farthest_points(
    features: Tensor, k: int, *, variance: Tensor, start: FpsStart, salient: Tensor | None = None
) -> Tensor:
    """Indices [B, k], ascending, of `k` of the M tokens of `features` [B, M, d].

    Each next token is the one farthest from its nearest picked one; distance is 1 - cosine, ties go to the
    lower index. The first is, by `start`:
    max_variance: the highest of `variance` [B, M];
    farthest_from_salient: the one farthest from its nearest in `salient` [B, S, d] (none: max_variance);
    most_isolated: the one farthest from its nearest neighbor.
    Later steps measure to the picked ones only. No step waits for the device.
    """
    images, size, _ = features.shape
    if k in (0, size):
        return torch.arange(k, device=features.device).expand(images, k)
    # Subtracted in float32, on whose even grid near 1 the noise around equal and around orthogonal vanishes.
    distance = 1 - cosines(features, features)  # [B, M, M]
    to_itself = distance.diagonal(dim1=1, dim2=2)
    if start == "most_isolated":
        to_itself.fill_(torch.inf)
        first = distance.amin(dim=2).argmax(dim=1)
    elif start == "farthest_from_salient" and salient is not None and salient.shape[1] > 0:
        first = (1 - cosines(features, salient)).amin(dim=2).argmax(dim=1)
    else:
        first = variance.argmax(dim=1)  # of equal values the first, as torch documents
    to_itself.fill_(-torch.inf)
    spread = one_kernel() if distance.is_cuda else None
    picks = step_by_step(distance, first, k) if spread is None else spread(distance, first, k)
    return picks.sort(dim=1).values


def step_by_step(distance: Tensor, first: Tensor, k: int) -> Tensor:
    """Picks [B, k] of FPS, in their order, from the `first` [B] on, for all images at once.

    distance: [B, M, M], M more than `k`; -inf on its diagonal, by which what is picked is barred.
    """
    images, size, _ = distance.shape
    rows = distance.reshape(images * size, size)
    first_row = torch.arange(images, device=first.device) * size
    picks = [first]
    nearest = rows[first_row + first]  # [B, M]: each token's distance to its nearest picked one
    for _ in range(k - 1):
        picks.append(nearest.argmax(dim=1))
        nearest = torch.minimum(nearest, rows[first_row + picks[-1]])
    return torch.stack(picks, dim=1)


@cache
def one_kernel() -> Callable[[Tensor, Tensor, int], Tensor] | None:
    """`step_by_step` for CUDA, where its steps take as long as launching them; None where it cannot be built.

    Triton, which torch brings along, compiles with the C compiler of the machine, and not every one has it.
    """
    try:
        from prismprune.selection.fps_kernel import spread  # noqa: PLC0415 (torch for CPUs has no Triton)

        distance = torch.zeros(1, 2, 2, device="cuda")
        spread(distance, distance.new_zeros(1, dtype=torch.long), 1)
    except Exception as error:  # noqa: BLE001 (whatever a compiler may say, the steps remain)
        log.warning("FPS takes its steps one by one, since its kernel cannot be built: %s", error)
        return None
    return spread
