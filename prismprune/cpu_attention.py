"""Attention on a CPU, given to torch's kernel in the shape that it is fastest at, or computed without it.

The kernel (`aten/native/cpu/FlashAttentionKernel.cpp`) takes each head's queries by themselves, 32, 64 or 256
at a time by how many there are, and brings keys and values into its order for each of these blocks. Heads
that share keys and values (grouped-query attention) are as well one head with more queries: larger blocks,
and keys that are brought in once. What causal queries must not see it computes all the same, up to 512 keys
at a time, so that queries part by part, each part with the keys up to its end, have less to compute. A single
query of 16 bits takes longer than two.

In bfloat16 the kernel is no faster than in float32, on processors that multiply bfloat16 twice as fast but
have no tiles for it (AMX). There attention is oneDNN's: two products and a softmax between them, of parts
whose scores stay in the processor's caches. Scores and probabilities are rounded to 16 bits, as in
transformers' eager attention. `benchmarks/attention.py` measures all of it.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MIDDLE, LARGE = 192, 768
"""From so many queries on the kernel's blocks are the middle ones, and the large ones."""
PARTS = 5
"""Of a causal prompt at most. Each has `MIDDLE` queries, of all heads that share keys, or more."""
SHARING, SHARED_NUMBERS = 4, 150_000
"""In float32, single queries of so many heads are those of one head where keys are so many numbers."""
QUERIES = 128
"""Of a head, in a part of a prompt that is computed by products: more of them have more to hide."""
SCORES = 4_000_000
"""Of such a part at most, over its heads; one head's may be more."""
LEAST_ROWS, LEAST_SCORES = 96, 100_000
"""For products: queries of heads that share keys, and scores of all. Fewer take longer to begin than do."""


