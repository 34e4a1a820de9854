"""Rows of one batch that join and leave between two steps: prefill, steps, and what prompts share.

transformers' continuous batching takes token ids alone, and a pruned prompt is embeddings; its caches and the
models' own `forward` do the work here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from prismprune.batches import Batch, Prefix, joined, roomy_cache
from prismprune.generation import Prefilled, Row
from prismprune.meters import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Mapping, Sequence

    from torch import Tensor

    from prismprune.caching import ByteCache
    from prismprune.families.base import Visual
    from prismprune.generation import Generated, GenerationOptions, Prompt
    from prismprune.replay import Replay

TokenEvent = tuple[Row, str]
"""A row has a new token; the text that is settled by it, often none."""
SIMILAR = 0.75
"""Prompts are prefilled together while the shortest has this share of the longest: padding is work, too."""
CPU_PREFILL_TOKENS = 640
"""Of several prompts together, on a CPU: so many fill it, and what more of them compute leaves its caches.
Eight prompts of 585 tokens took a tenth longer together than one by one."""


@dataclass(frozen=True)
class Decoder:
    """Generates with one model.

    end_ids: tokens that end an answer. placeholder_ids: tokens that stand for visual ones. visual_inputs: the
    visuals of a batch, row by row, to arguments of the model's `forward`. replay: recorded work of a
    model on CUDA.
    """

    model: Any
    tokenizer: Any
    end_ids: frozenset[int]
    placeholder_ids: frozenset[int]
    visual_inputs: Callable[[Sequence[Visual]], dict[str, Any]]
    replay: Replay | None = None

    def step(self, batch: Batch, tokens: list[int]) -> Tensor:
        """Feed one token a row; logits [B, vocabulary] of the next, good until the next step."""
        logits = None if self.replay is None else self.replay.step(batch, tokens)
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

    def prefix_length(self, prompt: Prompt) -> int:
        """Tokens up to the last visual one: every question about the same media begins with them.

        0 where there is none, or none behind it.
        """
        visual = torch.isin(prompt.token_ids, torch.tensor(sorted(self.placeholder_ids))).nonzero()
        length = int(visual[-1]) + 1 if len(visual) else 0
        return length if length < len(prompt.token_ids) else 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: Sequence[GenerationOptions],
        should_stop: Callable[[int], bool] | None = None,
    ) -> Generator[tuple[int, str], None, list[Generated]]:
        """Answer all prompts in one batch, with an event a token; the generator's value are the outcomes.

        `should_stop(row)` is asked before each token of a row; True ends it as "canceled".
        """
        running = Running(self)
        rows = running.join(prompts, options)
        places = {id(row): place for place, row in enumerate(rows)}
        while running.rows:
            if should_stop is not None:
                for place, row in enumerate(rows):
                    if row.finish_reason is None and should_stop(place):
                        row.cancel()
            for row, text in running.step():
                yield places[id(row)], text
        return [row.outcome() for row in rows]


class Running:
    """Answers in the making: rows join while others decode, and leave at their end.

    A step either chooses the first tokens of all that joined since the last one, from what their prefill has
    computed, or feeds every row's last token for its next. One thread at a time may use it.

    prefixes: where the beginnings of prompts whose media have a key are looked for and kept; None: nowhere.
    """

    def __init__(self, decoder: Decoder, prefixes: ByteCache[Prefix] | None = None) -> None:
        self._decoder = decoder
        self._prefixes = prefixes
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
        batch, logits = _Prefill(self._decoder, prompts, self._prefixes).run()
        prefill_ms = self._tick() - began_ms
        rows = [
            Row(
                self._decoder.tokenizer,
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
        likeliest = logits.argmax(-1).tolist()
        now_ms = self._tick()
        return [
            (row, row.take(scores, token, self._decoder.end_ids, now_ms))
            for row, scores, token in zip(rows, logits, likeliest, strict=True)
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


class _Prefill:
    """Runs prompts through the model, what several share once, and nothing of what is known before.

    A prompt has a prefix if another one of them shows the very same visuals, or an earlier one showed media
    of its key. Those without are run whole, and the prefix of one with a key is kept.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], known: ByteCache[Prefix] | None) -> None:
        self._decoder = decoder
        self._prompts = prompts
        self._known = known
        self._lengths = [decoder.prefix_length(prompt) for prompt in prompts]

    def run(self) -> tuple[Batch, Tensor]:
        """The prompts' batch, and logits [B, vocabulary] of their first tokens."""
        begun = self._prefixes()
        whole = {row: len(prompt.token_ids) for row, prompt in enumerate(self._prompts) if row not in begun}
        rests = {row: len(self._prompts[row].token_ids) - prefix.length for row, prefix in begun.items()}
        most_tokens = CPU_PREFILL_TOKENS if self._decoder.model.device.type == "cpu" else math.inf
        parts = [(rows, *self._whole(rows)) for rows in similar_lengths(whole, most_tokens)]
        # Rests are short: a run reads every weight for them, which costs more than padding.
        parts += [
            (rows, *self._extended([begun[row] for row in rows], rows))
            for rows in similar_lengths(rests, most_tokens, similar=0)
        ]
        places = [rows for rows, *_ in parts]
        order = torch.tensor([row for rows in places for row in rows]).argsort()
        logits = torch.cat([own for *_, own in parts])[order.to(self._decoder.model.device)]
        return joined([part for _, part, _ in parts], places), logits

    def _prefixes(self) -> dict[int, Prefix]:
        """Of the rows that have one."""
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for row, prompt in enumerate(self._prompts):
            alike[tuple(map(id, prompt.visuals)), self._begins(row)].append(row)
        begun: dict[int, Prefix] = {}
        for rows in alike.values():
            if not self._lengths[rows[0]]:
                continue
            prefix = self._remembered(rows[0])
            if prefix is None and len(rows) > 1:
                prefix = self._computed(rows[0])
            if prefix is not None:
                begun |= dict.fromkeys(rows, prefix)
        return begun

    def _begins(self, row: int) -> bytes:
        return self._prompts[row].token_ids[: self._lengths[row]].numpy().tobytes()

    def _key(self, row: int) -> Hashable | None:
        """What the prefix of that row is cached by, where it is."""
        key = self._prompts[row].media_key
        return None if key is None or self._known is None else (key, self._begins(row))

    def _remembered(self, row: int) -> Prefix | None:
        key = self._key(row)
        return None if key is None or self._known is None else self._known.get(key)

    def _remember(self, row: int, prefix: Prefix) -> None:
        key = self._key(row)
        if key is not None and self._known is not None:
            self._known.put(key, prefix)

    def _keeps(self, row: int, batch: Batch) -> bool:
        """Whether a copy of that row's prefix would be kept: one that is too large is not made."""
        if not self._lengths[row] or self._key(row) is None or self._known is None:
            return False
        return self._known.takes(batch.token_bytes * self._lengths[row])

    def _computed(self, row: int) -> Prefix:
        length = self._lengths[row]
        batch, _ = _extended(self._decoder, None, [self._prompts[row].beginning(length)], [0])
        prefix = Prefix.of(batch, 0, slice(0, length))
        self._remember(row, prefix)
        return prefix

    def _whole(self, rows: Sequence[int]) -> tuple[Batch, Tensor]:
        prompts = [self._prompts[row] for row in rows]
        batch, logits = _extended(self._decoder, None, prompts, [0] * len(rows))
        for place, row in enumerate(rows):
            if self._keeps(row, batch):
                begins_at = batch.mask.shape[1] - len(prompts[place].token_ids)
                self._remember(row, Prefix.of(batch, place, slice(begins_at, begins_at + self._lengths[row])))
        return batch, logits

    def _extended(self, prefixes: Sequence[Prefix], rows: Sequence[int]) -> tuple[Batch, Tensor]:
        prompts = [self._prompts[row] for row in rows]
        pairs = zip(prefixes, prompts, strict=True)
        batch = joined([prefix.batch(prompt.following) for prefix, prompt in pairs])
        return _extended(self._decoder, batch, prompts, [prefix.length for prefix in prefixes])


