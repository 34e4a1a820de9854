"""Keys and values of rows that decode together: they grow, are padded to one another, and can be kept.

transformers' caches do the work. What is added is room behind the tokens, and rows that come and go.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from prismprune.cpu_layers import only_last_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

ROOM = 64
"""Tokens that a cache has room for when it has to grow: only every so many steps everything is copied."""


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, head_dim] of one layer, views of storage that has room behind them.

    `DynamicLayer` copies all of them for every token: at 8 rows of 600 tokens a seventh of the demo's step.
    Selecting rows, and whatever else replaces keys and values, gives the room up; the next token makes one.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._room: list[Tensor] = []
        self._views: tuple[Tensor, ...] = ()

    @classmethod
    def joined(
        cls, parts: Sequence[tuple[Tensor, Tensor]], places: Sequence[Sequence[int]], length: int
    ) -> Self:
        """One layer of several parts' keys and values, each part's rows at its places, padded to `length`.

        Everything is written once, to where the next tokens have room already.
        """
        layer = cls()
        layer.lazy_initialization(*parts[0])
        layer._room = [_placed(tensors, places, length) for tensors in zip(*parts, strict=True)]
        layer._show(length)
        return layer

    @classmethod
    def holding(cls, keys: Tensor, values: Tensor) -> Self:
        """These as they are, and not a copy: the next tokens make a room, and leave them alone."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return layer

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values, once there are any."""
        if self.keys is None or self.values is None:
            raise RuntimeError("nothing has been cached yet")
        return self.keys, self.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, heads, L, head_dim]; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Copies: what comes may be a view of queries, keys and values together.
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        length, added = self.tensors[0].shape[2], key_states.shape[2]
        if not self._has_room(length + added):
            self._room = [_roomy(tokens, length + added + ROOM) for tokens in self.tensors]
        keys, values = self._room
        keys.narrow(2, length, added).copy_(key_states)
        values.narrow(2, length, added).copy_(value_states)
        return self._show(length + added)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        """So many tokens of the room as keys and values."""
        keys, values = self._room
        self.keys, self.values = self._views = keys.narrow(2, 0, length), values.narrow(2, 0, length)
        return self._views

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. The old room goes at once: a layer's, not that of all layers, is held twice."""
        self._room, self._views = [], ()
        super().batch_select_indices(indices)

    def _has_room(self, length: int) -> bool:
        """Whether `keys` and `values` are what the room showed last, and it is long enough."""
        if not self._room or length > self._room[0].shape[2]:
            return False
        return self.keys is self._views[0] and self.values is self._views[1]


def _roomy(tokens: Tensor, length: int) -> Tensor:
    rows, heads, held, width = tokens.shape
    room = tokens.new_empty(rows, heads, length, width)
    room[:, :, :held] = tokens
    return room


def _placed(parts: Sequence[Tensor], places: Sequence[Sequence[int]], length: int) -> Tensor:
    """Parts [B, heads, T, head_dim] at their rows of one tensor, with zeros before what is shorter."""
    _, heads, _, width = parts[0].shape
    room = parts[0].new_empty(sum(map(len, places)), heads, length + ROOM, width)
    for part, rows in zip(parts, places, strict=True):
        missing, first = length - part.shape[2], 0
        for run in _runs(rows):
            here = slice(run[0], run[-1] + 1)
            room[here, :, :missing] = 0  # what is masked must still be a number
            room[here, :, missing:length] = part[first : first + len(run)]
            first += len(run)
    return room


def _runs(places: Sequence[int]) -> list[list[int]]:
    """`places` cut into stretches that count up by one, each of which is copied at once.

    Row by row, in every layer, a GPU waits longer for the copies to be launched than a decoding step takes.
    """
    stretches: list[list[int]] = []
    for place in places:
        if stretches and place == stretches[-1][-1] + 1:
            stretches[-1].append(place)
        else:
            stretches.append([place])
    return stretches


def roomy_cache(layers: Iterable[tuple[Tensor, Tensor]] = ()) -> Cache:
    """A cache that begins with copies of these keys and values [B, heads, T, head_dim], a layer each."""
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    for place, (keys, values) in enumerate(layers):
        cache.update(keys, values, place)
    return cache


