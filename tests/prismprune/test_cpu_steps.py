"""Steps without what lies around the layers are the model's own, bit for bit, or are left to it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig
from transformers.models.llama.modeling_llama import LlamaModel

from prismprune import PrunedVLM, cpu_products
from prismprune.batches import Batch, roomy_cache
from prismprune.cpu_layers import use_cpu_products, watch_layers
from prismprune.cpu_products import Copies, available
from prismprune.cpu_steps import CpuSteps
from tests.prismprune.families import CHECKPOINTS
from tests.prismprune.test_cpu_layers import SIZES
from tests.prismprune.test_cpu_products import EVERYTHING
from tests.prismprune.tiny import picture

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

LENGTH = 5
WINDOW = LENGTH + 2
AROUND = [
    "",
    "model",
    "model.language_model",
    "model.language_model.embed_tokens",
    "model.language_model.norm",
    "lm_head",
]
"""Modules that a plain step goes through, beside the layers."""
pytestmark = pytest.mark.skipif(not available(), reason="these steps are taken on x86 CPUs alone")


@pytest.fixture(autouse=True)
def _as_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "mkl_is_fast", lambda: False)


@pytest.fixture
def llava(tiny_llava: Path) -> Any:
    return loaded(tiny_llava).model


def loaded(path: Path, **options: Any) -> PrunedVLM:
    return PrunedVLM.from_pretrained(path, device="cpu", packed_bytes=EVERYTHING, **options)


def started(model: Any, *, padding: int = 0) -> Batch:
    """Two rows that were fed some tokens, the second's first ones padding."""
    axes = 3 if model.config.model_type == "qwen2_5_vl" else None
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = Batch(roomy_cache(), torch.zeros(2, 0, dtype=torch.long), positions[:, -1] + 1, axes)
    ids = torch.randint(9, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    batch.extend(model, ids, mask, positions if axes is None else positions.expand(axes, -1, -1))
    return batch


def steps_of(model: Any) -> CpuSteps:
    steps = CpuSteps.of(model)
    assert steps is not None
    return steps


def is_left_to_the_model(steps: CpuSteps, batch: Batch) -> bool:
    """Whether it is, and nothing was done."""
    before = batch.mask.shape, batch.next_positions.tolist(), batch.cache.get_seq_length()
    left = steps.step(batch, [1, 2]) is None
    after = batch.mask.shape, batch.next_positions.tolist(), batch.cache.get_seq_length()
    assert (before == after) is left
    return left


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.inference_mode()
def test_steps_are_the_models(
    name: str, dtype: str, padding: int, checkpoints: Callable[[str], Path]
) -> None:
    model: Any = loaded(checkpoints(name), dtype=dtype).model
    if model.dtype not in cpu_products.formats():
        pytest.skip("this CPU does not multiply bfloat16 by itself")
    steps, plain, fast = steps_of(model), started(model, padding=padding), started(model, padding=padding)
    for token in range(1, 5):
        wanted = plain.step(model, [token, token + 4]).clone()
        found = steps.step(fast, [token, token + 4])
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert torch.equal(fast.mask, plain.mask)
    assert torch.equal(fast.next_positions, plain.next_positions)
    for one, other in zip(fast.layers, plain.layers, strict=True):
        assert all(map(torch.equal, one.tensors, other.tensors))


def test_answers_take_such_steps(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their prompts go through the whole of the language model, and nothing else of them does."""
    vlm, fed = loaded(tiny_llava), list[int]()
    forward = LlamaModel.forward

    def noted(self: Any, *args: Any, **given: Any) -> Any:
        fed.append(given["inputs_embeds"].shape[1])
        return forward(self, *args, **given)

    monkeypatch.setattr(LlamaModel, "forward", noted)
    answer = vlm.answer(picture(), "What is it?", token_budget=4, max_new_tokens=6)
    (prompt,) = fed
    monkeypatch.setattr(CpuSteps, "step", lambda *_: None)
    assert vlm.answer(picture(), "What is it?", token_budget=4, max_new_tokens=6).text == answer.text
    assert fed == [prompt, prompt, *[1] * (len(fed) - 2)]
    assert len(fed) > 2


@pytest.mark.parametrize("name", [*AROUND, "model.language_model.layers.1.mlp"])
@torch.inference_mode()
def test_who_watches_sees_every_step(llava: Any, name: str) -> None:
    """And no more than that."""
    steps, batch, seen = steps_of(llava), started(llava), list[str]()
    with llava.get_submodule(name).register_forward_hook(lambda *_: seen.append(name)):
        assert is_left_to_the_model(steps, batch)
        assert not seen
    assert not is_left_to_the_model(steps, batch)


class Doubled(nn.Module):
    """What somebody may put in the place of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **given: Any) -> Any:
        return 2 * self.layer(*args, **given)


def is_wrapped(layers: nn.ModuleList) -> None:
    layers[1] = Doubled(layers[1])


def is_another(layers: nn.ModuleList) -> None:
    layers[1] = copy.deepcopy(layers[1])


def is_taken_away(layers: nn.ModuleList) -> None:
    del layers[1]


def is_added(layers: nn.ModuleList) -> None:
    layers.append(Doubled(layers[0]))


def is_put_before(layers: nn.ModuleList) -> None:
    layers.insert(0, Doubled(layers[1]))


@pytest.mark.parametrize("layer", [is_wrapped, is_another, is_taken_away, is_added, is_put_before])
@torch.inference_mode()
def test_layers_that_are_not_those_of_before_are_the_models(
    llava: Any, layer: Callable[[nn.ModuleList], None]
) -> None:
    """Also where it is found out by the step: the prompt was that of the layers before."""
    steps, batch = steps_of(llava), started(llava)
    layer(llava.model.language_model.layers)
    assert is_left_to_the_model(steps, batch)


@torch.inference_mode()
def test_steps_of_a_part_of_the_layers_are_the_models(llava: Any) -> None:
    language_model = llava.model.language_model
    language_model.layers = language_model.layers[:1]
    assert CpuSteps.of(llava) is None


@pytest.mark.parametrize("name", [*AROUND, "model.language_model.layers.1.mlp"])
@torch.inference_mode()
def test_a_forward_of_its_own_is_called(llava: Any, name: str) -> None:
    """As that which `accelerate` and others give a module; without it steps are as before."""
    steps, batch, module = steps_of(llava), started(llava), llava.get_submodule(name)
    module.forward = module.forward
    assert is_left_to_the_model(steps, batch)
    del module.forward
    assert not is_left_to_the_model(steps, batch)


@pytest.mark.parametrize("watched", [False, True])
@torch.inference_mode()
def test_a_weight_that_changes_between_prompts_is_seen(llava: Any, *, watched: bool) -> None:
    """Also where somebody watched the prompt, so that it had no copy of it."""
    steps, plain = steps_of(llava), copy.deepcopy(llava)
    assert not is_left_to_the_model(steps, started(llava))
    for model in (llava, plain):
        with torch.no_grad():
            model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.5)
    layer = llava.model.language_model.layers[1].mlp.up_proj
    with layer.register_forward_hook(lambda *_: None) if watched else nullcontext():
        batch = started(llava)
    found = steps.step(batch, [1, 2])
    assert found is not None
    torch.testing.assert_close(found, started(plain).step(plain, [1, 2]), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_weights_are_looked_at_once_a_prompt(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at them at every step would take a good part of it."""
    looked, current = list[Copies](), Copies.current

    def noted(self: Copies) -> bool:
        looked.append(self)
        return current(self)

    monkeypatch.setattr(Copies, "current", noted)
    steps, batch = steps_of(llava), started(llava)
    head = llava.lm_head.copies
    assert set(looked) > {head}
    looked.clear()
    for _ in range(3):
        assert not is_left_to_the_model(steps, batch)
    assert looked == [head] * 3


@torch.inference_mode()
def test_layers_tell_that_they_begin(llava: Any) -> None:
    """Without the model having to take the step for it."""
    told = list[int]()
    watch_layers(llava, lambda: told.append(1))
    batch = started(llava)
    layers = len(llava.model.language_model.layers)
    assert len(told) == layers
    assert not is_left_to_the_model(steps_of(llava), batch)
    assert len(told) == 2 * layers


def test_layers_that_others_call_tell_that_they_begin() -> None:
    """Of every stack of a model, so that a slow prompt is not taken for one that hangs."""
    told = list[int]()
    tower, decoder = (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))
    watch_layers(nn.ModuleList([tower, decoder]), lambda: told.append(len(told)))
    for layer in (*tower, *decoder):
        layer(torch.zeros(1, 2))
    assert told == [0, 1, 2, 3]


@torch.inference_mode()
def test_who_watches_the_tower_does_not_mind(llava: Any) -> None:
    with llava.model.vision_tower.register_forward_hook(lambda *_: None):
        assert not is_left_to_the_model(steps_of(llava), started(llava))


@torch.inference_mode()
def test_another_head_answers(llava: Any) -> None:
    steps, batch = steps_of(llava), started(llava)
    llava.lm_head = nn.Linear(llava.lm_head.in_features, llava.lm_head.out_features, bias=False)
    assert is_left_to_the_model(steps, batch)


def test_gradients_training_and_autocast_are_the_models(llava: Any) -> None:
    steps = steps_of(llava)
    with torch.inference_mode():
        batch = started(llava)
        llava.train()
        assert is_left_to_the_model(steps, batch)
        llava.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert is_left_to_the_model(steps, batch)
    batch = started(llava)
    assert is_left_to_the_model(steps, batch)


@torch.inference_mode()
def test_behind_a_sliding_window_the_model_knows_what_is_seen() -> None:
    torch.manual_seed(0)
    text = MistralConfig(**SIZES, sliding_window=WINDOW)
    model: Any = LlavaForConditionalGeneration(LlavaConfig(text_config=text)).eval()
    use_cpu_products(model, EVERYTHING)
    steps, plain, fast = steps_of(model), started(model), started(model)
    found: list[Tensor | None] = []
    for token in range(1, 4):
        wanted = plain.step(model, [token, token])
        found.append(steps.step(fast, [token, token]))
        last = fast.step(model, [token, token]) if found[-1] is None else found[-1]
        torch.testing.assert_close(last, wanted, rtol=0, atol=0)
    assert [each is None for each in found] == [False, False, True]


def test_without_copies_of_all_weights_there_are_none(tiny_llava: Path) -> None:
    assert CpuSteps.of(PrunedVLM.from_pretrained(tiny_llava, device="cpu").model) is None
