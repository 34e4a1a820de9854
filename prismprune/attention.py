"""Reads what one block of a vision tower attends to, while the tower runs as it always does.

Eager attention would give every layer's H x (1+N) x (1+N) matrix, to use one row a head of one layer. So
the tower keeps SDPA or FlashAttention, and forward hooks note the queries and keys that the block computes
anyway. Quantized layers work like any other: they are called, and their weights are never looked at.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from prismprune.errors import InvalidScoresError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

QUERIES = 64
"""Rows of queries that are compared with all keys at once."""


def cls_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention of the CLS query to each patch: [B, H, N], float32.

    queries: [B, H, 1, head_dim], of the CLS token. keys: [B, H, 1+N, head_dim], CLS first.
    Softmax over CLS and patches, in float32, and not renormalised once CLS is left out (ALGORITHM.md).
    """
    # Keys times query rather than the reverse: six times faster on a CPU, since no key is moved.
    logits = keys.float() @ (queries.float() * scale).transpose(2, 3)  # [B, H, 1+N, 1]
    attention: Tensor = logits.squeeze(3).softmax(dim=2)
    return attention[:, :, 1:]


def received_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Mean attention that each patch receives from all patches: [B, H, S], float32.

    queries, keys: [B, H, S, head_dim]. In pieces of queries: the whole [B, H, S, S] would be gigabytes.
    """
    turned = keys.float().transpose(2, 3)
    received = torch.zeros(keys.shape[:3], device=keys.device)
    for some in queries.split(QUERIES, dim=2):
        received += ((some.float() * scale) @ turned).softmax(dim=3).sum(dim=2)
    return received / queries.shape[2]


@dataclass(slots=True)
class BlockReading:
    """What `read_block` saw. Filled once the `with` block has ended.

    hidden: [B, 1+N, d], the block's output, CLS first: the features that the projector takes, bit for bit the
        `hidden_states` entry of transformers.
    query: [B, 1, H*head_dim], of CLS. keys: [B, 1+N, H*head_dim].
    """

    heads: int
    scale: float
    hidden: Tensor = field(init=False)
    query: Tensor = field(init=False)
    keys: Tensor = field(init=False)

    def copied(self) -> BlockReading:
        """The same in tensors of its own."""
        copy = BlockReading(self.heads, self.scale)
        copy.hidden, copy.query, copy.keys = self.hidden.clone(), self.query.clone(), self.keys.clone()
        return copy

    def cls_attention(self) -> Tensor:
        """Attention of the CLS query to each patch: [B, H, N], float32."""
        return cls_attention(self._by_head(self.query), self._by_head(self.keys), self.scale)

    def note_queries(self, queries: Tensor) -> None:
        self.query = queries[:, :1].clone()  # a copy, so that the other rows need not stay in memory

    def note_keys(self, keys: Tensor) -> None:
        self.keys = keys

    def finish(self, hidden: Tensor) -> None:
        self.hidden = hidden
        raise _BlockDoneError(self)

    def _by_head(self, projected: Tensor) -> Tensor:
        images, tokens, _ = projected.shape
        return projected.view(images, tokens, self.heads, -1).transpose(1, 2)


class _BlockDoneError(Exception):
    """Leaves the tower: its later blocks would compute what nobody uses."""

    def __init__(self, reading: BlockReading) -> None:
        super().__init__()
        self.reading = reading


@contextmanager
def read_block(block: nn.Module, attention: nn.Module, *, heads: int, scale: float) -> Iterator[BlockReading]:
    """Call the tower in this context: it stops after `block`, and the yielded reading holds what is needed.

        with read_block(layer, layer.self_attn, heads=16, scale=64**-0.5) as reading:
            tower(pixel_values)
        scores = reading.cls_attention()

    `attention` is the block's own attention module, with `q_proj` and `k_proj`. Whatever stands after the
    tower's call inside the `with` does not run. Other threads may use the same tower at the same time, read
    or not: the hooks heed this thread only, and they come off at the end, also after an error.

    Raises `InvalidScoresError` if the tower ended without having run `block`.
    """
    reading = BlockReading(heads, scale)
    watched: list[tuple[nn.Module, Callable[[Tensor], None]]] = [
        (attention.get_submodule("q_proj"), reading.note_queries),
        (attention.get_submodule("k_proj"), reading.note_keys),
        (block, reading.finish),
    ]
    hooks = [module.register_forward_hook(_in_this_thread(note)) for module, note in watched]
    try:
        yield reading
    except _BlockDoneError as done:
        if done.reading is not reading:
            raise
    else:
        raise InvalidScoresError("The vision tower ended without running the block whose output is used.")
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(slots=True)
class StoppedTower:
    """hidden: [B, 1+N, d], what the block that it stopped before would have got."""

    hidden: Tensor = field(init=False)


class _StoppedError(Exception):
    """Leaves the tower."""


@contextmanager
def stop_before(block: nn.Module) -> Iterator[StoppedTower]:
    """Call the tower in this context: it runs to `block`. Threads and hooks as with `read_block`.

    Raises `InvalidScoresError` if the tower ended without having come to `block`.
    """
    stopped = StoppedTower()

    def stop(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        positional, named = arguments
        stopped.hidden = positional[0] if positional else named["hidden_states"]
        raise _StoppedError

    stop_here = _in_this_thread(stop)
    hook = block.register_forward_pre_hook(
        lambda module, positional, named: stop_here(module, None, (positional, named)), with_kwargs=True
    )
    try:
        yield stopped
    except _StoppedError:
        return
    finally:
        hook.remove()
    raise InvalidScoresError("The vision tower ended without running the block whose output is used.")


@dataclass(slots=True)
class FusedReading:
    """What `read_fused` saw. Filled once the tower has run.

    projected: [S, 3 * H * head_dim], queries, keys and values before their rotation. rotary: cosine and sine
    [S, head_dim].
    """

    projected: Tensor = field(init=False)
    rotary: tuple[Tensor, Tensor] = field(init=False)

    def note_projected(self, projected: Tensor) -> None:
        self.projected = projected

    def note_arguments(self, arguments: dict[str, Any]) -> None:
        self.rotary = arguments["position_embeddings"]


@contextmanager
def read_fused(attention: nn.Module, projection: nn.Module) -> Iterator[FusedReading]:
    """Call the tower in this context: it runs to its end, and the yielded reading holds what is needed.

    For a tower whose later layers are used too, with one `projection` to queries, keys and values and rotary
    positions. Threads and hooks as with `read_block`.
    """
    reading = FusedReading()
    hooks = [
        attention.register_forward_pre_hook(_in_this_thread(reading.note_arguments), with_kwargs=True),
        projection.register_forward_hook(_in_this_thread(reading.note_projected)),
    ]
    try:
        yield reading
    finally:
        for hook in hooks:
            hook.remove()


def _in_this_thread(note: Callable[[Any], None]) -> Callable[[nn.Module, Any, Any], None]:
    owner = threading.get_ident()

    def hook(_module: nn.Module, _inputs: Any, seen: Any) -> None:
        if threading.get_ident() == owner:
            note(seen)

    return hook
