"""Decoding steps that CUDA replays: one launch a step in place of some fifteen for each layer.

A step of few rows is little work in many kernels, and a fast device waits for who launches them. What is
recorded has fixed addresses and shapes: keys and values lie in an arena with room behind them, rows and
columns are rounded up, and a mask hides what is not there. transformers' own way, `StaticCache` with
`torch.compile`, holds one batch from its prefill to its end; here rows come and go.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from prismprune.batches import roomy_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from prismprune.batches import Batch

log = logging.getLogger(__name__)

LEAST_COLUMNS = 256
"""Columns are this many, or that times a power of two, or one and a half times that: few sizes are recorded,
and attention looks at a third of empty room at most."""


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


class _FixedLayer(DynamicLayer):
    """Keys and values [R, heads, C, head_dim] at a fixed place; a token goes to one column of all rows."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._column = column

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [R, heads, 1, head_dim]; returns all, what lies behind the column included."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise RuntimeError("a fixed layer was reset")
        keys.index_copy_(2, self._column, key_states)
        values.index_copy_(2, self._column, value_states)
        return keys, values


@dataclass(frozen=True, slots=True)
class _Size:
    """Of a recorded step: R rows and C columns."""

    rows: int
    columns: int

    @classmethod
    def of(cls, rows: int, length: int) -> _Size:
        """The least that holds so many rows, of `length` and one more token."""
        columns = LEAST_COLUMNS
        while columns <= length:
            columns = columns * 3 // 2 if columns & (columns - 1) == 0 else columns * 4 // 3
        return cls(_power_of_two(rows), columns)

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@dataclass
class _Arena:
    """Room for one batch at a time: keys and values [tokens, heads, head_dim] of each layer."""

    tokens: int
    layers: list[tuple[Tensor, ...]]

    @classmethod
    def like(cls, batch: Batch, tokens: int) -> _Arena:
        """For the layers of that batch."""
        # What is masked must still be a number.
        layers = [
            tuple(own.new_zeros(tokens, own.shape[1], own.shape[3]) for own in layer.tensors)
            for layer in batch.layers
        ]
        return cls(tokens, layers)

    def views(self, size: _Size) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [R, heads, C, head_dim] of each layer."""
        return [(_view(keys, size), _view(values, size)) for keys, values in self.layers]


def _view(room: Tensor, size: _Size) -> Tensor:
    _, heads, width = room.shape
    return room[: size.tokens].view(size.rows, heads, size.columns, width)


class _Step:
    """One decoding step of a size, on tensors that stay where they are.

    ids, positions: [R, 1]. mask: [R, 1, 1, C], False for what is not there. column: [1], the next one.
    logits: [R, vocabulary].
    """

    def __init__(self, model: Any, arena: _Arena, size: _Size, axes: int | None) -> None:
        device = arena.layers[0][0].device
        self._model = model
        self._axes = axes
        self.size = size
        self.ids = torch.zeros(size.rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.zeros(size.rows, 1, 1, size.columns, dtype=torch.bool, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.layers = arena.views(size)
        self._cache = Cache(layers=[_FixedLayer(*own, self.column) for own in self.layers])
        self.logits: Tensor | None = None
        self.replay: Callable[[], None] = self.run

    def run(self) -> None:
        """The step itself; those behind the batch's last row see themselves alone."""
        self.mask.index_fill_(3, self.column, value=True)
        positions = self.positions if self._axes is None else self.positions.expand(self._axes, -1, -1)
        output = self._model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]
        self.positions += 1
        self.column += 1

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
        self.positions[:rows, 0] = batch.next_positions
        self.column.fill_(length)


@dataclass
class _Seated:
    """The batch whose keys and values are in the arena, and not in its own cache. taken: steps since then."""

    batch: weakref.ref[Batch]
    step: _Step
    taken: int = 0

    def length(self, batch: Batch) -> int:
        return batch.mask.shape[1] + self.taken


