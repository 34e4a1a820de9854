"""Linear layers that multiply as a CPU does it best give what plain ones give, whatever copies they have."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.profiler import profile

from prismprune import PrunedVLM, cpu_products
from prismprune.cpu_layers import use_cpu_products
from prismprune.cpu_products import FEW_ROWS, MKL_ROWS, CpuLinear, available, formats
from tests.prismprune.tiny import picture, save_tiny_llava

if TYPE_CHECKING:
    from pathlib import Path

EVERYTHING = 2**40
ONEDNN, FBGEMM = "mkldnn::_linear_pointwise", "quantized::linear_dynamic_fp16"
pytestmark = pytest.mark.skipif(not available(), reason="oneDNN's products are used on x86 CPUs alone")


@pytest.fixture(autouse=True)
def _as_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this CPU is; the other kind has a test of its own."""
    monkeypatch.setattr(cpu_products, "mkl_is_fast", lambda: False)


def layers(inputs: int, outputs: int, *, bias: bool, packed: bool) -> tuple[nn.Linear, nn.Linear]:
    """A plain layer and one that multiplies with oneDNN, of the same weights."""
    plain = nn.Linear(inputs, outputs, bias=bias)
    model = nn.Sequential(copy.deepcopy(plain))
    use_cpu_products(model, EVERYTHING if packed else 0)
    layer = model[0]
    assert isinstance(layer, CpuLinear)
    return plain, layer


def packed(layer: Any) -> bool:
    """Whether it has a copy in oneDNN's order."""
    return layer.copies is not None and layer.copies.packed is not None


def halved(layer: Any) -> bool:
    """Whether it has a copy in 16 bits."""
    return layer.copies is not None and layer.copies.half is not None


def assert_same(layer: nn.Module, plain: nn.Module, values: torch.Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(layer(values), plain(values), rtol=1e-4, atol=1e-5)


def operations(layer: nn.Module, values: torch.Tensor) -> set[str]:
    with profile() as seen:
        layer(values)
    return {event.key for event in seen.key_averages()}


@given(
    shape=st.lists(st.integers(0, 15), max_size=2).map(tuple),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 300),
    bias=st.booleans(),
    packed=st.booleans(),
)
def test_any_shape_gives_what_a_plain_layer_gives(
    shape: tuple[int, ...], inputs: int, outputs: int, *, bias: bool, packed: bool
) -> None:
    plain, layer = layers(inputs, outputs, bias=bias, packed=packed)
    assert_same(layer, plain, torch.randn(*shape, inputs))


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_weights_in_any_order_of_memory(packed: bool) -> None:
    plain, layer = layers(24, 128, bias=True, packed=packed)
    plain.weight = layer.weight = nn.Parameter(plain.weight.detach().t().contiguous().t())
    assert_same(layer, plain, torch.randn(24, 5, 3).permute(1, 2, 0))
    assert_same(layer, plain, torch.randn(7, 48)[:, ::2])


@pytest.mark.parametrize("packed", [False, True])
def test_the_product_is_onednns_where_no_gradient_is_wanted(packed: bool) -> None:
    _, layer = layers(16, 128, bias=False, packed=packed)
    with torch.inference_mode():
        assert ONEDNN in operations(layer, torch.randn(2, 16))
    with torch.no_grad():
        assert ONEDNN in operations(layer, torch.randn(2, 16))
    assert ONEDNN not in operations(layer, torch.randn(2, 16))


def test_weights_that_change_are_packed_again() -> None:
    plain, layer = layers(16, 128, bias=True, packed=True)
    values = torch.randn(3, 16)
    assert_same(layer, plain, values)
    with torch.no_grad():
        for each in (plain, layer):
            each.weight.mul_(2)
    assert_same(layer, plain, values)
    state = nn.Linear(16, 128).state_dict()
    for each in (plain, layer):
        each.load_state_dict(state)
    assert_same(layer, plain, values)
    plain.weight = layer.weight = nn.Parameter(torch.randn(128, 16))
    assert_same(layer, plain, values)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_is_computed_of_another_has_no_copy(name: str, bias: bool) -> None:
    """As long as it is: torch's pruning leaves the very same tensor there, under another name."""
    if name == "bias" and not bias:
        pytest.skip("there is none")
    plain, layer = layers(16, 128, bias=bias, packed=True)
    values = torch.randn(3, 16)
    for each in (plain, layer):
        prune.l1_unstructured(each, name, 0.7)
    assert_same(layer, plain, values)
    for each in (plain, layer):
        prune.remove(each, name)
    assert_same(layer, plain, values)
    copies: Any = layer.copies
    with torch.inference_mode():
        assert copies.product(values) is not None


