"""Quantised language models: which layers are, what they take, and that they answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from prismprune import PrunedVLM
from prismprune.planning import plan
from tests.prismprune.families import CHECKPOINTS
from tests.prismprune.tiny import picture

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = {"int8": Linear8bitLt, "nf4": Linear4bit}
FULL = (
    "model.vision_tower",
    "model.image_tower",
    "model.video_tower",
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
            taken += weight.quant_state.absmax.nbytes + weight.quant_state.state2.absmax.nbytes
        elif isinstance(module, Linear8bitLt):
            taken += weight.SCB.nbytes
    return taken


@pytest.mark.parametrize("quantization", sorted(LAYERS))
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_only_the_language_models_layers_are_quantised(tmp_path: Path, name: str, quantization: str) -> None:
    """Tower, projector and head keep their numbers; pruned questions are answered, and scores are read."""
    folder = CHECKPOINTS[name](tmp_path)
    vlm = PrunedVLM.from_pretrained(folder, device="cpu", dtype="bfloat16", quantization=quantization)
    linear = {
        path: type(module) for path, module in vlm.model.named_modules() if isinstance(module, nn.Linear)
    }
    inside = {kind for path, kind in linear.items() if not path.startswith(FULL)}
    assert inside == {LAYERS[quantization]}
    assert {kind for path, kind in linear.items() if path.startswith(FULL)} == {nn.Linear}
    answer = vlm.answer(picture(1), "What?", 10, max_new_tokens=4)
    assert answer.visual_tokens.kept == 10
    assert answer.visual_tokens.salient == 5


@pytest.mark.demo
@pytest.mark.parametrize("quantization", sorted(LAYERS))
def test_the_quantised_demo_takes_what_was_planned_and_answers(quantization: str) -> None:
    """Weights and scales to the byte, and the README's question."""
    vlm = PrunedVLM.from_pretrained("prism-demo", device="cpu", dtype="bfloat16", quantization=quantization)
    planned = plan("prism-demo", 64, dtype="bfloat16", quantization=quantization)
    assert stored_bytes(vlm.model) == planned.budget.weight_bytes
    assert vlm.answer("examples/scene.png", "What color is the star?", 64).text == "red"