def _extended(
    decoder: Decoder, batch: Batch | None, prompts: Sequence[Prompt], starts: Sequence[int]
) -> tuple[Batch, Tensor]:
    """Feed each prompt's tokens from its start on, into a new batch if there is none; its rows' next logits.

    Visuals are given to the model with the beginning: nothing behind a later start shows one.
    """
    device = decoder.model.device
    longest = max(len(prompt.token_ids) - start for prompt, start in zip(prompts, starts, strict=True))
    # Any token serves as padding, as nothing attends to it, but for a placeholder, which would be filled.
    filler = int(prompts[0].token_ids[-1])
    ids, mask, positions = [], [], []
    for prompt, start in zip(prompts, starts, strict=True):
        own = prompt.token_ids[start:]
        missing = (longest - len(own), 0)
        ids.append(pad(own, missing, value=filler))
        mask.append(pad(torch.ones_like(own), missing))
        positions.append(pad(prompt.positions[..., start:], missing))
    axes = len(prompts[0].positions) if prompts[0].positions.ndim > 1 else None
    if batch is None:
        empty = torch.empty(len(prompts), 0, dtype=torch.long, device=device)
        following = torch.tensor([prompt.following for prompt in prompts], device=device)
        batch = Batch(roomy_cache(), empty, following, axes)
    shown = [] if any(starts) else [visual for prompt in prompts for visual in prompt.visuals]
    visual_inputs = decoder.visual_inputs(shown) if shown else {}
    logits = decoder.extend(
        batch,
        torch.stack(ids).to(device),
        torch.stack(mask).to(device),
        torch.stack(positions, dim=-2).to(device),
        visual_inputs,
    )
    return batch, logits


def similar_lengths(
    lengths: Mapping[int, int], most_tokens: float = math.inf, similar: float = SIMILAR
) -> list[list[int]]:
    """Groups of rows (row: length), in order, whose shortest has at least `similar` of its longest.

    Only a row by itself has more than `most_tokens`; those of a group count as long as its longest.
    """
    groups: list[list[int]] = []
    for row in sorted(lengths, key=lambda row: lengths[row]):
        group, length = groups[-1] if groups else [], lengths[row]
        if group and lengths[group[0]] >= similar * length and (len(group) + 1) * length <= most_tokens:
            group.append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]