def test_a_weight_at_the_address_of_one_before_is_another() -> None:
    """Freed memory is given out again, and a new tensor's changes are counted from 0."""
    plain, layer = layers(16, 128, bias=False, packed=True)
    values, memory = torch.randn(3, 16), torch.randn(128, 16)
    layer.weight = nn.Parameter(memory.view(128, 16), requires_grad=False)
    plain.weight = nn.Parameter(memory.clone(), requires_grad=False)
    assert_same(layer, plain, values)
    for each in (plain, layer):
        each.weight.data.neg_()  # of which torch knows nothing
    layer.weight = nn.Parameter(memory.view(128, 16), requires_grad=False)
    assert_same(layer, plain, values)


def test_under_autocast_it_is_a_plain_layer() -> None:
    """Of its format, bit for bit, whatever copies it has."""
    plain = in_16_bits(64, 128)
    values = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = plain(values)
        assert wanted.dtype is torch.bfloat16
        for room in (0, EVERYTHING):
            model = nn.Sequential(copy.deepcopy(plain))
            use_cpu_products(model, room)
            torch.testing.assert_close(model(values), wanted, rtol=0, atol=0)


def test_a_copy_has_weights_of_its_own() -> None:
    plain, layer = layers(16, 128, bias=True, packed=True)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
        assert not other(torch.randn(3, 16)).any()
    assert_same(layer, plain, torch.randn(3, 16))


def test_as_many_layers_are_packed_as_the_bytes_hold() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(8, 8), nn.Linear(8, 8))
    use_cpu_products(model, 2 * 8 * 8 * 4)
    assert [packed(layer) for layer in model] == [True, False, True, False]


