"""Weights of 16 bits that are multiplied with float32 as they lie, half of the bytes to read.

Checkpoints are published in 16 bits, and computed in float32 a product of few rows waits until twice as many
bytes as were published have come from memory. FBGEMM, which torch brings for x86, holds a matrix in float16
and widens it in the processor's registers: the sums are float32's, and a row's do not depend on how many
other rows there are. A matrix is held so only where not one of its weights is changed by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_EXPONENT = 15
"""Below 2 ** 15 nothing overflows in float16. Its other exponents are few: what bfloat16 holds of a matrix
mostly fits once the largest weight is brought up to there."""
LARGEST_POWER = 126
"""Of two, whose inverse is a float32, too."""
CHECKED = 2**22
"""Weights that are looked at together: a head's copies would take more than the head."""


@dataclass(frozen=True, slots=True)
class HalfWeight:
    """A weight [outputs, inputs] in float16, multiplied by a power of two if it needs that to fit.

    scale: what products are multiplied with to undo it.
    """

    packed: Any
    scale: float

    @classmethod
    def of(cls, weight: Tensor) -> HalfWeight | None:
        """None if float16 does not hold every one of the weights as it is."""
        if not available() or not weight.numel():
            return None
        largest = float(weight.detach().abs().max())
        if not math.isfinite(largest):
            return None
        up = min(LARGEST_EXPONENT - math.frexp(largest)[1], LARGEST_POWER)
        for exponent in dict.fromkeys((0, up)):
            values = torch.ldexp(weight.detach().float(), torch.tensor(exponent))
            if _fits(values):
                packed = torch.ops.quantized.linear_prepack_fp16(values.contiguous(), None)
                return cls(packed, 2.0**-exponent)
        return None

    def product(self, values: Tensor, bias: Tensor | None) -> Tensor:
        """`values` [..., inputs] by the weight, and the bias added: [..., outputs] in their format."""
        if values.ndim < 2:
            return self.product(values[None], bias)[0]
        dtype = values.dtype
        if dtype is not torch.float32:
            values = values.float()
        product = self._multiplied(values)
        if bias is not None:
            product = torch.add(bias, product, alpha=self.scale)
        elif self.scale != 1:
            product = product.mul_(self.scale)
        return product if dtype is torch.float32 else product.to(dtype)

    def _multiplied(self, values: Tensor) -> Tensor:
        # Else torch asks the packed weight for its `__torch_function__`, and each answer is an exception of
        # C++: longer than a small product takes, and a tenth of a decoding step.
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 (so torch's notes on extending it have it)
            product: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(values, self.packed)
        return product


def _fits(values: Tensor) -> bool:
    """Whether float16 has all of these float32 values."""
    return all(torch.equal(some.half().float(), some) for some in values.flatten().split(CHECKED))


def available() -> bool:
    """Whether this torch has FBGEMM, and it is in use."""
    return torch.backends.quantized.engine in {"x86", "fbgemm"}
