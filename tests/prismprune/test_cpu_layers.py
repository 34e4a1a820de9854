"""Attention and MLPs whose weights are multiplied as one matrix give what transformers' own give."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.profiler import profile
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2_5_VLTextConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from prismprune import cpu_products
from prismprune.batches import roomy_cache
from prismprune.cpu_layers import forget_copies, only_last_row, use_cpu_products
from prismprune.cpu_products import FEW_ROWS, CpuLinear, available
from tests.prismprune.test_cpu_products import EVERYTHING, FBGEMM, ONEDNN, halved, packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LAYERS = 2
MANY = FEW_ROWS[torch.float32]
"""Tokens of which two rows are more than the few that take weights in 16 bits."""
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "llama, with biases": lambda: LlamaModel(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama, each head its keys": lambda: LlamaModel(LlamaConfig(**SIZES | {"num_key_value_heads": 4})),
    "mistral": lambda: MistralModel(MistralConfig(**SIZES, sliding_window=6)),
    "qwen": lambda: Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            **SIZES, rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e4}
        )
    ),
}
pytestmark = pytest.mark.skipif(not available(), reason="these products are used on x86 CPUs alone")


@pytest.fixture(autouse=True)
def _as_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "mkl_is_fast", lambda: False)


def both(kind: str = "llama", published: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A model as transformers has it, and one whose layers are joined, of the same weights."""
    torch.manual_seed(0)
    plain = MODELS[kind]().eval().to(published).float()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    joined = copy.deepcopy(plain)
    use_cpu_products(joined, EVERYTHING)
    return plain, joined


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


def said(model: Any, *lengths: int, padding: int = 0) -> list[Tensor]:
    """Hidden states after each of so many tokens were fed to two rows, the second's first ones padding."""
    draw = torch.Generator().manual_seed(1)
    cache, states, known = roomy_cache(), [], 0
    mask = torch.ones(2, sum(lengths), dtype=torch.long)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for length in lengths:
        seen = slice(known, known + length)
        output = model(
            input_ids=torch.randint(50, (2, length), generator=draw),
            attention_mask=mask[:, : seen.stop],
            position_ids=positions[:, seen],
            past_key_values=cache,
            use_cache=True,
        )
        states.append(output.last_hidden_state[mask[:, seen].bool()])
        known = seen.stop
    return states


def assert_same(one: Any, other: Any, *lengths: int, padding: int = 0) -> None:
    for own, wanted in zip(
        said(one, *lengths, padding=padding), said(other, *lengths, padding=padding), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4)


def products(model: Any, *lengths: int) -> list[str]:
    """The products that a run is made of, in no order."""
    with torch.inference_mode(), profile() as seen:
        said(model, *lengths)
    return [
        name
        for event in seen.key_averages()
        for name in [event.key] * event.count
        if name in {ONEDNN, FBGEMM}
    ]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_prompts_and_steps_are_transformers(kind: str, padding: int) -> None:
    """Many rows and few, behind one another in a cache."""
    plain, joined = both(kind)
    with torch.inference_mode():
        assert_same(joined, plain, MANY, 1, 1, 5, 1, padding=padding)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_multiplied_together_is_one_product(kind: str) -> None:
    """Four a layer: queries, keys and values; behind the attention; gate and up; down."""
    _, joined = both(kind)
    assert products(joined, 1) == [FBGEMM] * 4 * LAYERS
    assert products(joined, MANY) == [ONEDNN] * 4 * LAYERS


@pytest.mark.parametrize("kind", MODELS)
def test_without_room_for_copies_it_is_transformers_own(kind: str) -> None:
    """But for attention, norms and the layer around them."""
    plain, _ = both(kind)
    apart = copy.deepcopy(plain)
    use_cpu_products(apart, 0)
    others = [
        (type(own), type(other))
        for own, other in zip(apart.modules(), plain.modules(), strict=True)
        if type(own) is not type(other)
    ]
    pairs = ((model.layers[-1], model.layers[-1].self_attn, model.norm) for model in (apart, plain))
    changed = {(type(own), type(other)) for own, other in zip(*pairs, strict=True)}
    assert set(others) == {(CpuLinear, nn.Linear), *changed}
    with torch.inference_mode():
        assert_same(apart, plain, 12, 1)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("room", [0, EVERYTHING])
