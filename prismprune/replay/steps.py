"""Decoding steps: the batch's keys and values lie in one place while its rows stay the same."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from prismprune.batches import RoomyLayer, roomy_cache
from prismprune.replay.recording import Arena, Pass, Record, Recordings, power_of_two, rounded_up

if TYPE_CHECKING:
    from torch import Tensor

    from prismprune.batches import Batch

LEAST_COLUMNS = 128
"""Columns are this many, or one and a half times that, or that times two, and so on: few sizes are recorded,
and attention looks at a third of empty room at most."""
LEAST_TOKENS = 2048
"""The arena's, where they may be so many: when it grows, all sizes are recorded anew."""
MOST_RECORDINGS = 48


@dataclass(frozen=True, slots=True)
class StepSize:
    """Of a recorded step: R rows and C columns."""

    rows: int
    columns: int

    @classmethod
    def of(cls, rows: int, length: int) -> StepSize:
        """The least that holds so many rows, of `length` and one more token."""
        half = LEAST_COLUMNS // 2
        return cls(power_of_two(rows), max(LEAST_COLUMNS, rounded_up(length // half + 1) * half))

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


class _Step(Pass):
    """One token of each row; goes on by itself to the next column and positions."""

    def __init__(self, model: Any, arena: Arena, size: StepSize, axes: int | None) -> None:
        super().__init__(model, arena.views(size.rows, size.columns), 1, axes)
        self.size = size

    def run(self) -> None:
        """Rows behind the batch's last one see themselves alone."""
        self.mask.index_fill_(3, self.columns, value=True)
        super().run()
        self.positions += 1
        self.columns += 1

    def sit(self, batch: Batch) -> None:
        """Take the batch's rows in, into the first rows and columns."""
        rows, length = batch.mask.shape
        for (keys, values), layer in zip(self.layers, batch.layers, strict=True):
            own_keys, own_values = layer.tensors
            keys[:rows, :, :length] = own_keys
            values[:rows, :, :length] = own_values
        self.mask.zero_()
        self.mask[:rows, 0, 0, :length] = batch.mask.bool()
        self.positions.zero_()
        self.positions[..., :rows, 0] = batch.next_positions
        self.columns.fill_(length)


@dataclass
class _Seated:
    """The batch whose keys and values are in the arena, and not in its own cache. taken: steps since then."""

    batch: weakref.ref[Batch]
    step: _Step
    taken: int = 0

    def length(self, batch: Batch) -> int:
        return batch.mask.shape[1] + self.taken


class StepReplay:
    """Recorded steps of one model, for one batch at a time. See `Replay`.

    max_bytes: how much the arena may take; a larger batch takes plain steps.
    """

    def __init__(self, model: Any, max_bytes: int, record: Record) -> None:
        self.max_bytes = max_bytes
        self._model = model
        self._embed = model.get_input_embeddings()
        self._arena: Arena | None = None
        self._seated: _Seated | None = None
        self._released: weakref.ref[Batch] | None = None
        # A batch takes many steps of one size, so the first is worth a recording.
        self.recordings: Recordings[StepSize, _Step] = Recordings(record, most=MOST_RECORDINGS, patience=1)

    @property
    def bytes(self) -> int:
        """What the arena takes."""
        return 0 if self._arena is None else self._arena.bytes

    def step(self, batch: Batch, tokens: list[int]) -> Tensor | None:
        """Feed one token a row; logits [B, vocabulary], good until the next call.

        None, and nothing done, where the batch has to take a plain step.
        """
        if (seated := self._seat(batch)) is None:
            return None
        step = seated.step
        step.embeds[: len(tokens), 0] = self._embed(torch.tensor(tokens, device=step.embeds.device))
        step.replay()
        seated.taken += 1
        return step.logits[: len(tokens)]

    def release(self, batch: Batch) -> None:
        """Give a batch its keys and values back, as views of the arena until somebody sits there.

        Whoever takes rows out or puts others beside them copies them anyway.
        """
        if (seated := self._seated) is not None and seated.batch() is batch:
            self._seated, self._released = None, seated.batch
            _give_back(seated, batch)

    def clear(self) -> None:
        """Give up all memory."""
        self._evict()
        self._arena = None
        self.recordings.clear()

    def _seat(self, batch: Batch) -> _Seated | None:
        seated = self._seated
        if seated is None or seated.batch() is not batch:
            self._evict()
            seated = None
        length = batch.mask.shape[1] if seated is None else seated.length(batch)
        size = StepSize.of(len(batch.mask), length)
        if seated is not None and seated.step.size == size:
            return seated
        self._evict()  # it has outgrown its columns
        if size.tokens * batch.token_bytes > self.max_bytes:
            return None
        if (step := self.recordings.find(size, partial(self._prepared, batch, size))) is None:
            if not self.recordings.usable:
                self.clear()
            return None
        step.sit(batch)
        batch.cache = roomy_cache()  # its memory is free
        self._seated = _Seated(weakref.ref(batch), step)
        return self._seated

    def _evict(self) -> None:
        """Whoever sits in the arena, or still has views of it, takes along what is there."""
        if (seated := self._seated) is not None and (batch := seated.batch()) is not None:
            self.release(batch)
        self._seated = None
        batch = None if self._released is None else self._released()
        if batch is not None and self._arena is not None and self._arena.lent_to(batch):
            batch.cache = roomy_cache(layer.tensors for layer in batch.layers)
        self._released = None

    def _prepared(self, batch: Batch, size: StepSize) -> _Step:
        """A step of that size with the batch in it, as it can be recorded."""
        arena = self._arena
        if arena is None or size.tokens > arena.tokens:
            # By powers of two, as a larger one has all sizes recorded anew.
            self.clear()
            most = self.max_bytes // batch.token_bytes
            arena = self._arena = Arena(batch, min(most, max(LEAST_TOKENS, power_of_two(size.tokens))))
        step = _Step(self._model, arena, size, batch.axes)
        step.sit(batch)
        return step


def _give_back(seated: _Seated, batch: Batch) -> None:
    """Views of the arena in place of what was taken into it, and the mask of all tokens since."""
    rows, length = len(batch.mask), seated.length(batch)
    batch.cache = Cache(
        layers=[
            RoomyLayer.holding(keys[:rows, :, :length], values[:rows, :, :length])
            for keys, values in seated.step.layers
        ]
    )
    batch.mask = torch.cat([batch.mask, batch.mask.new_ones(rows, seated.taken)], dim=1)
    batch.next_positions = batch.next_positions + seated.taken
