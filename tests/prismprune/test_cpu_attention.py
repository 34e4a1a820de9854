"""Attention in the shapes that torch's kernel is fastest at finds what softmax says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from prismprune import cpu_attention
from prismprune.cpu_attention import LARGE, MIDDLE, PARTS, SHARED_NUMBERS, CpuAttention, looked_at_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

WIDTH, SCALE = 8, 0.4
KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = st.sampled_from(list(ROUNDING))


@pytest.fixture(params=[False, True], ids=["kernel", "products"], autouse=True)
def products(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether products are faster in bfloat16, as on a processor of either kind: both compute everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu_attention, "has_faster_products", lambda dtype: request.param and dtype is torch.bfloat16
        )
        yield request.param


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little is computed in as many parts as much is."""
    monkeypatch.setattr(cpu_attention, "QUERIES", 7)
    monkeypatch.setattr(cpu_attention, "SCORES", 200)
    monkeypatch.setattr(cpu_attention, "LEAST_ROWS", 1)
    monkeypatch.setattr(cpu_attention, "LEAST_SCORES", 1)


def drawn(
    rows: int, shared: int, groups: int, length: int, *, known: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, laid out as products and a cache with room leave them."""
    draw = torch.Generator().manual_seed(length)
    tokens = known + length
    queries = torch.randn(rows, length, shared * groups, WIDTH, generator=draw).transpose(1, 2)
    room = torch.randn(2, rows, shared, tokens + 3, WIDTH, generator=draw)[:, :, :, :tokens]
    keys, values = room.to(dtype)
    return queries.to(dtype), keys, values


def by_definition(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """[B, L, heads * head_dim], in float64."""
    length, tokens, groups = queries.shape[2], keys.shape[2], queries.shape[1] // keys.shape[1]
    if mask is None:
        mask = torch.ones(length, tokens, dtype=torch.bool).tril(tokens - length)
    each = (tensor.double().repeat_interleave(groups, 1) for tensor in (keys, values))
    keys, values = each
    scores = (SCALE * queries.double() @ keys.mT).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)


def found(attention: CpuAttention, *given: Tensor | None) -> Tensor | None:
    queries, keys, values, mask = given
    assert queries is not None
    assert keys is not None
    assert values is not None
    with torch.inference_mode():
        return attention.attended(queries, keys, values, mask, SCALE)


def assert_found(own: Tensor | None, wanted: Tensor, dtype: torch.dtype) -> None:
    if own is not None:
        assert own.dtype is dtype
        torch.testing.assert_close(own.double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    shared=st.integers(1, 3),
    groups=st.integers(1, 5),
    length=st.one_of(st.integers(1, MIDDLE + 9), st.integers(MIDDLE, LARGE + 1)),
    dtype=DTYPES,
)
def test_causal_queries(rows: int, shared: int, groups: int, length: int, dtype: torch.dtype) -> None:
    given_ = drawn(rows, shared, groups, length, dtype=dtype)
    assert_found(found(CpuAttention(), *given_, None), by_definition(*given_, None), dtype)


@settings(max_examples=60, deadline=None)
@given(
    shared=st.integers(1, 3),
    groups=st.integers(1, 7),
    length=st.integers(1, MIDDLE),
    known=st.integers(0, 70),
    paddings=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    dtype=DTYPES,
)
def test_behind_others_and_padding(
    *, shared: int, groups: int, length: int, known: int, paddings: list[int], dtype: torch.dtype
) -> None:
    """A query sees its own token at least, as padding does in transformers' masks."""
    queries, keys, values = drawn(len(paddings), shared, groups, length, known=known, dtype=dtype)
    tokens = known + length
    places = torch.arange(tokens)
    visible = places >= torch.tensor(paddings)[:, None]
    causal = places <= torch.arange(known, tokens)[:, None]
    own = places == torch.arange(known, tokens)[:, None]
    mask = ((visible[:, None] & causal) | own)[:, None]
    assert_found(
        found(CpuAttention(), queries, keys, values, mask), by_definition(queries, keys, values, mask), dtype
    )


@pytest.mark.usefixtures("small_parts")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3),
    shared=st.integers(1, 4),
    groups=st.integers(1, 3),
    length=st.integers(2, 40),
    paddings=st.none() | st.lists(st.integers(0, 20), min_size=3, max_size=3),
)
def test_parts_of_any_size(
    *, rows: int, shared: int, groups: int, length: int, paddings: list[int] | None
) -> None:
    given_ = drawn(rows, shared, groups, length, dtype=torch.bfloat16)
    mask = None
    if paddings is not None:
        places = torch.arange(length)
        visible = places >= torch.tensor(paddings[:rows])[:, None]
        mask = (visible[:, None] & (places <= places[:, None]) | places.eq(places[:, None]))[:, None]
    assert_found(found(CpuAttention(), *given_, mask), by_definition(*given_, mask), torch.bfloat16)


