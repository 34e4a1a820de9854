"""Linear layers in slices give what plain ones give."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import profile

from prismprune import PrunedVLM
from prismprune.few_rows import LEAST_OUTPUTS, MOST_ROWS, FewRowsLinear, use_all_cores_for_few_rows
from tests.prismprune.tiny import picture, save_tiny_llava

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def layers(inputs: int, outputs: int, *, bias: bool) -> tuple[nn.Linear, nn.Module]:
    """A plain layer and the same one in slices."""
    plain = nn.Linear(inputs, outputs, bias=bias)
    model = nn.Sequential(copy.deepcopy(plain))
    use_all_cores_for_few_rows(model)
    return plain, model[0]


def operations(layer: nn.Module, values: torch.Tensor) -> set[str]:
    with torch.inference_mode(), profile() as seen:
        layer(values)
    return {event.key for event in seen.key_averages()}


@given(
    shape=st.lists(st.integers(0, 15), max_size=2).map(tuple),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 300),
    bias=st.booleans(),
)
def test_any_shape_gives_what_a_plain_layer_gives(
    shape: tuple[int, ...], inputs: int, outputs: int, *, bias: bool
) -> None:
    plain, sliced = layers(inputs, outputs, bias=bias)
    values = torch.randn(*shape, inputs)
    torch.testing.assert_close(sliced(values), plain(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_weights_in_any_order_of_memory(bias: bool) -> None:
    plain, sliced = layers(24, 128, bias=bias)
    turned = nn.Parameter(plain.weight.detach().t().contiguous().t())
    plain.weight = turned
    sliced.weight = turned
    values = torch.randn(24, 5, 3).permute(1, 2, 0)
    torch.testing.assert_close(sliced(values), plain(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "outputs", "threads", "in_slices"),
    [
        (1, 4 * LEAST_OUTPUTS, 2, True),
        (MOST_ROWS, 4 * LEAST_OUTPUTS, 2, True),
        (MOST_ROWS + 1, 4 * LEAST_OUTPUTS, 2, False),
        (1, 2 * LEAST_OUTPUTS - 1, 2, False),
        (1, 4 * LEAST_OUTPUTS, 1, False),
    ],
)
def test_slices_are_for_few_rows_wide_layers_and_several_threads(
    rows: int,
    outputs: int,
    threads: int,
    in_slices: bool,
) -> None:
    torch.set_num_threads(threads)
    _, layer = layers(16, outputs, bias=False)
    assert ("aten::bmm" in operations(layer, torch.randn(rows, 16))) is in_slices


def test_other_number_formats_and_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    _, sliced = layers(16, 128, bias=False)
    model = nn.Sequential(Own(16, 128))
    use_all_cores_for_few_rows(model)
    assert type(model[0]) is Own
    half = sliced.to(torch.bfloat16)
    assert "aten::bmm" not in operations(half, torch.randn(2, 16, dtype=torch.bfloat16))


def test_gradients_are_those_of_a_plain_layer() -> None:
    plain, sliced = layers(16, 128, bias=True)
    values = torch.randn(3, 16)
    for layer in (plain, sliced):
        layer(values).square().sum().backward()
    for own, other in zip(plain.parameters(), sliced.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-4, atol=1e-4)


def test_a_loaded_model_uses_them_and_saves_like_any_other(tmp_path: Path) -> None:
    path = save_tiny_llava(tmp_path / "tiny")
    vlm = PrunedVLM.from_pretrained(path)
    assert isinstance(vlm.model.lm_head, FewRowsLinear)
    vlm.model.save_pretrained(tmp_path / "again")
    vlm.processor.save_pretrained(tmp_path / "again")
    again = PrunedVLM.from_pretrained(tmp_path / "again")
    first, second = (one.answer(picture(), "What is it?", 6, max_new_tokens=4) for one in (vlm, again))
    assert first.token_ids == second.token_ids
