"""Blocks of towers give what transformers' own give, however few passes they take."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.profiler import profile
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.activations import GELUActivation

from prismprune import cpu_attention, cpu_products
from prismprune.cpu_layers import forget_copies, use_cpu_products
from prismprune.cpu_products import available, formats
from tests.prismprune.test_cpu_products import EVERYTHING, ONEDNN

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LAYERS = 2
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "image_size": 42,
    "patch_size": 3,
}
TOWERS: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2)),
}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-1}
ACTIVATIONS = {"aten::sigmoid_", "aten::sigmoid", "aten::gelu"}
pytestmark = pytest.mark.skipif(not available(), reason="these products are used on x86 CPUs alone")


@pytest.fixture(autouse=True)
def _as_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "mkl_is_fast", lambda: False)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_towers(monkeypatch: pytest.MonkeyPatch, tower: str, products: bool, dtype: torch.dtype) -> None:
    """Two views, whether or not products are faster on this CPU; a part that is watched is called."""
    monkeypatch.setattr(cpu_attention, "has_faster_products", lambda own: products and own is torch.bfloat16)
    torch.manual_seed(0)
    plain = TOWERS[tower]().eval()
    changed = copy.deepcopy(plain).to(dtype)
    use_cpu_products(changed, EVERYTHING)
    watched: list[Tensor] = []
    for name, module in changed.named_modules():
        if name.endswith(("k_proj", "out_proj", "o_proj")):
            module.register_forward_hook(lambda *seen: watched.append(seen[-1]))
    pixels = torch.randn(2, 3, 42, 42)
    with torch.inference_mode(), profile() as seen:
        own = changed(pixels.to(dtype)).last_hidden_state
    with torch.inference_mode():
        wanted = plain(pixels).last_hidden_state
    near = ROUNDING[dtype]
    torch.testing.assert_close(own.float(), wanted, rtol=near, atol=near)
    assert len(watched) == 2 * LAYERS
    multiplied = any(event.name == "aten::bmm" for event in seen.events())
    assert multiplied is (products and dtype is torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_towers_activation_is_transformers(dtype: torch.dtype) -> None:
    """Bit for bit, with gradients and without, and what it is given stays as it is."""
    plain: Any = TOWERS["clip"]().encoder.layers[0].mlp.activation_fn
    changed = nn.Sequential(copy.deepcopy(plain))
    use_cpu_products(changed)
    assert type(changed[0]) is not type(plain)
    values = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = values.clone()
    with torch.inference_mode():
        assert torch.equal(changed(values), plain(values))
    assert torch.equal(values, before)
    wanted, own = (values.clone().requires_grad_() for _ in range(2))
    plain(wanted).sum().backward()
    changed(own).sum().backward()
    assert own.grad is not None
    assert wanted.grad is not None
    assert torch.equal(own.grad, wanted.grad)


def mlps(tower: str, dtype: torch.dtype = torch.float32, room: int = EVERYTHING) -> tuple[Any, Any]:
    """That of a tower's block as transformers has it, and as it is changed, of the same weights."""
    torch.manual_seed(0)
    plain = TOWERS[tower]().eval().to(dtype)
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
        parameter.normal_(std=0.3)
    changed = copy.deepcopy(plain)
    use_cpu_products(changed, room)
    first, second = (
        next(module for name, module in model.named_modules() if name.endswith("0.mlp"))
        for model in (plain, changed)
    )
    return first, second