def in_16_bits(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A plain layer of weights as a checkpoint publishes them."""
    layer = nn.Linear(inputs, outputs, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.bfloat16())
    return layer


@pytest.mark.parametrize("dtype", sorted(formats(), key=str))
def test_few_rows_take_the_weights_in_16_bits(dtype: torch.dtype) -> None:
    """And one more takes oneDNN's: the answers are those of a plain layer on both sides."""
    plain = in_16_bits(64, 128, dtype)
    model = nn.Sequential(copy.deepcopy(plain))
    use_cpu_products(model, EVERYTHING)
    assert halved(model[0])
    assert packed(model[0])
    most = FEW_ROWS[dtype]
    for rows, used in ((1, FBGEMM), (most, FBGEMM), (most + 1, ONEDNN)):
        values = torch.randn(rows, 64, dtype=dtype)
        with torch.inference_mode():
            assert operations(model, values) & {ONEDNN, FBGEMM} == {used}
            close = 1e-5 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(model(values), plain(values), rtol=close, atol=close)


def test_weights_that_16_bits_do_not_hold_have_no_such_copy() -> None:
    model = nn.Sequential(nn.Linear(64, 128))
    use_cpu_products(model, EVERYTHING)
    assert not halved(model[0])
    with torch.inference_mode():
        assert ONEDNN in operations(model, torch.randn(1, 64))


def test_a_weight_that_changes_has_another_copy_or_none() -> None:
    plain = in_16_bits(64, 128)
    model = nn.Sequential(copy.deepcopy(plain))
    use_cpu_products(model, EVERYTHING)
    values = torch.randn(2, 64)
    for scale, used in ((2, FBGEMM), (1.1, ONEDNN)):
        with torch.no_grad():
            for weight in (*plain.parameters(), *model.parameters()):
                weight.mul_(scale)
        with torch.inference_mode():
            assert used in operations(model, values)
        assert_same(model, plain, values)


def parts_of_a_model() -> nn.ModuleDict:
    """Of equally large layers."""
    return nn.ModuleDict({name: in_16_bits(8, 8) for name in ("tower", "layer", "lm_head")})


PARTS = {"vision": ("tower",), "head": ("lm_head",)}
HALF, WHOLE = 2 * 8 * 8, 4 * 8 * 8


@pytest.mark.parametrize(
    ("room", "in_16_bits_are", "packed_are"),
    [
        (0, "", ""),
        (HALF, "layer", ""),
        (2 * HALF, "layer lm_head", ""),
        (2 * HALF + WHOLE, "layer lm_head", "tower"),
        (EVERYTHING, "layer lm_head", "tower layer"),
    ],
)
def test_the_bytes_go_where_they_win_most(room: int, in_16_bits_are: str, packed_are: str) -> None:
    """Not to few rows of a tower, which has none, nor to many of a head."""
    model = parts_of_a_model()
    use_cpu_products(model, room, PARTS)
    layers = {name: layer for name, layer in model.items() if isinstance(layer, CpuLinear)}
    assert " ".join(name for name, layer in layers.items() if halved(layer)) == in_16_bits_are
    assert " ".join(name for name, layer in layers.items() if packed(layer)) == packed_are


def test_where_mkl_is_fast_it_has_few_rows_and_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows on packed weights are oneDNN's, and weights in 16 bits have their own."""
    monkeypatch.setattr(cpu_products, "mkl_is_fast", lambda: True)
    (_, unpacked), (_, reordered) = (layers(16, 128, bias=True, packed=each) for each in (False, True))
    few, many = torch.randn(MKL_ROWS - 1, 16), torch.randn(MKL_ROWS, 16)
    small = nn.Sequential(in_16_bits(16, 128))
    use_cpu_products(small, EVERYTHING)
    with torch.inference_mode():
        assert ONEDNN not in operations(unpacked, few) | operations(unpacked, many) | operations(
            reordered, few
        )
        assert ONEDNN in operations(reordered, many)
        assert FBGEMM in operations(small, few)


def test_other_number_formats_and_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(16, 128), nn.Linear(16, 128, dtype=torch.float64))
    use_cpu_products(model, EVERYTHING)
    assert [type(layer) for layer in model] == [Own, nn.Linear]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_that_changes_its_format(dtype: torch.dtype) -> None:
    """And back: 2 of 1,000 is the distance of neighbors in the coarsest."""
    plain, layer = layers(16, 128, bias=True, packed=True)
    for each in (dtype, torch.float32):
        values = torch.randn(2, 16, dtype=each)
        with torch.inference_mode():
            wanted = plain.to(each)(values)
            torch.testing.assert_close(layer.to(each)(values), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.bfloat16 not in formats(), reason="this CPU has no instructions for bfloat16")
def test_packed_bfloat16() -> None:
    plain = nn.Linear(64, 128, dtype=torch.bfloat16)
    model = nn.Sequential(copy.deepcopy(plain))
    use_cpu_products(model, EVERYTHING)
    values = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert ONEDNN in operations(model, values)
        torch.testing.assert_close(model(values), plain(values), rtol=2e-2, atol=2e-2)


def test_gradients_are_those_of_a_plain_layer() -> None:
    plain, layer = layers(16, 128, bias=True, packed=True)
    values = torch.randn(3, 16)
    for each in (plain, layer):
        each(values).square().sum().backward()
    for own, other in zip(plain.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed_bytes", [0, EVERYTHING])
@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_uses_them_and_saves_like_any_other(
    tmp_path: Path, packed_bytes: int, published: torch.dtype
) -> None:
    path = save_tiny_llava(tmp_path / "tiny", dtype=published)
    vlm = PrunedVLM.from_pretrained(path, device="cpu", packed_bytes=packed_bytes)
    assert halved(vlm.model.lm_head) == (published is torch.bfloat16 and packed_bytes > 0)
    assert not any(
        halved(layer) for layer in vlm.model.model.vision_tower.modules() if isinstance(layer, CpuLinear)
    )
    assert isinstance(vlm.model.lm_head, CpuLinear)
    first = vlm.answer(picture(), "What is it?", 6, max_new_tokens=4)
    vlm.model.save_pretrained(tmp_path / "again")
    vlm.processor.save_pretrained(tmp_path / "again")
    again = PrunedVLM.from_pretrained(tmp_path / "again", device="cpu", packed_bytes=packed_bytes)
    assert again.answer(picture(), "What is it?", 6, max_new_tokens=4).token_ids == first.token_ids