@pytest.mark.parametrize("kind", MODELS)
def test_numbers_of_16_bits(kind: str, room: int, padding: int) -> None:
    """With copies and without, up to their rounding; a part that is watched is called."""
    plain, _ = both(kind)
    model = copy.deepcopy(plain).bfloat16()
    use_cpu_products(model, room)
    watched: list[Tensor] = []
    model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda _module, _inputs, output: watched.append(output)
    )
    lengths = (MANY, 1, 1, 5, 1)
    with torch.inference_mode():
        for own, wanted in zip(
            said(model, *lengths, padding=padding), said(plain, *lengths, padding=padding), strict=True
        ):
            torch.testing.assert_close(own.float(), wanted, rtol=5e-2, atol=1e-1)
    assert len(watched) == len(lengths)


@pytest.mark.parametrize("room", [0, EVERYTHING])
@pytest.mark.parametrize("kind", MODELS)
def test_where_only_the_last_row_is_used_the_last_layer_computes_one(kind: str, room: int) -> None:
    """The next tokens, behind prompts with padding, are as ever; its MLP and what is outside say why."""
    plain, _ = both(kind)
    model = copy.deepcopy(plain)
    use_cpu_products(model, room)
    rows = list[int]()
    model.layers[-1].mlp.register_forward_hook(
        lambda _module, inputs, _output: rows.append(inputs[0].shape[1])
    )
    fed, asked = ids(2, 13), torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
    for mask in (asked, torch.ones_like(asked)):
        given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": True}
        cached, wanted = (roomy_cache() for _ in range(2))
        with torch.inference_mode():
            whole = plain(fed[:, :12], attention_mask=mask, past_key_values=wanted, **given)
            with only_last_row():
                some = model(fed[:, :12], attention_mask=mask, past_key_values=cached, **given)
            torch.testing.assert_close(
                some.last_hidden_state, whole.last_hidden_state[:, -1:], rtol=1e-3, atol=1e-4
            )
            longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            after = {"position_ids": longer.sum(1, keepdim=True) - 1, "attention_mask": longer}
            some, whole = (
                each(fed[:, 12:], past_key_values=known, **after).last_hidden_state
                for each, known in ((model, cached), (plain, wanted))
            )
            torch.testing.assert_close(some, whole, rtol=1e-3, atol=1e-4)
            assert model(fed).last_hidden_state.shape[1] == 13
    assert rows == [1, 1, 13] * 2


def test_a_weight_that_changes_is_seen() -> None:
    """In place, by another tensor, and by another format and back."""
    plain, joined = both()
    with torch.inference_mode():
        said(joined, 3, 1)
    for name in ("self_attn.v_proj", "self_attn.q_proj", "mlp.up_proj"):
        for model in (plain, joined):
            layer = model.layers[1].get_submodule(name)
            with torch.no_grad():
                layer.weight.mul_(1.5)
    with torch.inference_mode():
        assert_same(joined, plain, MANY, 1)
    other = torch.nn.Parameter(torch.randn(96, 64), requires_grad=False)
    plain.layers[0].mlp.gate_proj.weight = joined.layers[0].mlp.gate_proj.weight = other
    with torch.inference_mode():
        assert_same(joined, plain, MANY, 1)
        joined.half().float()
        plain.half().float()
        assert_same(joined, plain, MANY, 1)


