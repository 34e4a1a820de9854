"""The last block of a vision tower for the patches that are needed further, and for no other.

Which these are, the block's own attention decides, before most of its work: keys and values are computed for
every patch, but queries, attention and MLP only for those that a method may keep or compares. At 64 of 576
tokens PrismPrune looks at 160 of them, which saves two thirds of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prismprune.attention import BlockReading, stop_before
from prismprune.cpu_attention import looked_at_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    WantedOfView = Callable[[Tensor], Tensor | None]
    """Attention [H, N] of a view to the raster indices [M] of patches that are needed further; None: all."""


@dataclass(frozen=True, slots=True)
class _Steps:
    """What the two kinds of blocks do around attention and MLP: the rest is the same."""

    norm1: Any
    attention: Any
    out: Any
    norm2: Any
    mlp: Any


def _clip(block: Any) -> _Steps:
    return _Steps(block.layer_norm1, block.self_attn, block.self_attn.out_proj, block.layer_norm2, block.mlp)


def _dinov2(block: Any) -> _Steps:
    attention = block.attention
    return _Steps(
        block.norm1,
        attention,
        lambda values: block.layer_scale1(attention.o_proj(values)),
        block.norm2,
        lambda values: block.layer_scale2(block.mlp(values)),
    )


BLOCKS: dict[str, Callable[[Any], _Steps]] = {"CLIPEncoderLayer": _clip, "Dinov2Layer": _dinov2}
"""Blocks of transformers' towers, by name."""


def can_stop_within(tower: Any, block: Any) -> bool:
    """Whether `read_wanted` knows the block, and it would compute what the block does."""
    return (
        type(block).__name__ in BLOCKS
        and tower.config._attn_implementation == "sdpa"  # noqa: SLF001 (its only name)
        and not tower.training
    )


def read_wanted(
    tower: Any, block: Any, values: Tensor, *, heads: int, scale: float, wanted: WantedOfView
) -> BlockReading:
    """As `read_block` of one view's pixels [1, 3, height, width], with zeros where nobody looks."""
    with stop_before(block) as stopped:
        tower(values)
    hidden, steps = stopped.hidden, BLOCKS[type(block).__name__](block)
    normed = steps.norm1(hidden)
    reading = BlockReading(heads, scale)
    reading.query, reading.keys = steps.attention.q_proj(normed[:, :1]), steps.attention.k_proj(normed)
    patches = wanted(reading.cls_attention()[0])
    rows = torch.arange(hidden.shape[1]) if patches is None else patches + 1  # CLS comes first

    def by_head(projected: Tensor) -> Tensor:
        views, tokens, width = projected.shape
        return projected.view(views, tokens, heads, width // heads).transpose(1, 2)

    attended = looked_at_all(
        by_head(steps.attention.q_proj(normed[:, rows])),
        by_head(reading.keys),
        by_head(steps.attention.v_proj(normed)),
        scale,
    )
    few = hidden[:, rows] + steps.out(attended)
    reading.hidden = torch.zeros_like(hidden)
    reading.hidden[:, rows] = few + steps.mlp(steps.norm2(few))
    return reading
