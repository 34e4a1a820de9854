"""Prompts, or what follows a known beginning: their keys and values are copied out after each pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from prismprune.replay.recording import Arena, Pass, Record, Recordings, rounded_up

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from prismprune.batches import Batch

MOST_TOKENS = 2048
"""Rows times columns: more keep the device busy for as long as launching takes."""
MOST_RECORDINGS = 32
STEPS = ((64, 16), (256, 32), (512, 64), (1024, 128), (MOST_TOKENS, 256))
"""Up to how many tokens lengths are rounded to a multiple of what: by less than 32, or than a quarter."""


def rounded(tokens: int) -> int:
    """Up, so that few sizes are recorded."""
    step = next((step for most, step in STEPS if tokens <= most), MOST_TOKENS)
    return -(-tokens // step) * step


@dataclass(frozen=True, slots=True)
class PromptSize:
    """R rows of so many tokens (`queries`) behind so many known ones (`known`)."""

    rows: int
    known: int
    queries: int

    @classmethod
    def of(cls, rows: int, known: int, queries: int) -> PromptSize:
        """With all of them rounded up: who comes together under load is another number each time."""
        return cls(rounded_up(rows), rounded(known), rounded(queries))

    @property
    def columns(self) -> int:
        return self.known + self.queries


class _Prompts(Pass):
    """Rows of prompts, padded on the left: what is known ends where the new tokens begin."""

    def __init__(self, model: Any, arena: Arena, size: PromptSize, axes: int | None) -> None:
        super().__init__(model, arena.views(size.rows, size.columns), size.queries, axes)
        self._size = size
        places = torch.arange(size.columns, device=self.columns.device)
        self.columns.copy_(places[size.known :])
        self._before = places <= self.columns[:, None]  # [q, C]
        self._itself = places == self.columns[:, None]  # padding, too, has to see something
        self.mask.copy_(self._itself)  # and what is seen while recording: what comes of nothing is no number

    def fill(self, batch: Batch, embeds: Tensor, mask: Tensor, positions: Tensor) -> None:
        """What `Batch.extend` is given, and the batch's keys and values so far."""
        rows, length = mask.shape
        known, end = batch.mask.shape[1], self._size.known
        for (keys, values), layer in zip(self.layers, batch.layers, strict=False):  # none yet: a new batch
            own_keys, own_values = layer.tensors
            keys[:rows, :, end - known : end] = own_keys
            values[:rows, :, end - known : end] = own_values
        there = torch.zeros_like(self.mask[:, :, 0])  # [R, 1, C]
        there[:rows, 0, end - known : end] = batch.mask.bool()
        there[:rows, 0, self._size.columns - length :] = mask.bool()
        self.mask.copy_(there[:, :, None] & self._before | self._itself)
        self.embeds.zero_()
        self.embeds[:rows, self._size.queries - length :] = embeds
        self.positions.zero_()
        self.positions[..., :rows, self._size.queries - length :] = positions


class PromptReplay:
    """Recorded passes over prompts of one model. See `Replay`.

    max_bytes: how much their place may take; larger ones are passed through the model as ever.
    """

    def __init__(self, model: Any, max_bytes: int, record: Record) -> None:
        self.max_bytes = max_bytes
        self._model = model
        self._arena: Arena | None = None
        self.recordings: Recordings[PromptSize, _Prompts] = Recordings(
            record, most=MOST_RECORDINGS, patience=2
        )

    @property
    def bytes(self) -> int:
        """What the place takes."""
        return 0 if self._arena is None else self._arena.bytes

    def extend(
        self, batch: Batch, ids: Tensor, mask: Tensor, positions: Tensor, visual_inputs: Mapping[str, Any]
    ) -> Tensor | None:
        """Feed `ids` [B, L] as `Batch.extend` does; logits [B, vocabulary].

        None, and nothing done, where they have to be passed through the model as ever: they are too many, it
        is too early to record their size, or it is not known yet what keys and values look like.
        """
        rows, length = ids.shape
        size = PromptSize.of(rows, batch.mask.shape[1], length)
        if self._arena is None or size.rows * size.columns > self._arena.tokens:
            return None
        make = partial(_Prompts, self._model, self._arena, size, batch.axes)
        if (prompts := self.recordings.find(size, make)) is None:
            if not self.recordings.usable:
                self.clear()
            return None
        prompts.fill(batch, embedded(self._model, ids, positions, visual_inputs), mask, positions)
        prompts.replay()
        for place, (keys, values) in enumerate(prompts.layers):
            own = (keys[:rows, :, -length:].clone(), values[:rows, :, -length:].clone())
            batch.cache.update(*own, place)
        batch.mask = torch.cat([batch.mask, mask], dim=1)
        return prompts.logits[:rows].clone()

    def learn(self, batch: Batch) -> None:
        """From a batch that has passed through the model: what keys and values look like."""
        tokens = min(MOST_TOKENS, self.max_bytes // batch.token_bytes)
        if self._arena is None and tokens and self.recordings.usable:
            try:
                self._arena = Arena(batch, tokens)
            except torch.OutOfMemoryError:
                self.max_bytes = 0

    def clear(self) -> None:
        """Give up all memory."""
        self._arena = None
        self.recordings.clear()


class _EmbeddedError(Exception):
    """Leaves the model's forward where its language model would begin."""

    def __init__(self, embeds: Tensor) -> None:
        super().__init__()
        self.embeds = embeds


def embedded(model: Any, ids: Tensor, positions: Tensor, visual_inputs: Mapping[str, Any]) -> Tensor:
    """[B, L, d], what the model's own forward gives to its language model: words, and visuals among them."""
    if not visual_inputs:
        embeds: Tensor = model.get_input_embeddings()(ids)
        return embeds

    def leave(_module: Any, _args: Any, kwargs: dict[str, Any]) -> NoReturn:
        raise _EmbeddedError(kwargs["inputs_embeds"])

    hook = model.model.language_model.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        model(input_ids=ids, position_ids=positions, **visual_inputs)
    except _EmbeddedError as found:
        return found.embeds
    finally:
        hook.remove()
    raise RuntimeError("the model did not come to its language model")