def test_a_weight_that_16_bits_no_longer_hold_is_seen() -> None:
    """Also where there was room for copies in 16 bits alone."""
    plain, _ = both()
    model = copy.deepcopy(plain)
    linear = (layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    use_cpu_products(model, 2 * sum(linear))
    with torch.inference_mode():
        assert products(model, 1) == [FBGEMM] * 4 * LAYERS
    with torch.no_grad():
        for each in (plain, model):
            each.layers[1].self_attn.v_proj.weight[0, 0] = 1 / 3
    with torch.inference_mode():
        assert_same(model, plain, 1, 1)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_weight_that_is_pruned_is_seen(name: str) -> None:
    plain, joined = both()
    for model in (plain, joined):
        prune.l1_unstructured(model.layers[0].get_submodule(name), "weight", 0.7)
    with torch.inference_mode():
        assert_same(joined, plain, MANY, 1)


def test_a_change_that_torch_does_not_count_is_seen_once_copies_are_forgotten() -> None:
    plain, joined = both()
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    with torch.inference_mode():
        said(joined, 3, 1)
    for model in (plain, joined):
        for name in names:
            model.layers[1].get_submodule(name).weight.data.mul_(1.5)
    forget_copies(joined)
    with torch.inference_mode():
        assert_same(joined, plain, MANY, 1)


def with_room_for_the_first_attention() -> tuple[Any, Any]:
    """Attention of the first layer alone is joined, so that layers call their parts as modules."""
    plain, _ = both()
    model = copy.deepcopy(plain)
    use_cpu_products(model, 2 * (64 + 32 + 32) * 64)
    assert halved(model.layers[0].self_attn)
    return plain, model


def test_where_only_some_layers_are_joined_who_watches_all_modules_sees_these() -> None:
    plain, joined = with_room_for_the_first_attention()
    seen: list[str] = []
    told = []
    with torch.inference_mode():
        for model in (plain, joined):
            names = {module: name for name, module in model.named_modules()}
            with register_module_forward_hook(lambda module, *_, names=names: seen.append(names[module])):
                said(model, 4, 1)
            told.append([*seen])
            seen.clear()
    assert told[1] == told[0]


def test_where_only_some_layers_are_joined_a_forward_of_its_own_is_called() -> None:
    plain, joined = with_room_for_the_first_attention()
    for model in (plain, joined):
        layer = model.layers[0].self_attn.v_proj
        layer.forward = lambda values, own=layer.forward: -2 * own(values)
    with torch.inference_mode():
        assert_same(joined, plain, 4, 1)


@pytest.mark.parametrize(
    "part", ["mlp", "mlp.act_fn", "input_layernorm", "self_attn.o_proj", "self_attn.q_proj"]
)
def test_a_forward_of_its_own_is_called(part: str) -> None:
    plain, joined = both()
    with torch.inference_mode():
        said(joined, MANY, 1)
        for model in (plain, joined):
            module = model.layers[1].get_submodule(part)
            module.forward = lambda values, own=module.forward: -2 * own(values)
        assert_same(joined, plain, MANY, 1)


def test_under_autocast_formats_are_transformers() -> None:
    plain, joined = both()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for own, wanted in zip(said(joined, MANY, 1), said(plain, MANY, 1), strict=True):
            assert own.dtype is wanted.dtype
            torch.testing.assert_close(own, wanted, rtol=5e-2, atol=1e-1)


def test_a_layer_that_is_watched_or_replaced_is_called() -> None:
    """As adapters do: what is in its place computes, and hooks see what it gives."""

    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, values: Tensor) -> Tensor:
            twice: Tensor = 2 * self.layer(values)
            return twice

    plain, joined = both()
    seen: list[Tensor] = []
    for model in (plain, joined):
        model.layers[0].mlp.up_proj = Twice(model.layers[0].mlp.up_proj)
        model.layers[0].self_attn.k_proj.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
    with torch.inference_mode():
        assert_same(joined, plain, 4, 1)
    assert len(seen) == 2 * 2
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("part", ["mlp", "mlp.act_fn", "input_layernorm", "self_attn.o_proj", "self_attn"])
def test_a_part_that_is_watched_is_called(part: str) -> None:
    """From the next pass on, though the pass before called none of them as a module; and no longer after."""
    _, joined = both()
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with torch.inference_mode():
        wanted = said(joined, MANY, 1)
        with joined.layers[1].get_submodule(part).register_forward_hook(note):
            torch.testing.assert_close(said(joined, MANY, 1), wanted, rtol=0, atol=0)
        assert len(seen) == 2
        with register_module_forward_hook(note):
            said(joined, 1)
        assert len(seen) > 2 + 2 * LAYERS
        del seen[:]
        said(joined, MANY, 1)
    assert not seen


