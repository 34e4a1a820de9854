"""Options that several commands have, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from prismprune.quantization import Quantization

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Layout = Annotated[
    str | None, typer.Option(help="How LLaVA-NeXT packs crops: native, or paper (no newlines).")
]
Quantized = Annotated[str | None, typer.Option("--quantization", help="int8 or nf4.")]
ComputeDtype = Annotated[
    str | None,
    typer.Option(help="What nf4 computes in: float32, bfloat16 or float16 (default: that of the model)."),
]
DoubleQuant = Annotated[bool, typer.Option(help="Whether nf4 quantizes its scales too.")]
QuantizeAlso = Annotated[
    list[str] | None, typer.Option(help="Quantize vision, projector or head too; repeat for several.")
]


def quantized(
    kind: str | None, compute_dtype: str | None, double_quant: bool, also: list[str] | None
) -> Quantization | None:
    """What the four options ask for together. Raises `InvalidOptionError`."""
    return Quantization.chosen(kind, compute_dtype=compute_dtype, double_quant=double_quant, also=also or ())
