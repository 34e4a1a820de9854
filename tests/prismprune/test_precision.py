"""Quantized language models: which layers are, what they take, and that they answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import nn

from prismprune import InvalidOptionError, PrunedVLM, Quantization
from prismprune.cpu_products import CpuLinear
from prismprune.families import FAMILIES
from prismprune.planning import plan
from prismprune.quantization import PARTS
from tests.prismprune.families import CHECKPOINTS
from tests.prismprune.tiny import picture, save_tiny_llava

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS = {"int8": Linear8bitLt, "nf4": Linear4bit}
PLAIN = {nn.Linear, CpuLinear}
FULL = (
    "model.vision_tower",
    "model.image_tower",
    "model.video_tower",
    "model.visual",
    "model.multi_modal_projector",
    "lm_head",
)
"""What stays as it is."""


def stored_bytes(model: nn.Module) -> int:
    """Of weights and of the scales that bitsandbytes keeps beside them."""
    taken = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, Linear4bit):
            taken += weight.quant_state.absmax.nbytes
            taken += weight.quant_state.state2.absmax.nbytes if weight.quant_state.nested else 0
        elif isinstance(module, Linear8bitLt):
            taken += weight.SCB.nbytes
    return taken


@pytest.mark.parametrize("quantization", sorted(LAYERS))
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_only_the_language_models_layers_are_quantized(
    checkpoints: Callable[[str], Path], name: str, quantization: str
) -> None:
    """Tower, projector and head keep their numbers; pruned questions are answered, and scores are read."""
    vlm = PrunedVLM.from_pretrained(
        checkpoints(name), device="cpu", dtype="bfloat16", quantization=quantization
    )
    linear = {
        path: type(module) for path, module in vlm.model.named_modules() if isinstance(module, nn.Linear)
    }
    inside = {kind for path, kind in linear.items() if not path.startswith(FULL)}
    assert inside == {LAYERS[quantization]}
    assert {kind for path, kind in linear.items() if path.startswith(FULL)} <= PLAIN
    answer = vlm.answer(picture(1), "What?", 10, max_new_tokens=4)
    assert answer.visual_tokens.kept == 10
    assert answer.visual_tokens.salient == 5


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "quantization", [Quantization("int8"), Quantization("nf4", double_quant=False)], ids=str
)
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_what_is_quantized_too_is_that_part_alone(
    checkpoints: Callable[[str], Path], name: str, quantization: Quantization, part: str
) -> None:
    """Every linear layer of it and of the language model, none other; planned to the byte; and it answers."""
    folder, chosen = checkpoints(name), replace(quantization, also=(part,))
    vlm = PrunedVLM.from_pretrained(folder, device="cpu", dtype="bfloat16", quantization=chosen)
    whole = tuple(chosen.spared(FAMILIES[vlm.family].outside))
    for path, module in vlm.model.named_modules():
        if isinstance(module, nn.Linear):
            kept = path.startswith(whole)
            assert type(module) in (PLAIN if kept else {LAYERS[chosen.kind]}), path
    planned = plan(str(folder), 10, dtype="bfloat16", quantization=chosen)
    assert stored_bytes(vlm.model) == planned.budget.weight_bytes
    assert vlm.quantization == planned.quantization == f"{quantization} +{part}"
    assert vlm.answer(picture(1), "What?", 10, max_new_tokens=2).visual_tokens.kept == 10


@pytest.mark.parametrize(("asked", "computed"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_nf4_computes_in_the_models_numbers_or_in_those_asked_for(
    tiny_llava: Path, asked: str | None, computed: torch.dtype
) -> None:
    """Of every layer that is quantized."""
    chosen = Quantization("nf4", compute_dtype=asked)
    model = PrunedVLM.from_pretrained(tiny_llava, device="cpu", dtype="bfloat16", quantization=chosen).model
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers
    assert {layer.compute_dtype for layer in layers} == {computed}


@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", [(64, 128), (128, 96), (32, 64), (64, 72)])
def test_nf4_multiplies_as_its_weights_say(tmp_path: Path, widths: tuple[int, int], computed: str) -> None:
    """Whatever the widths: a CPU's fused product takes whole blocks of 64 and multiples of 32 rows."""
    tiny = save_tiny_llava(tmp_path / "tiny", widths=widths)
    chosen = Quantization("nf4", compute_dtype=computed)
    model = PrunedVLM.from_pretrained(tiny, device="cpu", dtype="float32", quantization=chosen).model
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert {layer.in_features for layer in layers} == set(widths)
    rounding = torch.finfo(getattr(torch, computed)).eps
    for layer in layers:
        weight: Any = layer.weight
        weights = dequantize_4bit(weight.data, weight.quant_state).float()
        values = torch.randn(3, layer.in_features)
        with torch.inference_mode():
            exact = values @ weights.T
            off = (layer(values) - exact).abs().max() / exact.abs().max()
        assert off < 4 * rounding


def test_int8_does_not_log_each_layer(tiny_llava: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That it computes in float16 would be said by every layer for every token."""
    vlm = PrunedVLM.from_pretrained(tiny_llava, device="cpu", dtype="bfloat16", quantization="int8")
    vlm.answer(picture(1), "What?", 4, max_new_tokens=2)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "int3"},
        {"kind": "nf4", "compute_dtype": "float8"},
        {"kind": "nf4", "also": ("vision", "everything")},
        {"kind": "int8", "compute_dtype": "float16"},
        {"kind": "int8", "double_quant": False},
        {"kind": None, "compute_dtype": "float16"},
        {"kind": None, "double_quant": False},
        {"kind": None, "also": ["vision"]},
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any]) -> None:
    """What is unknown, what the kind has not, and what is said of a quantization that is not asked for."""
    with pytest.raises(InvalidOptionError):
        Quantization.chosen(**options)


def test_no_quantization_is_one() -> None:
    """Neither a kind nor an option of one."""
    assert Quantization.chosen(None) is None
    assert Quantization.chosen("nf4", also=["head"]) == Quantization("nf4", also=("head",))


def test_a_head_that_is_the_embedding_is_not_quantized(tmp_path: Path) -> None:
    """Refused by the plan and before a weight is loaded: the embedding would be lost with it."""
    folder = save_tiny_llava(tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    chosen = Quantization("nf4", also=("head",))
    with pytest.raises(InvalidOptionError, match="embedding"):
        plan(str(folder), quantization=chosen)
    with pytest.raises(InvalidOptionError, match="embedding"):
        PrunedVLM.from_pretrained(folder, device="cpu", quantization=chosen)


@pytest.mark.demo
@pytest.mark.parametrize("quantization", sorted(LAYERS))
def test_the_quantized_demo_takes_what_was_planned_and_answers(quantization: str) -> None:
    """Weights and scales to the byte, and the README's question."""
    vlm = PrunedVLM.from_pretrained("prism-demo", device="cpu", dtype="bfloat16", quantization=quantization)
    planned = plan("prism-demo", 64, dtype="bfloat16", quantization=quantization)
    assert stored_bytes(vlm.model) == planned.budget.weight_bytes
    assert vlm.answer("examples/scene.png", "What color is the star?", 64).text == "red"
