"""How weights are stored in fewer than 16 bits: what to ask bitsandbytes for, and of which layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismprune.errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KINDS = ("int8", "nf4")
PARTS = ("vision", "projector", "head")
"""What is quantized only where asked for: the vision tower, the projector, the language model's head."""
DTYPES = ("float32", "bfloat16", "float16")
"""Number formats of what is not quantized, and of what NF4 computes in."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """The language model's linear layers in 8 bits (LLM.int8) or 4 (NF4, of QLoRA), by bitsandbytes.

    kind: "int8" or "nf4". compute_dtype: what NF4's layers multiply in, one of `DTYPES`; None: the model's
    own. double_quant: whether NF4's scales are quantized once more, 0.37 bits a weight less. also: which of
    `PARTS` are quantized with the language model.

    Raises `InvalidOptionError` for what is unknown, and for an option of NF4 with int8.
    """

    kind: str
    compute_dtype: str | None = None
    double_quant: bool = True
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidOptionError(f"quantization is one of {', '.join(KINDS)}, or none at all.")
        if self.kind != "nf4" and (self.compute_dtype is not None or not self.double_quant):
            raise InvalidOptionError("A compute dtype and double quantization are options of nf4.")
        if self.compute_dtype is not None and self.compute_dtype not in DTYPES:
            raise InvalidOptionError(f"The compute dtype is one of {', '.join(DTYPES)}.")
        if not set(self.also) <= set(PARTS):
            raise InvalidOptionError(f"What can be quantized too is {', '.join(PARTS)}.")

    @classmethod
    def chosen(
        cls,
        kind: str | None,
        *,
        compute_dtype: str | None = None,
        double_quant: bool = True,
        also: Sequence[str] = (),
    ) -> Quantization | None:
        """What a command line or settings say; None where that is no quantization.

        Raises `InvalidOptionError` also for options of a quantization that is not asked for.
        """
        if kind is not None:
            return cls(kind, compute_dtype, double_quant, tuple(also))
        if compute_dtype is not None or not double_quant or also:
            raise InvalidOptionError("Options of a quantization need one: int8 or nf4.")
        return None

    @classmethod
    def of(cls, given: str | Quantization | None) -> Quantization | None:
        """The same for a name as for the object with that name's defaults."""
        return cls(given) if isinstance(given, str) else given

    def spared(self, outside: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Names of the modules that stay as they are; outside: those around the language model's, by part."""
        return [name for part in PARTS if part not in self.also for name in outside[part]]

    def __str__(self) -> str:
        """The kind, and what differs from its defaults: `nf4 float16 single +vision`."""
        words = [self.kind, self.compute_dtype, None if self.double_quant else "single"]
        return " ".join([*filter(None, words), *(f"+{part}" for part in PARTS if part in self.also)])