@dataclass
class StepGraphs:
    """Recorded steps of one model, as they are needed, for one batch at a time.

    max_bytes: how much the arena may take; a larger batch takes plain steps. record: see `recorded`.
    One thread at a time may use it, and within `torch.inference_mode`, as `Running` does.
    """

    model: Any
    max_bytes: int
    record: Callable[[Callable[[], None], Any], Callable[[], None]] = recorded
    _arena: _Arena | None = None
    _steps: dict[_Size, _Step] = field(default_factory=dict)
    _pool: Any = None
    _seated: _Seated | None = None

    def step(self, batch: Batch, tokens: list[int]) -> Tensor | None:
        """Feed one token a row; logits [B, vocabulary], good until the next call.

        None, and nothing done, where the batch has to take a plain step.
        """
        if not (seated := self._seat(batch)):
            return None
        step = seated.step
        step.ids[: len(tokens), 0] = torch.tensor(tokens, device=step.ids.device)
        step.replay()
        seated.taken += 1
        return None if step.logits is None else step.logits[: len(tokens)]

    def release(self, batch: Batch) -> None:
        """Give a batch its keys and values back, as views of the arena: to be read before the next step."""
        if (seated := self._seated) and seated.batch() is batch:
            self._seated = None
            _give_back(seated, batch)

    @property
    def bytes(self) -> int:
        """What the arena takes."""
        layers = [] if self._arena is None else self._arena.layers
        return sum(tensor.nbytes for layer in layers for tensor in layer)

    def clear(self) -> None:
        """Give up all memory."""
        self._evict()
        self._arena, self._pool = None, None
        self._steps.clear()

    def _seat(self, batch: Batch) -> _Seated | None:
        seated = self._seated
        here = seated is not None and seated.batch() is batch
        length = seated.length(batch) if seated and here else batch.mask.shape[1]
        size = _Size.of(len(batch.mask), length)
        if seated and here and seated.step.size == size:
            return seated
        if seated and here:
            self.release(batch)
            _own(batch)
        self._evict()
        if (step := self._step_of(batch, size)) is None:
            return None
        step.sit(batch)
        batch.cache = roomy_cache()  # its memory is free
        self._seated = _Seated(weakref.ref(batch), step)
        return self._seated

    def _evict(self) -> None:
        """Whoever sits in the arena gets what is there to keep."""
        if (seated := self._seated) and (batch := seated.batch()) is not None:
            self.release(batch)
            _own(batch)
        self._seated = None

    def _step_of(self, batch: Batch, size: _Size) -> _Step | None:
        """The step of that size, recorded on this batch if there is none; None where it does not fit."""
        arena = self._arena
        if arena is None or size.tokens > arena.tokens:
            arena = self._grow(batch, size)
        if arena is None:
            return None
        return self._steps.get(size) or self._recorded(batch, _Step(self.model, arena, size, batch.axes))

    def _grow(self, batch: Batch, size: _Size) -> _Arena | None:
        """A larger arena, by powers of two, as each new one has all sizes recorded anew."""
        tokens = _power_of_two(size.tokens)
        if tokens * batch.token_bytes > self.max_bytes:
            return None
        self.clear()
        try:
            self._arena = _Arena.like(batch, tokens)
        except torch.OutOfMemoryError:
            self._refuse(f"no memory for {tokens} tokens", tokens * batch.token_bytes - 1)
        return self._arena

    def _recorded(self, batch: Batch, step: _Step) -> _Step | None:
        step.sit(batch)
        if self._pool is None and step.ids.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            step.replay = self.record(step.run, self._pool)
        except RuntimeError as error:
            # Short of memory, a model that decides something by its values, as LLM.int8 does, or one that
            # fails anyway: a plain step tells which.
            short = isinstance(error, torch.OutOfMemoryError)
            most = step.size.tokens * batch.token_bytes - 1 if short else 0
            self._refuse(f"{type(error).__name__} on recording", most)
            return None
        self._steps[step.size] = step
        return step

    def _refuse(self, why: str, max_bytes: int) -> None:
        log.warning("steps are not replayed as CUDA graphs above %d bytes: %s", max_bytes, why)
        self.max_bytes = max_bytes
        self.clear()


def _give_back(seated: _Seated, batch: Batch) -> None:
    """Views of the arena in place of what was taken into it, and the mask of all tokens since."""
    rows, length = len(batch.mask), seated.length(batch)
    batch.cache = roomy_cache(
        (keys[:rows, :, :length], values[:rows, :, :length]) for keys, values in seated.step.layers
    )
    batch.mask = torch.cat([batch.mask, batch.mask.new_ones(rows, seated.taken)], dim=1)
    batch.next_positions = batch.next_positions + seated.taken


def _own(batch: Batch) -> None:
    """Copies in place of views."""
    for layer in batch.layers:
        keys, values = layer.tensors
        layer.keys, layer.values = keys.clone(), values.clone()


def step_graphs(model: Any, quantization: str | None, max_bytes: int) -> StepGraphs | None:
    """For a model on CUDA whose steps can be recorded, if they may take memory; see `Loaded.quantization`.

    LLM.int8 looks for outliers in what it multiplies; a layer with a sliding window wants a mask of its own.
    """
    text = model.config.get_text_config()
    windowed = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None) is not None
    if model.device.type != "cuda" or not max_bytes or windowed or (quantization or "").startswith("int8"):
        return None
    return StepGraphs(model, max_bytes)
