"""Token budgets: what is accepted, what they come to, how they are shared out."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismprune.budget import TokenBudget
from prismprune.errors import InvalidBudgetError
from tests.prismprune import reference

PARTS = st.lists(st.integers(0, 700), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (64, TokenBudget(tokens=64)),
        (np.int64(64), TokenBudget(tokens=64)),
        ("64", TokenBudget(tokens=64)),
        ("all", TokenBudget.all()),
        (None, TokenBudget.all()),
        (TokenBudget(ratio=0.5), TokenBudget(ratio=0.5)),
    ],
)
def test_parse_reads_what_users_write(value: Any, budget: TokenBudget) -> None:
    """A number, its digits, "all", nothing, or a budget that is already one."""
    parsed = TokenBudget.parse(value)
    assert parsed == budget
    assert type(parsed.tokens) in (int, type(None))


def test_parse_reads_a_ratio() -> None:
    """A keep ratio comes in an argument of its own."""
    assert TokenBudget.parse(None, keep_ratio=0.25) == TokenBudget(ratio=0.25)


@pytest.mark.parametrize("ratio", [np.float32(0.25), np.float64(0.25), Fraction(1, 4), np.int64(1)])
def test_parse_reads_any_number_as_a_ratio(ratio: Any) -> None:
    """It is a plain float from then on."""
    parsed = TokenBudget.parse(None, keep_ratio=ratio)
    assert parsed == TokenBudget(ratio=float(ratio))
    assert type(parsed.ratio) is float


@pytest.mark.parametrize(
    "value", [0, -1, "0", "-1", "many", "", "6.4", " 64", "٣", 64.0, True, [64], "9" * 5000]
)
def test_parse_refuses_what_is_no_budget(value: Any) -> None:
    """Anything that is neither a whole number of at least 1 nor "all"."""
    with pytest.raises(InvalidBudgetError, match="whole number of at least 1"):
        TokenBudget.parse(value)


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), "0.5", True, np.bool_(1)])
def test_parse_refuses_a_ratio_out_of_range(ratio: Any) -> None:
    """A ratio lies above 0 and at most at 1."""
    with pytest.raises(InvalidBudgetError, match="above 0 and at most 1"):
        TokenBudget.parse(None, keep_ratio=ratio)


@pytest.mark.parametrize("value", [64, "all", TokenBudget.all()])
def test_parse_refuses_both(value: Any) -> None:
    """A budget and a ratio exclude each other."""
    with pytest.raises(InvalidBudgetError, match="not both"):
        TokenBudget.parse(value, keep_ratio=0.5)


def test_a_budget_holds_one_of_the_two() -> None:
    """The dataclass itself cannot hold both."""
    with pytest.raises(InvalidBudgetError, match="not both"):
        TokenBudget(tokens=3, ratio=0.5)


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (TokenBudget.all(), 576),
        (TokenBudget(tokens=64), 64),
        (TokenBudget(tokens=10**9), 576),
        (TokenBudget(ratio=1.0), 576),
        (TokenBudget(ratio=1 / 9), 64),
        (TokenBudget(ratio=1e-9), 1),
    ],
)
def test_resolve(budget: TokenBudget, kept: int) -> None:
    """Never more than there are; a ratio is floored and keeps at least one."""
    assert budget.resolve(576) == kept


def test_resolve_takes_a_decimal_ratio_at_its_word() -> None:
    """0.29 of 100 is 29, although 0.29 * 100 is 28.999... in binary."""
    assert TokenBudget(ratio=0.29).resolve(100) == 29


def test_nothing_resolves_to_nothing() -> None:
    """Without candidates no budget keeps any."""
    assert [
        budget.resolve(0) for budget in (TokenBudget(ratio=0.5), TokenBudget(tokens=4), TokenBudget())
    ] == [0] * 3


def test_only_the_empty_budget_is_all() -> None:
    """`is_all` says that no budget was given."""
    assert [b.is_all for b in (TokenBudget(), TokenBudget(tokens=1), TokenBudget(ratio=1.0))] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("tokens", "candidates", "shares"),
    [
        (640, [576] * 5, [128] * 5),
        (10, [576] * 4, [3, 3, 2, 2]),
        (2, [576] * 4, [1, 1, 0, 0]),
        (7, [100, 0, 300], [2, 0, 5]),
        (5000, [576, 144], [576, 144]),
        (719, [576, 144], [575, 144]),
    ],
)
def test_split(tokens: int, candidates: list[int], shares: list[int]) -> None:
    """In proportion, the largest remainders first, ties to the earlier part, zero allowed."""
    assert TokenBudget(tokens=tokens).split(candidates) == shares


def test_split_of_nothing() -> None:
    """No parts, or parts without candidates, get nothing."""
    assert TokenBudget(tokens=5).split([]) == []
    assert TokenBudget(tokens=5).split([0, 0]) == [0, 0]


@given(PARTS, st.integers(1, 9000))
def test_split_is_exact_and_fits(candidates: list[int], tokens: int) -> None:
    """Every token of the budget that can be used is used, and no part gets more than it has."""
    shares = TokenBudget(tokens=tokens).split(candidates)
    assert sum(shares) == min(tokens, sum(candidates))
    assert all(0 <= share <= part for share, part in zip(shares, candidates, strict=True))


@given(PARTS.filter(any), st.integers(1, 9000))
def test_split_matches_the_reference(candidates: list[int], tokens: int) -> None:
    """Largest remainder, computed a second time with fractions."""
    kept = min(tokens, sum(candidates))
    assert TokenBudget(tokens=tokens).split(candidates) == reference.split(kept, candidates)


@given(PARTS, st.floats(0.001, 1.0))
def test_split_of_a_ratio_is_the_ratio_of_the_whole(candidates: list[int], ratio: float) -> None:
    """A ratio is taken of all candidates together, then split."""
    budget = TokenBudget(ratio=ratio)
    assert sum(budget.split(candidates)) == budget.resolve(sum(candidates))
