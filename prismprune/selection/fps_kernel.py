"""Farthest point sampling as one CUDA kernel, which chooses all tokens of an image in a single launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

LEAST_BLOCK = 256
"""Tokens are rounded up to a power of two of at least this many: each such number is compiled by itself."""


def spread(distance: Tensor, first: Tensor, k: int) -> Tensor:
    """Picks [B, k], int64, as `fps.step_by_step` makes them of `distance` [B, M, M], float32, and `first`."""
    images, size, _ = distance.shape
    picks = torch.empty(images, k, dtype=torch.long, device=distance.device)
    block = max(LEAST_BLOCK, triton.next_power_of_2(size))
    with torch.cuda.device_of(distance):  # where Triton launches is the current device
        _spread[(images,)](distance.contiguous(), first.contiguous(), picks, size, k, BLOCK=block)
    return picks


@triton.jit(do_not_specialize=["size", "k"])  # type: ignore[untyped-decorator]
def _spread(  # type: ignore[no-untyped-def] # noqa: ANN202, PLR0917 (Triton's language, which knows no types)
    distance,  # noqa: ANN001
    first,  # noqa: ANN001
    picks,  # noqa: ANN001
    size,  # noqa: ANN001
    k,  # noqa: ANN001
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One image a program. All tokens' distances to their nearest picked one stay in registers."""
    image = tl.program_id(0).to(tl.int64)
    distance += image * size * size
    picks += image * k
    token = tl.arange(0, BLOCK)
    pick = tl.load(first + image)
    nearest = tl.full((BLOCK,), float("inf"), tl.float32)
    for step in range(k):
        tl.store(picks + step, pick)
        row = tl.load(distance + pick * size + token, mask=token < size, other=float("-inf"))
        nearest = tl.minimum(nearest, row)
        pick = tl.argmax(nearest, axis=0).to(tl.int64)  # of equal values the first