def patches(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same(one: Any, other: Any) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(one(patches()), other(patches()), rtol=1e-4, atol=1e-4)


def passes(mlp: Any, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Products that it makes, and activations that are computed by themselves."""
    with torch.inference_mode(), profile() as seen:
        mlp(patches(dtype))
    names = [event.name for event in seen.events()]
    return names.count(ONEDNN), sum(name in ACTIVATIONS for name in names)


@pytest.mark.parametrize("tower", TOWERS)
def test_an_mlp_is_two_products_and_nothing_else(tower: str) -> None:
    plain, changed = mlps(tower)
    assert_same(changed, plain)
    assert passes(changed) == (2, 0)


@pytest.mark.parametrize("tower", TOWERS)
def test_without_room_for_both_copies_each_part_is_by_itself(tower: str) -> None:
    plain, changed = mlps(tower, room=plain_bytes(tower) - 1)
    assert_same(changed, plain)
    assert passes(changed) == (2, 1)


def plain_bytes(tower: str) -> int:
    """What copies of the first MLP's weights take, and of those before it."""
    named = TOWERS[tower]().named_modules()
    block = next(module for name, module in named if name.endswith(("layers.0", "layer.0")))
    return sum(4 * module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("tower", TOWERS)
def test_numbers_of_16_bits(tower: str) -> None:
    """Weights times a factor would be others then."""
    if torch.bfloat16 not in formats():
        pytest.skip("this CPU does not multiply bfloat16 by itself")
    plain, changed = mlps(tower, torch.bfloat16)
    values = patches(torch.bfloat16)
    with torch.inference_mode():
        exact = copy.deepcopy(plain).float()(values.float())
        errors = [(mlp(values).float() - exact).square().mean().sqrt() for mlp in (changed, plain)]
    assert errors[0] <= 1.02 * errors[1]
    assert passes(changed, torch.bfloat16) == (2, tower == "clip")


@pytest.mark.parametrize("part", ["", "fc1", "activation_fn", "fc2"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_part_that_is_watched_is_called(tower: str, part: str) -> None:
    """And gives what transformers' own gives."""
    plain, changed = mlps(tower)
    seen: list[list[Tensor]] = []
    with torch.inference_mode():
        for mlp in (changed, plain):
            own: list[Tensor] = []
            hook = mlp.get_submodule(part).register_forward_hook(lambda *told, own=own: own.append(told[-1]))
            mlp(patches())
            hook.remove()
            mlp(patches())
            seen.append(own)
    assert len(seen[0]) == 1
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["fc1", "activation_fn", "fc2"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_forward_of_its_own_is_called(tower: str, part: str) -> None:
    plain, changed = mlps(tower)
    for mlp in (plain, changed):
        module = mlp.get_submodule(part)
        module.forward = lambda values, own=module.forward: -2 * own(values)
    assert_same(changed, plain)


@pytest.mark.parametrize("tower", TOWERS)
def test_another_part_in_the_place_of_one_is_called(tower: str) -> None:
    plain, changed = mlps(tower)
    other = nn.Linear(64, plain.fc1.out_features).requires_grad_(False)
    for part, module in (("activation_fn", nn.ReLU()), ("fc1", other)):
        for mlp in (plain, changed):
            setattr(mlp, part, module)
        assert_same(changed, plain)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"])
def test_a_weight_that_changes_is_seen(tower: str, name: str) -> None:
    plain, changed = mlps(tower)
    for mlp in (plain, changed):
        mlp.get_parameter(name).mul_(1.5)
    assert_same(changed, plain)
    assert passes(changed) == (2, 0)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_change_that_torch_does_not_count_is_seen_once_copies_are_forgotten(tower: str) -> None:
    plain, changed = mlps(tower)
    for mlp in (plain, changed):
        for layer in (mlp.fc1, mlp.fc2):
            layer.weight.data.mul_(1.5)
    forget_copies(changed)
    assert_same(changed, plain)
    assert passes(changed) == (2, 0)


@pytest.mark.parametrize("tower", TOWERS)
def test_gradients_are_transformers(tower: str) -> None:
    wanted = []
    for mlp in mlps(tower):
        mlp.train().requires_grad_()
        mlp(patches()).square().sum().backward()
        wanted.append([parameter.grad for parameter in mlp.parameters()])
    for own, other in zip(*wanted, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mlp: pickle.loads(pickle.dumps(mlp))])  # noqa: S301 (its own)
def test_a_copy_is_transformers_own(tower: str, copied: Callable[[Any], Any]) -> None:
    plain, changed = mlps(tower)
    other = copied(changed)
    assert type(other) is type(plain)
    assert_same(other, plain)


def test_an_activation_that_onednn_does_not_have_stays() -> None:
    torch.manual_seed(0)
    plain = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="relu")).eval()
    changed = copy.deepcopy(plain)
    use_cpu_products(changed, EVERYTHING)
    pixels = torch.randn(1, 3, 42, 42)
    with torch.inference_mode():
        own, wanted = (model(pixels).last_hidden_state for model in (changed, plain))
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_clips_other_activation_is_computed_with_the_product() -> None:
    torch.manual_seed(0)
    model: Any = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="gelu")).eval()
    plain = copy.deepcopy(model)
    use_cpu_products(model, EVERYTHING)
    own, other = (each.get_submodule("encoder.layers.0.mlp") for each in (model, plain))
    assert type(other.activation_fn) is GELUActivation
    assert_same(own, other)
    assert passes(own) == (2, 0)
