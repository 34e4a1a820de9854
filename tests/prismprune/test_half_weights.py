"""Weights held in 16 bits where not one of them is changed by it, and what they give."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prismprune.half_weights import HalfWeight, available

pytestmark = pytest.mark.skipif(not available(), reason="FBGEMM multiplies on x86 CPUs alone")

IN_16_BITS = {
    "float16": lambda weight: weight.half().float(),
    "bfloat16": lambda weight: weight.bfloat16().float(),
}


def held(weight: torch.Tensor) -> HalfWeight:
    half = HalfWeight.of(weight)
    assert half is not None
    return half


def exact(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In float64."""
    product = values.double() @ weight.double().T
    return product if bias is None else product + bias


@given(
    shape=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 300),
    spread=st.integers(-20, 6),
    published=st.sampled_from(sorted(IN_16_BITS)),
    bias=st.booleans(),
)
def test_the_product_is_float32s(
    shape: tuple[int, ...], inputs: int, outputs: int, spread: int, published: str, *, bias: bool
) -> None:
    """Whatever a checkpoint's 16 bits hold, and however small it is."""
    weight = IN_16_BITS[published](torch.randn(outputs, inputs) * 2.0**spread)
    added = torch.randn(outputs) if bias else None
    half = HalfWeight.of(weight)
    if half is None:  # bfloat16 tells numbers apart that are farther from each other than float16's range
        assert published == "bfloat16"
        assert weight.abs().max() / weight[weight != 0].abs().min() > 2**30
        return
    values = torch.randn(*shape, inputs)
    limit = 1e-6 * (values.double().abs() @ weight.double().abs().T) + 1e-6 * (
        0 if added is None else added.abs()
    )
    assert ((half.product(values, added) - exact(values, weight, added)).abs() <= limit).all()


def test_no_weight_is_changed() -> None:
    """A row of the identity gives a column of the weight, bit for bit."""
    weight = (torch.randn(48, 64) * 0.02).bfloat16().float()
    assert torch.equal(held(weight).product(torch.eye(64), None).T, weight)


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_a_row_does_not_depend_on_its_neighbors(rows: int) -> None:
    product = partial(held(torch.randn(300, 64).half().float()).product, bias=None)
    values = torch.randn(16, 64)
    assert torch.equal(product(values[:rows]), product(values)[:rows])


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.full((4, 4), 1 + 2.0**-20), id="more bits than 16"),
        pytest.param(torch.tensor([[1.0, 2.0**-40]]), id="farther apart than its exponents"),
        pytest.param(torch.tensor([[float("inf"), 1.0]]), id="infinite"),
        pytest.param(torch.tensor([[float("nan"), 1.0]]), id="no number"),
        pytest.param(torch.empty(0, 4), id="empty"),
    ],
)
def test_what_16_bits_do_not_hold(weight: torch.Tensor) -> None:
    assert HalfWeight.of(weight) is None


def test_zeros() -> None:
    assert not held(torch.zeros(4, 4)).product(torch.randn(2, 4), None).any()


@pytest.mark.parametrize("power", [2.0**40, 2.0**120, 2.0**-60, 2.0**-126])
def test_weights_of_any_size_are_brought_near_to_one(power: float) -> None:
    weight = torch.tensor([[3.0, -0.25]]) * power
    assert torch.equal(held(weight).product(torch.eye(2), None), weight.T)


def test_values_and_sums_of_bfloat16() -> None:
    weight, bias = (torch.randn(size).bfloat16() for size in ((32, 64), (32,)))
    values = torch.randn(3, 64).bfloat16()
    product = held(weight).product(values, bias)
    assert product.dtype is torch.bfloat16
    wanted = exact(values, weight, bias.double())
    torch.testing.assert_close(product.double(), wanted, rtol=2**-8, atol=1e-6)


class Heard(torch.Tensor):
    """Numbers that note what torch would hand them to."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls.seen.append(func)
        parent: Any = super()
        return parent.__torch_function__(func, types, args, kwargs)


def test_torch_asks_no_argument_of_the_product_whether_it_would_rather_compute_it() -> None:
    """The packed weight's answer is an exception of C++, which takes longer than a small product."""
    values = torch.randn(2, 8).as_subclass(Heard)
    held(torch.ones(3, 8)).product(values, None)
    assert Heard.seen
    assert torch.ops.quantized.linear_dynamic_fp16.default not in Heard.seen