@settings(max_examples=40, deadline=None)
@given(
    views=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(2, 130),
    few=st.booleans(),
    dtype=DTYPES,
)
def test_queries_that_see_every_key(
    *, views: int, heads: int, tokens: int, few: bool, dtype: torch.dtype
) -> None:
    """As a tower's projections leave them."""
    draw = torch.Generator().manual_seed(tokens)
    queries, keys, values = (
        torch.randn(views, tokens, heads, WIDTH, generator=draw).to(dtype).transpose(1, 2) for _ in range(3)
    )
    queries = queries[:, :, : tokens // 2] if few else queries
    everything = torch.ones(queries.shape[2], tokens, dtype=torch.bool)
    with torch.inference_mode():
        own = looked_at_all(queries, keys, values, SCALE)
    assert_found(own, by_definition(queries, keys, values, everything), dtype)


@given(shared=st.integers(1, 3), groups=st.integers(1, 5), known=st.integers(0, 300), dtype=DTYPES)
def test_one_query_sees_all(shared: int, groups: int, known: int, dtype: torch.dtype) -> None:
    given_ = drawn(2, shared, groups, 1, known=known, dtype=dtype)
    own = found(CpuAttention(), *given_, None)
    assert own is not None
    assert_found(own, by_definition(*given_, None), dtype)


def test_one_query_of_heads_that_share_many_keys() -> None:
    """In float32 only these are one head's."""
    given_ = drawn(1, 2, 4, 1, known=SHARED_NUMBERS // WIDTH)
    assert_found(found(CpuAttention(), *given_, None), by_definition(*given_, None), torch.float32)


def test_one_object_serves_prompts_and_masks_of_any_length() -> None:
    attention = CpuAttention()
    for length, groups in ((200, 3), (100, 3), (200, 3), (201, 3), (200, 2)):
        given_ = drawn(1, 2, groups, length)
        assert_found(found(attention, *given_, None), by_definition(*given_, None), torch.float32)
        for first in (0, 50):
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            mask[..., first:, :first] = False
            assert_found(found(attention, *given_, mask), by_definition(*given_, mask), torch.float32)


def calls(*given_: Tensor | None) -> list[tuple[int, ...]]:
    """Shapes of the queries that torch's kernel gets."""
    with profile(record_shapes=True) as seen:
        assert found(CpuAttention(), *given_) is not None
    return [tuple(event.input_shapes[0]) for event in seen.events() if event.name == KERNEL]


def test_a_long_prompt_is_taken_in_parts() -> None:
    """All of one length, of both heads that share keys together."""
    assert calls(*drawn(1, 2, 3, 594), None) == [(1, 2, 3 * 119, WIDTH)] * PARTS


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 80, 80, dtype=torch.bool).tril()])
def test_a_short_prompt_is_taken_once(mask: Tensor | None) -> None:
    assert calls(*drawn(1, 2, 3, 80), mask) == [(1, 2, 240, WIDTH)]


@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_of_16_bits_is_multiplied_where_that_is_faster(masked: bool, products: bool) -> None:
    mask = torch.ones(1, 1, 200, 200, dtype=torch.bool).tril() if masked else None
    given_ = drawn(1, 4, 3, 200, dtype=torch.bfloat16)
    with profile() as seen:
        found(CpuAttention(), *given_, mask)
    names = {event.name for event in seen.events()}
    assert ("aten::bmm" in names) is products
    if products:
        assert KERNEL not in names


@pytest.mark.parametrize(("groups", "rows"), [(1, 2), (3, 3)])
def test_one_query_of_16_bits_is_not_alone(groups: int, rows: int) -> None:
    assert calls(*drawn(1, 2, groups, 1, known=9, dtype=torch.bfloat16), None) == [(1, 2, rows, WIDTH)]


@pytest.mark.parametrize(("groups", "length"), [(1, 300), (3, LARGE), (3, 63)])
def test_what_torch_does_as_fast_is_left_to_it(groups: int, length: int) -> None:
    assert found(CpuAttention(), *drawn(1, 2, groups, length), None) is None


def test_queries_behind_others_are_torchs_without_a_mask() -> None:
    assert found(CpuAttention(), *drawn(1, 2, 3, 80, known=9), None) is None
