"""Linear layers that use all cores for few rows.

A decoding step has a row a question, and a pruned prefill a hundred: MKL, which torch multiplies with on
x86, hardly divides such a product among its threads. On two cores of an AMD EPYC a language model's layers
took as long with two threads as with one at 71 rows. The same product as a batch of slices of the weights,
with no copy of them, goes to the threads slice by slice. `benchmarks/few_rows.py` measures it, and
docs/performance-details.md says what came of it. With one thread neither way is faster.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS = 192
"""Above it, whole products divide well by themselves, and slices were slower."""
SLICES_PER_THREAD = 2
"""So that a thread that is done early has something to do."""
LEAST_OUTPUTS = 32
"""Of a slice."""


class FewRowsLinear(nn.Linear):
    """`nn.Linear`, whose float32 products of up to `MOST_ROWS` rows on a CPU are computed in slices."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class's name for it)
        rows = input.numel() // self.in_features
        if 0 < rows <= MOST_ROWS and input.dtype is torch.float32 and input.device.type == "cpu":
            slices = _slices(self.out_features, torch.get_num_threads())
            if slices > 1:
                products = self._sliced(input.reshape(rows, self.in_features), slices)
                return products.reshape(*input.shape[:-1], self.out_features)
        return super().forward(input)

    def _sliced(self, rows: Tensor, slices: int) -> Tensor:
        """[R, in_features] to [R, slices, out_features / slices]."""
        weights = self.weight.reshape(slices, -1, self.in_features).transpose(1, 2)
        inputs = rows.expand(slices, -1, -1)
        bias: Tensor | None = self.bias
        if bias is None:
            products = torch.bmm(inputs, weights)
        else:
            products = torch.baddbmm(bias.reshape(slices, 1, -1), inputs, weights)
        return products.transpose(0, 1)


@lru_cache(maxsize=1024)
def _slices(outputs: int, threads: int) -> int:
    """Equal parts of the outputs to compute at once; 1 with one thread."""
    if threads == 1:
        return 1
    most = min(SLICES_PER_THREAD * threads, outputs // LEAST_OUTPUTS)
    return next((parts for parts in range(most, 1, -1) if outputs % parts == 0), 1)


def use_all_cores_for_few_rows(model: nn.Module) -> None:
    """Make every plain float32 linear layer of a model a `FewRowsLinear`: same parameters, same state dict.

    Quantized layers, which multiply in their own way, other subclasses and other dtypes stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype is torch.float32:
            module.__class__ = FewRowsLinear
