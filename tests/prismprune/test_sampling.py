"""Drawing tokens: what transformers' warpers leave, as often as they say, and the same in any batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from prismprune import sampling
from prismprune.sampling import Dice, likeliest, next_tokens, picked, weights_of

if TYPE_CHECKING:
    from torch import Tensor

SCORES = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)
TEMPERATURES = st.floats(0.1, 3)
TOP_PS = st.floats(0.01, 0.99)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def weights(scores: list[float], temperature: float = 1.0) -> Tensor:
    row = torch.tensor([scores])
    return weights_of(row, row.amax(-1, keepdim=True), column(temperature))


def shares(weights: Tensor) -> Tensor:
    return weights.double() / weights.sum()


@given(SCORES, TEMPERATURES)
def test_tokens_weigh_what_softmax_says(scores: list[float], temperature: float) -> None:
    """Of the scores over the temperature."""
    no_history: Any = None
    warped = TemperatureLogitsWarper(temperature)(no_history, torch.tensor([scores]).double())
    assert torch.allclose(shares(weights(scores, temperature)), warped.softmax(-1), rtol=1e-4, atol=1e-11)


@given(SCORES, TOP_PS)
def test_what_stays_for_top_p_is_what_stays_for_transformers(scores: list[float], top_p: float) -> None:
    """With the probabilities that it gives them. Which of equal tokens stay is another matter."""
    no_history: Any = None
    row = torch.tensor([scores]).double()
    reached = row.softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(float((reached - top_p).abs().min()) > 1e-6)  # else rounding decides
    kept = shares(likeliest(weights(scores), column(top_p))).sort().values
    expected = TopPLogitsWarper(top_p)(no_history, row).softmax(-1).sort().values
    assert int(kept.count_nonzero()) == int(expected.count_nonzero())
    assert torch.allclose(kept, expected, rtol=1e-4)


@given(st.integers(1, 20), st.integers(1, 19))
def test_of_equal_tokens_the_first_stay(tokens: int, twentieths: int) -> None:
    """As many as make up `top_p`, at least one."""
    kept = likeliest(weights([2.5] * tokens), column(twentieths / 20))[0] > 0
    count = max(1, math.ceil(tokens * twentieths / 20 - 1e-9))
    assert kept.tolist() == [place < count for place in range(tokens)]


@given(st.lists(SCORES.map(lambda scores: (scores * 40)[:40]), min_size=1, max_size=4), st.data())
def test_where_the_likeliest_are_looked_for_changes_nothing(rows: list[list[float]], data: Any) -> None:
    """Among a few, more or all, whatever is needed; of several rows as of each."""
    top_ps = data.draw(st.lists(TOP_PS, min_size=len(rows), max_size=len(rows)))
    together = torch.cat([weights(row) for row in rows])
    expected = torch.cat(
        [likeliest(weights(row), column(own)) for row, own in zip(rows, top_ps, strict=True)]
    )
    with patch.object(sampling, "LIKELIEST", (1, 4)):
        assert torch.equal(likeliest(together, column(*top_ps)), expected)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
def test_a_token_is_picked_as_often_as_it_weighs(own: list[int]) -> None:
    """Of numbers at equal distances; one that weighs nothing never."""
    whole = sum(own)
    numbers = column(*((place + 0.5) / whole for place in range(whole)))
    found = picked(torch.tensor(own).expand(whole, -1).contiguous(), numbers).tolist()
    assert [found.count(token) for token in range(len(own))] == own


@example([2**57 + 49, 0])
@example([2**57 - 1, 0])
@given(st.lists(st.integers(0, 2**57) | st.just(0), min_size=1, max_size=30).filter(any))
def test_the_highest_number_picks_the_last_token_that_weighs_something(own: list[int]) -> None:
    """However much all weigh, also where the product is rounded."""
    token = int(picked(torch.tensor([own]), column(math.nextafter(1.0, 0.0))))
    assert own[token] > 0
    assert sum(own[token + 1 :]) <= sum(own) * 2**-52


def test_a_token_that_is_ruled_out_is_never_drawn() -> None:
    """Minus infinity, as constraints write it."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    dice = Dice(1.0, 1.0, 3)
    assert {next_tokens(logits, [dice])[0] for _ in range(60)} == {1, 3}


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tokens_are_drawn_as_often_as_is_likely(seed: int, top_p: float) -> None:
    """Four thousand draws by fixed seeds, by chi-square: of seven tokens, one in 10,000 exceeds it."""
    logits = torch.tensor([[1.0, 0.2, -0.5, 2.0, 1.5, -1.0, 0.0]])
    no_history: Any = None
    warped = TemperatureLogitsWarper(0.8)(no_history, logits)
    expected = TopPLogitsWarper(top_p)(no_history, warped).softmax(-1)[0] * 4000
    dice = Dice(0.8, top_p, seed)
    found = torch.bincount(torch.tensor([next_tokens(logits, [dice])[0] for _ in range(4000)]), minlength=7)
    assert not found[expected == 0].any()
    possible = expected > 0
    assert float(((found - expected)[possible] ** 2 / expected[possible]).sum()) < 27.9


@settings(max_examples=40)
@given(st.lists(SCORES.map(lambda scores: (scores * 40)[:40]), min_size=1, max_size=5), st.data())
def test_a_seed_draws_the_same_in_every_batch(rows: list[list[float]], data: Any) -> None:
    """Alone, among others, and among those that CUDA draws at once."""
    kinds = st.tuples(st.sampled_from([0.7, 1.0, 2.0]), st.sampled_from([0.3, 0.9, 1.0]), st.integers(0, 9))
    kept = data.draw(st.lists(st.none() | kinds, min_size=len(rows), max_size=len(rows)))

    def made() -> list[Dice | None]:
        return [None if one is None else Dice(*one) for one in kept]

    logits = torch.tensor(rows)
    alone = [next_tokens(logits[row : row + 1], [own])[0] for row, own in enumerate(made())]
    assert next_tokens(logits, made()) == alone
    with patch.object(sampling, "_together", lambda dice, _: together(dice, torch.device("cuda"))):
        assert next_tokens(logits, made()) == alone


together = sampling._together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_dice_the_likeliest_is_taken(dtype: torch.dtype) -> None:
    """The first of several, in any precision."""
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]], dtype=dtype)
    assert next_tokens(logits, [None, None]) == [1, 0]


def test_every_id_of_a_large_vocabulary_comes_back_as_it_is() -> None:
    """Beside its score, of 16 bits as well."""
    logits = torch.zeros(2, 300_001, dtype=torch.bfloat16)
    logits[0, 300_000], logits[1, 65_537] = 1, 1
    assert next_tokens(logits, [None, Dice(1e-3, 0.5, 0)]) == [300_000, 65_537]


@pytest.mark.parametrize("dice", [None, Dice(1.0, 1.0, 0), Dice(1.0, 0.5, 0)])
@pytest.mark.parametrize("scores", [[math.nan] * 3, [0, math.nan, 5], [0, math.inf, 5], [-math.inf] * 3])
def test_scores_without_a_finite_maximum_choose_nothing(scores: list[float], dice: Dice | None) -> None:
    """And leave the other rows alone."""
    logits = torch.tensor([scores, [0.0, 9.0, 0.0]])
    assert next_tokens(logits, [dice, None]) == [None, 1]
