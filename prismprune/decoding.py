"""Rows of one batch that join and leave between two steps.

transformers' continuous batching takes token ids alone, and a pruned prompt is embeddings; its caches and the
models' own `forward` do the work here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from prismprune.batches import Batch, joined
from prismprune.generation import Prefilled, Row
from prismprune.meters import Stopwatch
from prismprune.prefill import Kept, Prefill
from prismprune.sampling import next_tokens
from prismprune.text_stream import Spelling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from prismprune.batches import Prefix
    from prismprune.caching import ByteCache
    from prismprune.cpu_steps import CpuSteps
    from prismprune.families.base import Visual
    from prismprune.generation import GenerationOptions, Prompt
    from prismprune.replay import Replay

TokenEvent = tuple[Row, str]
"""A row has a new token; the text that is settled by it, often none."""


@dataclass(frozen=True)
class Decoder:
    """Generates with one model.

    end_ids: tokens that end an answer. placeholder_ids: tokens that stand for visual ones. visual_inputs: the
    visuals of a batch, row by row, to arguments of the model's `forward`. replay: recorded work of a
    model on CUDA. cpu_steps: its steps on a CPU, where they can be taken past what lies around its layers.
    """

    model: Any
    tokenizer: Any
    end_ids: frozenset[int]
    placeholder_ids: frozenset[int]
    visual_inputs: Callable[[Sequence[Visual]], dict[str, Any]]
    replay: Replay | None = None
    cpu_steps: CpuSteps | None = None

    @cached_property
    def spelling(self) -> Spelling:
        """Of its tokenizer."""
        return Spelling(self.tokenizer)

    def step(self, batch: Batch, tokens: list[int]) -> Tensor:
        """Feed one token a row; logits [B, vocabulary] of the next, good until the next step."""
        fast = self.replay or self.cpu_steps
        logits = None if fast is None else fast.step(batch, tokens)
        return batch.step(self.model, tokens) if logits is None else logits

    def extend(
        self, batch: Batch, ids: Tensor, mask: Tensor, positions: Tensor, visual_inputs: dict[str, Any]
    ) -> Tensor:
        """As `Batch.extend`."""
        if self.replay is None:
            return batch.extend(self.model, ids, mask, positions, **visual_inputs)
        logits = self.replay.extend(batch, ids, mask, positions, visual_inputs)
        if logits is None:
            logits = batch.extend(self.model, ids, mask, positions, **visual_inputs)
            self.replay.prompts.learn(batch)
        return logits

    def release(self, batch: Batch) -> None:
        """Before anything but a step: a batch's keys and values may be where the next step writes."""
        if self.replay is not None:
            self.replay.release(batch)

    def beginnings(self, prompt: Prompt) -> tuple[int, int]:
        """Tokens before the first visual one, and up to the last.

        Every prompt with the same system text begins with the former, every question about the same media
        with the latter. 0 where there is no visual one, the latter also where nothing is behind it.
        """
        visual = torch.isin(prompt.token_ids, torch.tensor(sorted(self.placeholder_ids))).nonzero()
        if not len(visual):
            return 0, 0
        first, last = int(visual[0]), int(visual[-1])
        return first, last + 1 if last + 1 < len(prompt.token_ids) else 0


class Running:
    """Answers in the making: rows join while others decode, and leave at their end.

    A step either chooses the first tokens of all that joined since the last one, from what their prefill has
    computed, or feeds every row's last token for its next. One thread at a time may use it.

    prefixes: where the beginnings of prompts whose media have a key are looked for and kept, and the texts
    before media that come again; None: nowhere.
    """

    def __init__(self, decoder: Decoder, prefixes: ByteCache[Prefix] | None = None) -> None:
        self._decoder = decoder
        self._kept = None if prefixes is None else Kept(prefixes)
        self._watch = Stopwatch(decoder.model.device)
        self._now_ms = 0.0
        self._batch: Batch | None = None
        self._decoding: list[Row] = []
        self._joining: list[tuple[list[Row], Batch, Tensor]] = []

    @property
    def rows(self) -> list[Row]:
        """Those that have not ended."""
        return [*self._decoding, *(row for rows, *_ in self._joining for row in rows)]

    @torch.inference_mode()
    def join(self, prompts: Sequence[Prompt], options: Sequence[GenerationOptions]) -> list[Row]:
        """Prefill the prompts and take them in; returns their rows.

        Prompts that begin alike and show the very same `Visual`s have that beginning computed once.
        """
        began_ms = self._tick()
        batch, logits = Prefill(self._decoder, prompts, self._kept).run()
        prefill_ms = self._tick() - began_ms
        rows = [
            Row(
                self._decoder.spelling,
                own,
                Prefilled(len(prompt.token_ids), batch.token_bytes, prefill_ms, self._now_ms),
            )
            for prompt, own in zip(prompts, options, strict=True)
        ]
        self._joining.append((rows, batch, logits))
        return rows

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """A token for every row, or the first one for those that joined, with the text settled by it.

        Rows that end by it leave; one that was canceled leaves without a token.
        """
        if self._joining:
            rows, batch, logits = self._joining.pop(0)
            events = self._take(rows, logits)
            self._admit(rows, batch)
            return events
        self._dismiss()
        if self._batch is None:
            return []
        logits = self._decoder.step(self._batch, [row.token_ids[-1] for row in self._decoding])
        events = self._take(self._decoding, logits)
        self._dismiss()
        return events

    def _take(self, rows: Sequence[Row], logits: Tensor) -> list[TokenEvent]:
        tokens = next_tokens(logits, [row.dice for row in rows])
        now_ms = self._tick()
        return [
            (row, row.take(token, self._decoder.end_ids, now_ms))
            for row, token in zip(rows, tokens, strict=True)
            if row.finish_reason is None
        ]

    def _admit(self, rows: Sequence[Row], batch: Batch) -> None:
        staying = [place for place, row in enumerate(rows) if row.finish_reason is None]
        if staying:
            batch.keep(staying)
            self._decoding += [rows[place] for place in staying]
            if self._batch is not None:
                self._decoder.release(self._batch)
            self._batch = batch if self._batch is None else joined([self._batch, batch])

    def _dismiss(self) -> None:
        """Drop the rows that have ended."""
        staying = [place for place, row in enumerate(self._decoding) if row.finish_reason is None]
        if len(staying) == len(self._decoding):
            return
        self._decoding = [self._decoding[place] for place in staying]
        if self._batch is not None and staying:
            self._decoder.release(self._batch)
            self._batch.keep(staying)
        else:
            self._batch = None

    def _tick(self) -> float:
        self._now_ms += self._watch.lap_ms()
        return self._now_ms
