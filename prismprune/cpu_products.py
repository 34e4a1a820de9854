"""Linear layers that multiply on x86 CPUs as fast as torch can, on copies of the weights if there is room.

Torch has oneDNN and MKL, and gives products of float32 to MKL. On AMD processors that is slower at any number
of rows, and by half where a decoding step or a pruned prompt has few; on Intel's it is the faster one for few
rows, and for weights as they are. oneDNN is faster on weights in the order of its own kernels, a copy beside
those of the model; so it is with bfloat16, where the CPU has instructions for that. Few rows wait for the
weights to come from memory, and a copy in 16 bits is half as much to wait for (`half_weights`).
`benchmarks/products.py` measures all ways, and docs/performance-details.md says what came of it.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prismprune.half_weights import HalfWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

FEW_ROWS = {torch.float32: 64, torch.bfloat16: 3}
"""So many rows and fewer are faster with weights in 16 bits than in oneDNN's order."""
MKL_ROWS = 16
"""Fewer are MKL's even beside packed weights, where it is fast."""
MANY_ROWS_ALONE = ("vision", "projector")
"""Parts of a model that never see few rows."""


class CpuLinear(nn.Linear):
    """`nn.Linear` with the same parameters; where gradients are wanted, or in other formats, just that."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class's name for it)
        weight, bias = self.weight, self.bias
        if (
            input.dtype is not weight.dtype
            or input.dtype not in formats()
            or input.device.type != "cpu"
            or torch.is_grad_enabled()
            or input.numel() == 0
        ):
            return super().forward(input)
        copies, rows = self._copies, input.numel() // self.in_features
        if copies is not None and copies.made_of != _identity(weight):
            copies = self._made_again(copies)
        if copies is not None and copies.half is not None and rows <= FEW_ROWS[input.dtype]:
            return copies.half.product(input, bias)
        packed = None if copies is None else copies.packed
        if input.dtype is torch.float32 and mkl_is_fast() and (packed is None or rows < MKL_ROWS):
            return super().forward(input)
        return _product(input, weight if packed is None else packed, bias)

    @property
    def packed(self) -> bool:
        """Whether there is a copy in oneDNN's order."""
        return self._copies is not None and self._copies.packed is not None

    @property
    def halved(self) -> bool:
        """Whether there is a copy in 16 bits."""
        return self._copies is not None and self._copies.half is not None

    def pack(self) -> None:
        """Keep a copy of the weights in oneDNN's order, as large as they are."""
        self._own_copies().packed = _reordered(self.weight)

    def halve(self) -> None:
        """Keep a copy in 16 bits, if they hold every weight as it is."""
        if (half := HalfWeight.of(self.weight)) is not None:
            self._own_copies().half = half

    @property
    def _copies(self) -> _Copies | None:
        return self.__dict__.get("_held")

    def _own_copies(self) -> _Copies:
        # Not buffers: they are neither saved nor moved, and made again when another weight takes their place.
        copies: _Copies = self.__dict__.setdefault("_held", _Copies(_identity(self.weight)))
        return copies

    def _made_again(self, old: _Copies) -> _Copies:
        del self.__dict__["_held"]
        if old.packed is not None:
            self.pack()
        if old.half is not None:
            self.halve()
        return self._own_copies()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: those of the weights belong to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "_held"}


@dataclass(slots=True)
class _Copies:
    """A weight as the kernels like it, and what it was made of."""

    made_of: tuple[int, int]
    packed: Tensor | None = None
    half: HalfWeight | None = None


def _product(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001 (what torch's compiler calls)
        values, weight, bias, "none", [], ""
    )
    return product


def _reordered(weight: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001 (as above)
        weight.detach().contiguous(), None
    )
    return reordered


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
def mkl_is_fast() -> bool:
    """Whether this CPU is one of those that MKL is written for."""
    return "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))


@cache
def formats() -> frozenset[torch.dtype]:
    """Number formats that this CPU multiplies by itself."""
    able = torch.cpu.get_capabilities()
    native = able["architecture"] == "x86_64" and (able["avx512_bf16"] or able["amx_bf16"])
    return frozenset({torch.float32, torch.bfloat16} if native else {torch.float32})


def use_cpu_products(
    model: nn.Module, packed_bytes: int = 0, parts: Mapping[str, tuple[str, ...]] | None = None
) -> None:
    """Make every plain linear layer in one of the `formats` a `CpuLinear`, where `available`.

    Copies are made in the model's order while they take at most `packed_bytes` together: first those in 16
    bits of layers that a decoding step goes through, which win most for least, then those in oneDNN's order.
    parts: names of modules that are not the language model's layers, as `Family.outside`. Quantized layers,
    which multiply in their own way, other subclasses and other formats stay as they are.
    """
    if not available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in formats():
            module.__class__ = CpuLinear
    outside = {name: part for part, names in (parts or {}).items() for name in names}
    layers = [
        (module, _part(name, outside))
        for name, module in model.named_modules()
        if isinstance(module, CpuLinear)
    ]
    room = packed_bytes
    for layer, part in layers:
        needs = 2 * layer.weight.numel()
        if part not in MANY_ROWS_ALONE and needs <= room:
            layer.halve()
            room -= needs * layer.halved
    for layer, part in layers:
        never = part == "head" and layer.halved  # it sees a row of each answer at the most
        if not never and layer.weight.nbytes <= room:
            layer.pack()
            room -= layer.weight.nbytes


def _part(name: str, outside: Mapping[str, str]) -> str | None:
    """The part in which the module of that full name is; None: the language model's layers."""
    return next((part for place, part in outside.items() if f"{name}.".startswith(f"{place}.")), None)
