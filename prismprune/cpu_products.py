"""Linear layers whose products on x86 CPUs are oneDNN's, on weights that are packed for it if there is room.

Torch has oneDNN and MKL, and gives products of float32 to MKL, which on AMD processors is slower at any
number of rows, and by half where a decoding step or a pruned prompt has few. oneDNN is faster still on
weights in the order of its own kernels, a copy beside those of the model; so it is with bfloat16, where the
CPU has instructions for that. `benchmarks/products.py` measures all ways, and docs/performance-details.md
says what came of it.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class OneDnnLinear(nn.Linear):
    """`nn.Linear` with the same parameters; where gradients are wanted, or in other formats, just that."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class's name for it)
        if (
            input.dtype is not self.weight.dtype
            or input.dtype not in formats()
            or input.device.type != "cpu"
            or torch.is_grad_enabled()
            or input.numel() == 0
        ):
            return super().forward(input)
        packed: _Packed | None = self.__dict__.get("_packed")
        if packed is None:
            return self._product(input, self.weight)
        if packed.made_of != _identity(self.weight):
            packed = self.pack()
        return self._product(input, packed.weight)

    @property
    def packed(self) -> bool:
        return "_packed" in self.__dict__

    def pack(self) -> _Packed:
        """Keep a copy of the weights in the kernels' order, as large as they are."""
        # Not a buffer: it is neither saved nor moved, and made again when another weight takes its place.
        packed = self.__dict__["_packed"] = _Packed(self.weight)
        return packed

    def _product(self, values: Tensor, weight: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 (what torch's compiler calls)
            values, weight, self.bias, "none", [], ""
        )
        return product

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: packed weights belong to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class _Packed:
    """Weights in oneDNN's order, and what they were made of."""

    def __init__(self, weight: Tensor) -> None:
        self.made_of = _identity(weight)
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001 (as above)
            weight.detach().contiguous(), None
        )


def _identity(weight: Tensor) -> tuple[int, int]:
    """Another one after another tensor took the weights' place, or they were changed in place.

    Not after a change through `.data`, which torch does not count.
    """
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version  # noqa: SLF001 (no public name)


def available() -> bool:
    """Whether this is an x86 CPU and this torch has oneDNN with the products used here."""
    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    return x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def formats() -> frozenset[torch.dtype]:
    """Number formats that this CPU multiplies by itself."""
    able = torch.cpu.get_capabilities()
    native = able["architecture"] == "x86_64" and (able["avx512_bf16"] or able["amx_bf16"])
    return frozenset({torch.float32, torch.bfloat16} if native else {torch.float32})


def use_onednn(model: nn.Module, packed_bytes: int = 0) -> None:
    """Make every plain linear layer in one of the `formats` a `OneDnnLinear`, where `available`.

    Layers are packed in the model's order while the copies take at most `packed_bytes` together. Quantized
    layers, which multiply in their own way, other subclasses and other formats stay as they are.
    """
    if not available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in formats():
            module.__class__ = OneDnnLinear
        if isinstance(module, OneDnnLinear) and module.weight.nbytes <= packed_bytes:
            packed_bytes -= module.weight.nbytes
            module.pack()
