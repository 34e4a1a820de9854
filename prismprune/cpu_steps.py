"""Decoding steps on a CPU without what lies around a language model's layers.

Between an answer's last token and the logits of its next one, transformers' models look through arguments,
inputs and outputs several times over, in Python. That is a good part of a small model's step of one row: the
weights that stream by leave nothing of it in the processor's caches (`benchmarks/layers.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from prismprune.cpu_changes import Untouched
from prismprune.cpu_layers import stack_of

if TYPE_CHECKING:
    from torch import Tensor

    from prismprune.batches import Batch
    from prismprune.cpu_layers import Stack

LANGUAGE_MODELS = {"LlamaModel", "MistralModel", "Qwen2_5_VLTextModel"}
"""Transformers' language models, by their names, that are an embedding, rotations, layers and a norm."""


class CpuSteps:
    """Steps of one model whose layers may call their parts past `nn.Module`, bit for bit the model's own.

    What somebody watches, replaced or trains is left to the model.
    """

    def __init__(self, model: Any, language_model: Any, stack: Stack) -> None:
        self._stack = stack
        self._embed, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._rotate, self._norm = language_model.rotary_emb, language_model.norm
        self._window: int | None = getattr(language_model.config, "sliding_window", None)
        called = (self._embed, self._rotate, self._norm, self._head)
        around = [
            module
            for module in model.modules()
            if module in called or any(part is language_model for part in module.modules())
        ]
        self._untouched = Untouched(around)

    @classmethod
    def of(cls, model: Any) -> CpuSteps | None:
        """None where a step is only the model's own."""
        language_model: Any = model.get_decoder()
        if type(language_model).__name__ not in LANGUAGE_MODELS:
            return None
        stack = stack_of(language_model.layers)
        return None if stack is None else cls(model, language_model, stack)

    def step(self, batch: Batch, tokens: list[int]) -> Tensor | None:
        """Feed one token a row; logits [B, vocabulary] of the next.

        None, and nothing done, where the batch has to take a plain step.
        """
        if self._window is not None and batch.mask.shape[1] >= self._window:
            return None
        if not self._untouched:
            return None
        states = self._embed(torch.tensor(tokens, device=batch.mask.device)[:, None])
        if not self._stack.direct(states, step=True):
            return None
        embeddings = self._rotate(states, position_ids=batch.advance())
        mask = None if batch.mask.all() else batch.mask.bool()[:, None, None]
        found = self._stack.run(
            states, position_embeddings=embeddings, past_key_values=batch.cache, attention_mask=mask
        )
        logits: Tensor = self._head(self._norm(found))[:, -1]
        return logits