@pytest.mark.parametrize("kind", MODELS)
def test_parts_that_nobody_watches_are_called_past_their_module(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, joined = both(kind)
    called: list[str] = []
    call = nn.Module.__call__

    def noted(module: nn.Module, *args: Any, **given: Any) -> Any:
        called.append(type(module).__name__)
        return call(module, *args, **given)

    monkeypatch.setattr(nn.Module, "__call__", noted)
    with torch.inference_mode():
        said(joined, MANY, 1)
        layers = [name for name in called if name.endswith("Layer")]
        parts = [name for name in called if name.endswith(("MLP", "Attention", "Linear"))]
        assert (len(layers), parts) == (2 * LAYERS, [])
        joined.layers[0].mlp.up_proj = CpuLinear(64, 96)
        said(joined, 1)
    assert "CpuLinear" in called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_norms_are_transformers(kind: str, dtype: torch.dtype) -> None:
    """In float32 up to its rounding, also of large and of small values; in other formats bit for bit."""
    plain, joined = both(kind)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 0.0}[dtype]
    for size in (1e-6, 1, 1e6):
        values = (size * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))).to(dtype)
        with torch.inference_mode():
            own, wanted = (model.to(dtype).norm(values) for model in (joined, plain))
        torch.testing.assert_close(own, wanted, rtol=rounding, atol=rounding)


def test_gradients_are_transformers() -> None:
    plain, joined = both()
    wanted = []
    for model in (plain, joined):
        model.train().requires_grad_()
        torch.cat(said(model, 4)).square().sum().backward()
        wanted.append([parameter.grad for parameter in model.parameters()])
    for own, other in zip(*wanted, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-3, atol=1e-3)


def test_a_model_without_layers_is_left_alone() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(), "head": nn.Linear(8, 8)})
    use_cpu_products(model, EVERYTHING)
    assert isinstance(model["head"], CpuLinear)


def test_eager_attention_gives_its_weights() -> None:
    plain, joined = both()
    ids = torch.tensor([[1, 2, 3]])
    for model in (plain, joined):
        model.set_attn_implementation("eager")
    with torch.inference_mode():
        own, wanted = (model(input_ids=ids, output_attentions=True).attentions for model in (joined, plain))
    assert len(own) == LAYERS
    torch.testing.assert_close(own, wanted)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 (its own)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_transformers_own(copied: Callable[[Any], Any]) -> None:
    """And its weights are its own."""
    plain, joined = both()
    other = copied(joined)
    assert {type(layer.self_attn) for layer in other.layers} == {LlamaAttention}
    assert {type(layer.mlp) for layer in other.layers} == {LlamaMLP}
    with torch.inference_mode():
        assert_same(other, plain, 4, 1)
        for parameter in other.parameters():
            parameter.zero_()
        assert_same(joined, plain, 4, 1)


def test_one_weight_that_16_bits_do_not_hold_costs_its_neighbors_nothing() -> None:
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SIZES)).eval().bfloat16().float()
    with torch.no_grad():
        model.layers[0].self_attn.v_proj.weight[0, 0] = 1 / 3
    plain = copy.deepcopy(model)
    use_cpu_products(model, EVERYTHING)
    first, second = (layer.self_attn for layer in model.layers)
    assert [halved(first.get_submodule(name)) for name in ("q_proj", "k_proj", "v_proj")] == [
        True,
        True,
        False,
    ]
    assert packed(first.v_proj)
    assert (halved(first), halved(second)) == (False, True)
    with torch.inference_mode():
        assert_same(model, plain, MANY, 1)


def test_weights_of_32_bits_are_multiplied_together_too() -> None:
    plain, joined = both(published=torch.float32)
    assert products(joined, 1) == products(joined, MANY) == [ONEDNN] * 4 * LAYERS
    with torch.inference_mode():
        assert_same(joined, plain, MANY, 1)


def test_layers_of_one_module_have_their_copies_together_or_not_at_all() -> None:
    """One byte less than the first attention's takes goes to what is smaller."""
    model = LlamaModel(LlamaConfig(**SIZES)).bfloat16().float()
    together = 2 * (64 + 32 + 32) * 64
    use_cpu_products(model, together - 1)
    first, second = model.layers
    assert not halved(first.self_attn)
    assert halved(first.self_attn.o_proj)
    assert not any(halved(getattr(second.self_attn, name)) for name in ("q_proj", "k_proj", "v_proj"))