class CpuAttention(threading.local):
    """Scaled dot-product attention [B, L, heads * head_dim], up to the rounding of its sums.

    A mask is that of all layers of a pass, and is made for the first of them; of each thread's pass for it.
    """

    def __init__(self) -> None:
        self._causal: tuple[tuple[object, ...], Tensor] | None = None
        self._repeated: tuple[Tensor, int, Tensor] | None = None

    def attended(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """What each query finds; None: as ever is as fast.

        queries: [B, heads, L, head_dim]. keys, values: [B, shared heads, T, head_dim]. mask: [B, 1, L, T],
        true where a query looks; None: a single query looks at everything, others, with L = T, at what is not
        behind them.
        """
        length, groups = queries.shape[2], queries.shape[1] // keys.shape[1]
        if length == 1:
            return _single(queries, keys, values, mask, scale)
        if _products_are_faster(queries, keys):
            return self._multiplied(queries, keys, values, mask, scale)
        if groups == 1 or length >= LARGE or groups * length < MIDDLE:
            return None
        if mask is None:
            return self._in_parts(queries, keys, values, scale) if keys.shape[2] == length else None
        if length >= MIDDLE or mask.dtype is not torch.bool:
            return None
        shared = _shared(queries, keys)
        found = scaled_dot_product_attention(
            shared.flatten(2, 3), keys, values, self._mask_of_all(mask, groups, queries.dtype), scale=scale
        )
        return _apart(found, shared)

    def _multiplied(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """By products."""
        length = queries.shape[2]
        if mask is not None:
            if mask.dtype is not torch.bool:
                return None
            return _by_products(queries, keys, values, scale, mask=self._mask_of_all(mask, 1, queries.dtype))
        if keys.shape[2] != length:
            return None
        part = -(-length // max(1, round(length / QUERIES)))
        return _by_products(queries, keys, values, scale, causal=self._causal_mask(part, part, 1, queries))

    def _in_parts(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Of causal queries. The last part begins a little early, so that all are of one length."""
        shared = _shared(queries, keys)
        batch, heads, groups, length, width = shared.shape
        parts = min(PARTS, groups * length // MIDDLE) if length >= MIDDLE else 1
        part = -(-length // parts)
        mask = self._causal_mask(part, length, groups, queries)
        found = queries.new_empty(batch, length, heads, groups, width)
        for number in range(parts):
            end = min(length, (number + 1) * part)
            own = scaled_dot_product_attention(
                shared[..., end - part : end, :].flatten(2, 3),
                keys[:, :, :end],
                values[:, :, :end],
                mask[..., length - end :],
                scale=scale,
            )
            found[:, end - part : end] = own.view(batch, heads, groups, part, width).permute(0, 3, 1, 2, 4)
        return found.view(batch, length, -1)

    def _causal_mask(self, part: int, length: int, groups: int, like: Tensor) -> Tensor:
        """[1, 1, groups * part, length], added to scores; its last columns are the mask of fewer keys."""
        key = part, length, groups, like.dtype
        if self._causal is None or self._causal[0] != key:
            hidden = torch.ones(part, length, dtype=torch.bool).triu(length - part + 1)
            self._causal = key, _added(~hidden, like.dtype).repeat(groups, 1)[None, None]
        return self._causal[1]

    def _mask_of_all(self, mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, groups * L, T], to be added to scores."""
        known = self._repeated
        if known is None or known[0] is not mask or known[1] != groups:
            known = self._repeated = mask, groups, _added(mask, dtype).repeat(1, 1, groups, 1)
        return known[2]


def looked_at_all(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """What queries find that see every key: [B, L, heads * head_dim].

    queries: [B, heads, L, head_dim]. keys, values: [B, heads, T, head_dim]. On any device.
    """
    if queries.is_cpu and _products_are_faster(queries, keys):
        return _by_products(queries, keys, values, scale)
    return scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2).flatten(2)


def _products_are_faster(queries: Tensor, keys: Tensor) -> bool:
    """Than torch's kernel, on this CPU."""
    batch, heads, length, _ = queries.shape
    rows, scores = length * heads // keys.shape[1], batch * heads * length * keys.shape[2]
    return rows >= LEAST_ROWS and scores >= LEAST_SCORES and has_faster_products(queries.dtype)


@cache
def has_faster_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies numbers of `dtype` faster than torch's kernel of attention has it do."""
    able = torch.cpu.get_capabilities()
    native = able["architecture"] == "x86_64" and able["avx512_bf16"] and not able["amx_bf16"]
    return dtype is torch.bfloat16 and native and torch.backends.mkldnn.is_available()


def _by_products(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    causal: Tensor | None = None,
) -> Tensor:
    """Scores of one part after another, and what these find: [B, L, heads * head_dim].

    mask: [B, 1, L, T], added to scores. causal: [1, 1, n, n], added to those of each n queries with the
    last keys that they see.
    """
    batch, shared, tokens, width = keys.shape
    if keys.stride(2) != width:
        keys = keys.contiguous()  # those of one head apart are faster than this takes
    own = queries.reshape(batch, shared, -1, queries.shape[2], width)
    groups, length = own.shape[2:4]
    rows = max(1, SCORES // (groups * tokens)) if causal is None else causal.shape[-1]
    found = queries.new_empty(batch, length, shared, groups, width)
    nothing = queries.new_empty(1, 1, 1)
    for start in range(0, length, rows):
        end = min(length, start + rows)
        seen = tokens if causal is None else end
        for samples, heads in _at_once(batch, shared, groups * (end - start) * seen):
            part = own[samples, heads, :, start:end]
            scores = torch.baddbmm(
                nothing,
                part.flatten(2, 3).flatten(0, 1),
                keys[samples, heads, :seen].flatten(0, 1).mT,
                beta=0,
                alpha=scale,
            )
            of_each = scores.view(*part.shape[:-1], seen)
            if causal is not None:
                of_each[..., start:].add_(causal[..., : end - start, : end - start])
            elif mask is not None:
                of_each.add_(mask[samples, :, None, start:end])
            torch.softmax(scores, -1, out=scores)
            product = torch.bmm(scores, values[samples, heads, :seen].flatten(0, 1))
            found[samples, start:end, heads] = product.view(part.shape).permute(0, 3, 1, 2, 4)
    return found.view(batch, length, -1)


def _at_once(samples: int, heads: int, scores: int) -> Iterator[tuple[slice, slice]]:
    """Which heads of which samples have `SCORES` together, if each has so many."""
    room = max(1, SCORES // scores)
    if room >= heads:
        step = room // heads
        yield from ((slice(first, first + step), slice(None)) for first in range(0, samples, step))
        return
    step = -(-heads // -(-heads // room))
    for sample in range(samples):
        own = slice(sample, sample + 1)
        yield from ((own, slice(first, first + step)) for first in range(0, heads, step))


def _single(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One query of each head."""
    batch, heads, _, width = queries.shape
    groups = heads // keys.shape[1]
    if queries.dtype is torch.float32 and (groups < SHARING or keys.numel() < SHARED_NUMBERS):
        own = scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=groups > 1)
    elif groups > 1:
        together = queries.reshape(batch, -1, groups, width)
        own = scaled_dot_product_attention(together, keys, values, mask, scale=scale)
    else:
        twice = queries.expand(-1, -1, 2, -1)
        own = scaled_dot_product_attention(twice, keys, values, mask, scale=scale).narrow(2, 0, 1)
    found: Tensor = own.reshape(batch, 1, -1)
    return found


def _shared(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, shared heads, groups, L, head_dim] of queries [B, heads, L, head_dim]."""
    batch, _, length, width = queries.shape
    return queries.view(batch, keys.shape[1], -1, length, width)


def _apart(found: Tensor, shared: Tensor) -> Tensor:
    """[B, L, heads * head_dim] of what the queries of heads together found."""
    return found.view(shared.shape).permute(0, 3, 1, 2, 4).flatten(2)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What hides scores when added to them."""
    hidden = torch.finfo(dtype).min  # and not -inf: a query that sees nothing would find what is no number
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, hidden)
