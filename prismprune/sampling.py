"""The next token of each row: the likeliest one, or one that is drawn by dice of the row's own.

transformers' warpers sort the whole vocabulary for every token, and `torch.multinomial` draws a number for
each of its entries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from prismprune.generation import GenerationOptions

COLDEST = 1e-5
"""Below this temperature logits overflow, and nothing but the likeliest token is ever drawn: greedy."""
HEAVIEST = 2.0**44
"""What the likeliest token weighs. Weights are whole numbers, whose sums no order of adding changes: a seed
draws the same alone and among others. Those of half a million tokens add up to 63 bits at most."""
LIKELIEST = (1_024, 16_384)
"""Among how many tokens those that make up `top_p` are looked for, before they are looked for among all."""


class Dice:
    """One row's own. temperature: at least `COLDEST`. seed: None for another one each time."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self._generator = torch.Generator()  # on the CPU: the same numbers for every device
        self._generator.manual_seed(self._generator.seed() if seed is None else seed)

    @classmethod
    def of(cls, options: GenerationOptions) -> Dice | None:
        """None where no token is drawn but the likeliest."""
        if options.temperature < COLDEST:
            return None
        return cls(options.temperature, options.top_p, options.seed)

    def roll(self) -> float:
        """Uniform in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def next_tokens(logits: Tensor, dice: Sequence[Dice | None]) -> list[int | None]:
    """By logits [B, vocabulary], of each row; without dice the likeliest.

    None for a row whose logits have no finite maximum, or a NaN among them. Waits for the device once, and
    once more where a row has a `top_p` below 1.
    """
    best, tokens = logits.max(-1)
    for group in _together(dice, logits.device):
        # Not made on the device, which would wait for what is under way there.
        rolled = torch.tensor(
            [(row, own.temperature, own.top_p, own.roll()) for row, own in group], dtype=torch.float64
        )
        rows, temperature, top_p, number = rolled.to(logits.device, non_blocking=True).split(1, dim=-1)
        rows = rows[:, 0].long()
        weights = weights_of(logits[rows], best[rows, None], temperature)
        if group[0][1].top_p < 1:
            weights = likeliest(weights, top_p)
        tokens[rows] = picked(weights, number)
    found = torch.stack([best.double(), tokens.double()])  # exact, and a single copy to the host
    return [
        int(token) if math.isfinite(score) else None for score, token in zip(*found.tolist(), strict=True)
    ]


def _together(dice: Sequence[Dice | None], device: torch.device) -> Iterator[list[tuple[int, Dice]]]:
    """Rows that are drawn at once, and their dice: on a CPU, whose caches hold one, each by itself."""
    drawn = [(row, own) for row, own in enumerate(dice) if own is not None]
    if device.type == "cpu":
        yield from ([one] for one in drawn)
        return
    for group in ([one for one in drawn if one[1].top_p < 1], [one for one in drawn if one[1].top_p == 1]):
        if group:
            yield group


def weights_of(scores: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Whole numbers [n, vocabulary], as softmax of scores / temperature to each other.

    scores: [n, vocabulary]; best: [n, 1], the highest of each row; temperature: [n, 1].
    """
    colder = (scores.float() - best.float()) / temperature.float()
    return (colder.exp_() * HEAVIEST).long()


def likeliest(weights: Tensor, top_p: Tensor) -> Tensor:
    """The weights [n, vocabulary], 0 outside the smallest set whose share of all reaches `top_p` [n, 1].

    Of equal tokens, those of lower ids are in it.
    """
    vocabulary = weights.shape[-1]
    wanted = (top_p * weights.sum(-1, keepdim=True)).ceil().long().clamp(min=1)
    for count in (*LIKELIEST, vocabulary):
        heaviest = weights.topk(min(count, vocabulary)).values
        reached = heaviest.cumsum(-1)
        if count >= vocabulary or bool((reached[:, -1:] >= wanted).all()):
            break
    last = torch.searchsorted(reached, wanted).clamp(max=reached.shape[-1] - 1)
    least = heaviest.gather(-1, last)
    tied = weights == least
    kept_of_tied = last + 1 - (heaviest > least).sum(-1, keepdim=True)
    return weights * ((weights > least) | (tied & (tied.cumsum(-1) <= kept_of_tied)))


def picked(weights: Tensor, number: Tensor) -> Tensor:
    """Ids [n] by weights [n, vocabulary] and numbers [n, 1], uniform in [0, 1).

    Never one that weighs nothing.
    """
    reached = weights.cumsum(-1)
    # Also rounded it is less than all of them weigh, as no number is above 1 - 2**-53.
    point = (number * reached[:, -1:]).long()
    return torch.searchsorted(reached, point, right=True)[:, 0]
