r"""Many questions about one picture in one forward pass.

A row holds the shared prefix `<|im_start|> <visual tokens> \\n` once and behind it each question with its
answer as a block. A block sees the prefix and itself, never another block, and its positions go on from the
prefix: what the model computes for a block is what it would compute for that question alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from prismprune.demo.questions import Question

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows for the language model. `visual` is where the B x V visual embeddings go.

    ids [B, L] (0 under visual tokens), visual [B, L] bool, positions [B, L], mask [B, 1, L, L]: true where
    one looks, labels [B, L]: the token that should follow, IGNORED where nothing is asked, block [B, L]: the
    question's number, -1 elsewhere.
    """

    ids: Tensor
    visual: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    block: Tensor


class Packer:
    """Builds packs in the demo's own prompt format (its chat template renders the same tokens)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        (self._start,) = self._encode("<|im_start|>")
        (self._end,) = self._encode("<|im_end|>")
        self._newline = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def pack(self, questions: Sequence[Sequence[Question]], visual_counts: Sequence[int]) -> Pack:
        """Pack a row a subject; each of its `len(visual_counts)` images has so many tokens in every row."""
        rows = [self._row(asked, visual_counts) for asked in questions]
        length = max(len(ids) for ids, *_ in rows)
        fields = [
            torch.tensor([field + [fill] * (length - len(field)) for field in column])
            for column, fill in zip(zip(*rows, strict=True), (self._end, 0, 0, IGNORED, -2), strict=True)
        ]
        ids, visual, positions, labels, block = fields
        return Pack(ids, visual.bool(), positions, _mask(block), labels, block)

    def _row(self, asked: Sequence[Question], visual_counts: Sequence[int]) -> tuple[list[int], ...]:
        ids, visual = [self._start], [0]
        for count in visual_counts:
            ids += [0] * count + self._newline
            visual += [1] * count + [0] * len(self._newline)
        prefix = len(ids)
        positions, labels, block = list(range(prefix)), [IGNORED] * prefix, [-1] * prefix
        for number, question in enumerate(asked):
            prompt, answer = [*self._encode(question.text), self._end], self._encode(question.answer)
            tokens = prompt + answer
            ids += tokens
            visual += [0] * len(tokens)
            positions += range(prefix, prefix + len(tokens))
            labels += [IGNORED] * (len(prompt) - 1) + answer + [self._end]
            block += [number] * len(tokens)
        return ids, visual, positions, labels, block


def _mask(block: Tensor) -> Tensor:
    """Mask [B, 1, L, L], true where one looks: causal, and only within the prefix and one's own block."""
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    to_prefix = (block == -1)[:, None, :]
    same = block[:, :, None] == block[:, None, :]
    return (causal & (to_prefix | same))[:, None]


def hidden_states(language: Any, embeddings: Tensor, pack: Pack, visual: Tensor) -> Tensor:
    """Last hidden states [B, L, d] over a pack whose visual places hold `visual` [*, d] in order.

    On the device and in the number format of `embeddings` [V, d], wherever the pack is.
    """
    embedded = embeddings[pack.ids]
    embedded[pack.visual] = visual.reshape(-1, visual.shape[-1])
    unseen = ~pack.mask.to(embedded.device)
    mask = embedded.new_zeros(pack.mask.shape).masked_fill(unseen, torch.finfo(embedded.dtype).min)
    positions = pack.positions.to(embedded.device)
    output = language(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
