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
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import nn

from prismprune.half_weights import HalfWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FEW_ROWS = {torch.float32: 96, torch.bfloat16: 3}
"""So many rows and fewer are faster with weights in 16 bits than in oneDNN's order."""
MKL_ROWS = 16
"""Fewer are MKL's even beside packed weights, where it is fast."""


class CpuLinear(nn.Linear):
    """`nn.Linear` with the same parameters; with gradients, autocast or other formats just that."""

    copies: Copies | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the base class's name for it)
        if self.copies is not None and (product := self.copies.product(input)) is not None:
            return product
        weight = self.weight
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not input.is_cpu
            or input.dtype is not weight.dtype
            or input.dtype not in formats()
            or input.numel() == 0
            or (input.dtype is torch.float32 and mkl_is_fast())
        ):
            return super().forward(input)
        return _product(input, weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: those of the weights belong to this process."""
        return {name: value for name, value in self.__dict__.items() if name != "copies"}


class Copies:
    """Weights as the kernels like them, of one layer or of several that multiply the same values.

    Several stand one above the other, and their products [..., outputs] side by side. They are made again
    when another weight takes the place of one, and serve nobody while one is no parameter of its layer.

    takes, gives: what they multiply is so many times the values, and so many times their product comes of it.
    activation: name and algorithm of one that torch has oneDNN compute of that; no copy in 16 bits can.
    packed: in oneDNN's order, as large as the weights. half: in 16 bits, which hold every weight as it is.
    """

    __slots__ = (
        "_activation",
        "_bias",
        "_format",
        "_gives",
        "_known",
        "_made_of",
        "_takes",
        "half",
        "layers",
        "packed",
    )

    def __init__(
        self,
        *layers: CpuLinear,
        takes: float = 1.0,
        gives: float = 1.0,
        activation: tuple[str, str] = ("none", ""),
    ) -> None:
        self.layers = layers
        self._takes, self._gives, self._activation = takes, gives, activation
        self.packed: Tensor | None = None
        self.half: HalfWeight | None = None
        self._note()

    def _note(self) -> None:
        """What the copies are made of."""
        self._format = self.layers[0].weight.dtype
        biases = [layer.bias.detach() for layer in self.layers if layer.bias is not None]
        self._bias = _times(_above(biases), self._gives) if biases else None
        self._known = [ref(each) for each in self._parameters() or ()]
        self._made_of: list[int] | None = self._identities()

    def forget(self) -> None:
        """Take them for copies of other weights, so that they are made again when they are needed."""
        self._made_of = None

    def pack(self) -> None:
        """Keep one in oneDNN's order."""
        self.packed = _reordered(self._weight())

    def halve(self) -> bool:
        """Keep one in 16 bits if they hold the weights as they are: whether they do."""
        self.half = HalfWeight.of(self._weight())
        return self.half is not None

    def product(self, values: Tensor) -> Tensor | None:
        """None where no copy serves: with gradients or autocast, or where another way is as fast."""
        # A decoding step of a small model comes here every ten microseconds: as little as possible is asked.
        if torch.is_grad_enabled() or not self.fit(values) or torch.is_autocast_enabled("cpu"):
            return None
        rows = values.numel() // (values.shape[-1] or 1)
        return self.multiplied(values, rows) if self.current() and self.serves(rows) else None

    def current(self) -> bool:
        """Whether they are copies of the weights that there are now, if need be made again."""
        now = self._identities()
        if now is None:
            return False
        # What is alive is at no other's address: a number is that of the weight that it was noted of.
        same = now == self._made_of and all(known() is not None for known in self._known)
        return same or self._made_again()

    def serves(self, rows: int) -> bool:
        """Whether a copy is the fastest way for so many rows."""
        if self.half is not None and 0 < rows <= FEW_ROWS[self._format]:
            return True
        slower = rows < MKL_ROWS and self._format is torch.float32 and mkl_is_fast()
        return self.packed is not None and rows > 0 and not slower

    def multiplied(self, values: Tensor, rows: int) -> Tensor:
        """The product of `rows` rows, which a copy `serves`."""
        if self.half is not None and rows <= FEW_ROWS[self._format]:
            return self.half.product(values, self._bias)
        if self.packed is None:
            raise RuntimeError("no copy serves so many rows")
        return _product(values, self.packed, self._bias, *self._activation)

    def fit(self, values: Tensor) -> bool:
        """Whether these are of their format, in the memory of the processor."""
        return values.dtype is self._format and values.is_cpu

    def _made_again(self) -> bool:
        """Of the weights that there are now, if they are of the same format."""
        if any(layer.weight.dtype is not self._format for layer in self.layers):
            return False
        if self.packed is not None:
            self.pack()
        if self.half is not None:
            self.halve()
        self._note()  # the last of all: another thread takes what is noted for what is there
        return True

    def _weight(self) -> Tensor:
        return _times(_above([layer.weight.detach() for layer in self.layers]), self._gives / self._takes)

    def _parameters(self) -> list[nn.Parameter] | None:
        """None where a layer computes its weight or its bias of others, as torch's pruning has it do."""
        try:
            every = [
                layer._parameters[name]  # noqa: SLF001 (`parameters()` takes ten times as long)
                for layer in self.layers
                for name in ("weight", "bias")
            ]
        except KeyError:
            return None
        return [each for each in every if each is not None]

    def _identities(self) -> list[int] | None:
        """Others after another tensor took a parameter's place, or one was changed in place.

        Not after changes that torch does not count: through `.data`, or of what was made in inference mode.
        None without `_parameters`.
        """
        parameters = self._parameters()
        if parameters is None:
            return None
        numbers = list[int]()
        for each in parameters:
            version = 0 if each.is_inference() else each._version  # noqa: SLF001 (no public name)
            numbers += id(each), each.data_ptr(), version
        return numbers


def _above(parts: Sequence[Tensor]) -> Tensor:
    """One above the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _times(values: Tensor, factor: float) -> Tensor:
    """Those times 1 are not copied."""
    return values if factor == 1 else values * factor


def _product(
    values: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = ""
) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001 (what torch's compiler calls)
        values, weight, bias, activation, [], algorithm
    )
    return product


def _reordered(weight: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001 (as above)
        weight.detach().contiguous(), None
    )
    return reordered


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
