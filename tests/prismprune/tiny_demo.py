"""A tiny random model in the demo's own prompt format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from prismprune.demo import CHAT_TEMPLATE
from tests.prismprune.tiny import save_tiny_llava

if TYPE_CHECKING:
    from pathlib import Path

    from prismprune import PrunedVLM

TOKENS = {"<|user|>": "<|im_start|>", "<|system|>": "<|im_end|>"}


def save_tiny_demo(path: Path) -> Path:
    """Write the tiny LLaVA with the demo's chat template, and its two control tokens by other names."""
    save_tiny_llava(path)
    for file in path.glob("*.json"):
        content = file.read_text()
        for old, new in TOKENS.items():
            content = content.replace(old, new)
        file.write_text(content)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return path


def silent(vlm: PrunedVLM) -> PrunedVLM:
    """The same model with a head that ends every answer at once, whatever was asked."""
    head = vlm.model.lm_head
    end = vlm.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    silence = nn.Linear(head.in_features, head.out_features, device=vlm.model.device, dtype=vlm.dtype)
    with torch.no_grad():
        silence.weight.zero_()
        silence.bias.zero_()[end] = 1
    vlm.model.lm_head = silence
    return vlm