@dataclass(slots=True, weakref_slot=True)
class Batch:
    """Rows that decode together.

    mask: [B, T] over the cache, 0 for padding. next_positions: [B], of each row's next token. axes: rows of
    position ids that the model takes, 3 for M-RoPE; None: one, which has no dimension of its own.
    """

    cache: Cache
    mask: Tensor
    next_positions: Tensor
    axes: int | None

    @property
    def layers(self) -> list[RoomyLayer]:
        """Of the cache."""
        return [layer for layer in self.cache.layers if isinstance(layer, RoomyLayer)]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one row takes in the cache: 2 * layers * kv heads * head_dim * itemsize."""
        tensors = [tensor for layer in self.layers for tensor in layer.tensors]
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)

    def keep(self, rows: list[int]) -> None:
        """Only these rows, in this order; one may come several times. Padding that all share goes."""
        if rows == list(range(len(self.mask))):
            return
        places = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(places)
        self.mask, self.next_positions = self.mask[places], self.next_positions[places]
        if spare := int(self.mask.any(dim=0).int().argmax()):
            self.mask = self.mask[:, spare:]
            for layer in self.layers:
                layer.keys, layer.values = (tensor[:, :, spare:] for tensor in layer.tensors)

    def step(self, model: Any, tokens: list[int]) -> Tensor:
        """Feed one token a row; logits [B, vocabulary] of the next."""
        ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        return self._logits(model, ids, self.advance())

    def advance(self) -> Tensor:
        """Let each row have one more token: its position, [B, 1] or [axes, B, 1]. The cache is as it was."""
        self.mask = pad(self.mask, (0, 1), value=1)
        positions = self.next_positions[:, None]
        self.next_positions = self.next_positions + 1
        return positions if self.axes is None else positions.expand(self.axes, -1, -1)

    def extend(
        self, model: Any, ids: Tensor, mask: Tensor, positions: Tensor, **visual_inputs: Any
    ) -> Tensor:
        """Feed `ids` [B, L], 0 in `mask` [B, L] for padding on the left; logits [B, vocabulary] after them.

        positions: [B, L], or [axes, B, L].
        """
        self.mask = torch.cat([self.mask, mask], dim=1)
        return self._logits(model, ids, positions, **visual_inputs)

    def _logits(self, model: Any, ids: Tensor, positions: Tensor, **visual_inputs: Any) -> Tensor:
        """[B, vocabulary] after `ids` [B, L], which `mask` knows of."""
        with only_last_row():
            output = model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
                **visual_inputs,
            )
        logits: Tensor = output.logits[:, -1]
        return logits


def joined(batches: Sequence[Batch], places: Sequence[Sequence[int]] | None = None) -> Batch:
    """One batch of all rows, padded on the left to the longest.

    places: for each batch the rows of the new one that become its own; None: one batch after the other.
    """
    ends = list(accumulate(len(batch.mask) for batch in batches))
    if places is None:
        places = [range(end - len(batch.mask), end) for end, batch in zip(ends, batches, strict=True)]
    order = torch.tensor([row for own in places for row in own], device=batches[0].mask.device).argsort()
    if len(batches) == 1:
        batches[0].keep(order.tolist())
        return batches[0]
    length = max(batch.mask.shape[1] for batch in batches)
    layers = [
        RoomyLayer.joined([layer.tensors for layer in own], places, length)
        for own in zip(*(batch.layers for batch in batches), strict=True)
    ]
    masks = torch.cat([pad(batch.mask, (length - batch.mask.shape[1], 0)) for batch in batches])
    positions = torch.cat([batch.next_positions for batch in batches])
    return Batch(Cache(layers=[*layers]), masks[order], positions[order], batches[0].axes)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a prompt's first L tokens leave in the cache: keys and values [1, heads, L, head_dim] a layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    axes: int | None

    @classmethod
    def of(cls, batch: Batch, row: int, *columns: slice) -> Prefix:
        """A copy of a row's tokens in these columns of the cache, which have no padding among them."""

        def copy(held: Tensor) -> Tensor:
            return torch.cat([held[row : row + 1, :, stretch] for stretch in columns], dim=2)

        layers = [(copy(keys), copy(values)) for keys, values in (layer.tensors for layer in batch.layers)]
        return cls(tuple(layers), batch.axes)

    @property
    def length(self) -> int:
        """Tokens."""
        return self.layers[0][0].shape[2]

    @property
    def bytes(self) -> int:
        """What it takes of the device's memory."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def batch(self, following: int) -> Batch:
        """Of one row, to be extended, which leaves the prefix as it is.

        following: the position of what comes after all of the prompt.
        """
        device = self.layers[0][0].device
        mask = torch.ones(1, self.length, dtype=torch.long, device=device)
        positions = torch.full((1,), following, device=device)
        cache = Cache(layers=[RoomyLayer.holding(*own) for own in self.layers])
        return Batch(cache, mask, positions, self.axes)
