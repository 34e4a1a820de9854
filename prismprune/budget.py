"""How many visual tokens may stay, and how that is shared out over images, crops or frames."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismprune.errors import InvalidBudgetError
from prismprune.kinds import is_number, is_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL = "all"
ROUNDING = 1e-9
"""Added before a floor, so that 0.29 * 100 (28.999...) counts as the 29 it means."""


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Visual tokens of one request: a number, a share of its candidates, or (neither) all of them.

    Raises `InvalidBudgetError` for fewer than 1 token, a ratio outside (0, 1], or both at once.
    """

    tokens: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.ratio is not None:
            raise InvalidBudgetError("Give a token budget or a keep ratio, not both.")
        if self.tokens is not None:
            if not (is_whole(self.tokens) and self.tokens >= 1):
                raise InvalidBudgetError(f'A token budget is a whole number of at least 1, or "{ALL}".')
            object.__setattr__(self, "tokens", int(self.tokens))  # numpy's are whole numbers, too
        if self.ratio is not None:
            if not (is_number(self.ratio) and 0 < self.ratio <= 1):
                raise InvalidBudgetError("A keep ratio is a number above 0 and at most 1.")
            object.__setattr__(self, "ratio", float(self.ratio))

    @classmethod
    def all(cls) -> TokenBudget:
        """Every candidate stays."""
        return cls()

    @classmethod
    def parse(cls, value: int | str | TokenBudget | None, *, keep_ratio: float | None = None) -> TokenBudget:
        """Read what users write: `64`, `"64"`, `"all"`, None (all), or a ratio in its own argument.

        Raises `InvalidBudgetError` for anything else, and for a budget together with a ratio.
        """
        if value is not None and keep_ratio is not None:
            raise InvalidBudgetError("Give a token budget or a keep ratio, not both.")
        return value if isinstance(value, TokenBudget) else cls(tokens=_tokens(value), ratio=keep_ratio)

    @property
    def is_all(self) -> bool:
        return self.tokens is None and self.ratio is None

    def resolve(self, candidates: int) -> int:
        """Tokens that stay of `candidates`: never more than there are, and of a ratio at least one."""
        if self.ratio is not None:
            return min(candidates, max(1, math.floor(self.ratio * candidates + ROUNDING)))
        return candidates if self.tokens is None else min(self.tokens, candidates)

    def split(self, candidates: Sequence[int]) -> list[int]:
        """Share the budget over parts in proportion to their candidates, by largest remainder.

        Ties go to the earlier part; a part may get zero and never gets more than it has; the sum is
        exactly `resolve(sum(candidates))`. All in whole numbers.
        """
        total = sum(candidates)
        kept = self.resolve(total)
        if kept == 0:
            return [0] * len(candidates)
        shares = [kept * part // total for part in candidates]
        remainders = [kept * part % total for part in candidates]
        # `sorted` is stable: equal remainders stay in the order of the parts. Only parts with a remainder are
        # reached, and those have a candidate to spare.
        for part in sorted(range(len(shares)), key=lambda i: -remainders[i])[: kept - sum(shares)]:
            shares[part] += 1
        return shares


def _tokens(value: int | str | None) -> int | None:
    if not isinstance(value, str):
        return value
    if value == ALL:
        return None
    if value.isascii() and value.isdigit():
        with suppress(ValueError):  # more digits than Python reads
            return int(value)
    raise InvalidBudgetError(f'A token budget is a whole number of at least 1, or "{ALL}".')
