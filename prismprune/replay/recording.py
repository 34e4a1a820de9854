"""CUDA graphs: how one is recorded, which are kept, and a pass of a language model that can be one."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from prismprune.batches import Batch

log = logging.getLogger(__name__)

LATER = 1000
"""What memory was too short for, or what was dropped, is recorded once it was wanted so many times more."""
RECORDING = threading.Lock()
"""Held by the thread that records. A recording begins by waiting for the whole device, which CUDA refuses
while another thread's is under way, and torch has one stream for all of them."""

Record = Callable[[Callable[[], None], Any], Callable[[], None]]
"""Makes of a function, which it may call, one that does the same on the same tensors; given a memory pool."""


def recorded(run: Callable[[], None], pool: Any) -> Callable[[], None]:
    """A CUDA graph of what `run` does, once called for it, on the same tensors; with its memory in `pool`."""
    here = torch.cuda.current_stream()
    beside = torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        run()  # what is made at a first call, such as a library's workspace, is no part of a graph
    here.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # Of its own, torch does not come back to this stream from a recording that fails. Another thread may be
    # encoding meanwhile, and allocate.
    with torch.cuda.stream(here), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


class Recordable(Protocol):
    """Work on tensors that stay where they are. replay: `run`, until it was recorded."""

    replay: Callable[[], None]

    def run(self) -> None:
        """Do it, and leave what comes of it in tensors of its own."""


K = TypeVar("K", bound=Hashable)
R = TypeVar("R", bound=Recordable)


class Recordings(Generic[K, R]):
    """At most `most` recordings by their size, the one unused for longest dropped first.

    They share memory: nothing that one left behind is there after another's replay.

    patience: how often a size is wanted before it is recorded, which takes as long as doing it some times.
    """

    def __init__(self, record: Record, *, most: int, patience: int) -> None:
        self._record = record
        self._most = most
        self._patience = patience
        self._pool: Any = None
        self._made: OrderedDict[K, R] = OrderedDict()
        self._wanted: Counter[K] = Counter()
        self.usable = True
        """Whether recording has not failed for good."""

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[R]:
        return iter(self._made.values())

    def find(self, size: K, make: Callable[[], R]) -> R | None:
        """The recording of that size, made of what `make` gives when it is time; None where there is none."""
        if (found := self._made.get(size)) is not None:
            self._made.move_to_end(size)
            return found
        self._wanted[size] += 1
        if not self.usable or self._wanted[size] < self._patience:
            return None
        try:
            made = make()
            with RECORDING:
                made.replay = self._record(made.run, self._memory())
        except RuntimeError as error:
            self._failed(size, error)
            return None
        self._made[size] = made
        if len(self._made) > self._most:
            dropped, _ = self._made.popitem(last=False)
            self._wanted[dropped] = -LATER  # many sizes in turns would be recorded for ever
        return made

    def clear(self) -> None:
        """Drop all."""
        self._made.clear()
        self._pool = None

    def _memory(self) -> Any:
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def _failed(self, size: K, error: RuntimeError) -> None:
        """Memory is short for now, or this model decides by its values what to launch, as it always will."""
        if isinstance(error, torch.OutOfMemoryError):
            self._wanted[size] = -LATER
        else:
            self.usable = False
        log.warning("%s is not recorded as a CUDA graph: %s", size, type(error).__name__)


class FixedLayer(DynamicLayer):
    """Keys and values [R, heads, C, head_dim] that stay where they are; new ones go to `columns` [q]."""

    def __init__(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._columns = columns

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [R, heads, q, head_dim]; returns all, what is masked included."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise RuntimeError("a fixed layer was reset")
        keys.index_copy_(2, self._columns, key_states)
        values.index_copy_(2, self._columns, value_states)
        return keys, values


class Arena:
    """Room for `tokens` of one batch at a time: keys and values of each layer, in rows and columns."""

    def __init__(self, batch: Batch, tokens: int) -> None:
        self.tokens = tokens
        # What is masked must still be a number.
        self._layers = [
            tuple(own.new_zeros(tokens, own.shape[1], own.shape[3]) for own in layer.tensors)
            for layer in batch.layers
        ]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for layer in self._layers for tensor in layer)

    def lent_to(self, batch: Batch) -> bool:
        """Whether any of the batch's keys and values are views of this."""
        own = {tensor.untyped_storage().data_ptr() for layer in self._layers for tensor in layer}
        held = [tensor for layer in batch.layers for tensor in layer.tensors]
        return any(tensor.untyped_storage().data_ptr() in own for tensor in held)

    def views(self, rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [rows, heads, columns, head_dim] of each layer."""

        def view(room: Tensor) -> Tensor:
            return room[: rows * columns].view(rows, room.shape[1], columns, room.shape[2])

        return [(view(keys), view(values)) for keys, values in self._layers]


class Pass:
    """q tokens of R rows through a language model and its head, with C columns of keys and values.

    embeds: [R, q, d]. positions: [R, q], or [axes, R, q]. mask: [R, 1, q, C], False for what a token does not
    see; each has to see something. columns: [q], where their keys and values go. logits: [R, vocabulary],
    after the last of them.
    """

    def __init__(
        self, model: Any, layers: Sequence[tuple[Tensor, Tensor]], queries: int, axes: int | None
    ) -> None:
        keys = layers[0][0]
        rows, _, width, _ = keys.shape
        weight = model.get_input_embeddings().weight
        self._model = model
        self.layers = layers
        self.embeds = torch.zeros(rows, queries, weight.shape[1], dtype=weight.dtype, device=keys.device)
        shape = (rows, queries) if axes is None else (axes, rows, queries)
        self.positions = torch.zeros(shape, dtype=torch.long, device=keys.device)
        self.mask = torch.zeros(rows, 1, queries, width, dtype=torch.bool, device=keys.device)
        self.columns = torch.zeros(queries, dtype=torch.long, device=keys.device)
        self._cache = Cache(layers=[FixedLayer(*own, self.columns) for own in layers])
        self.logits = torch.zeros(0, device=keys.device)
        self.replay: Callable[[], None] = self.run

    def run(self) -> None:
        """The pass."""
        output = self._model(
            inputs_embeds=self.embeds,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]


def power_of_two(number: int) -> int:
    """The least that is at least `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def rounded_up(number: int) -> int:
    """To a power of two, or to one and a half times one: by half of `number` at most."""
    whole = power_of_two(number)
    return whole * 3 // 4 if whole >= 4 and number <= whole * 3 // 4 else whole
