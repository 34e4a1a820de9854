"""A model's linear layers: oneDNN's products on weights as they are or packed, FBGEMM's on 16 bits.

    python -m benchmarks.products --threads 2 --rounds 9
    python -m benchmarks.products --model DIRECTORY --part vision --rows 577,1154

One row is a decoding step of one answer, a hundred are a prompt pruned to 64 visual tokens, 577 a picture in
the tower. All ways, and plain `nn.Linear` that they are held against, multiply the same rows by the same
weights, rounded to 16 bits before, which come from memory each time, as they do when a model answers.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks._measure import (
    Spread,
    at_least,
    in_turns,
    markdown,
    options,
    plotted,
    publish,
    ratios,
    several,
)
from prismprune import PrunedVLM
from prismprune.cpu_products import Copies, CpuLinear
from prismprune.half_weights import HalfWeight
from prismprune.loading import DEMO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

WAYS = ("oneDNN", "packed", "16 bits")
ROWS = {
    "language": (1, 2, 4, 8, 16, 32, 64, 100, 200, 400, 640),
    "head": (1, 2, 4, 8, 16, 32),
    "vision": (577, 1154),
}


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--model", default=DEMO, help="a checkpoint directory or a hub id")
    parser.add_argument("--part", default="language", choices=ROWS, help="of which the layers are")
    parser.add_argument("--rows", type=several(at_least(1)), help="default: what that part sees")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    layers = layers_of(PrunedVLM.from_pretrained(asked.model, device="cpu", dtype=asked.dtype), asked.part)
    in_16_bits(layers)
    if not layers:
        raise SystemExit(f"This CPU does not multiply {asked.dtype} by oneDNN here.")
    rows = asked.rows or ROWS[asked.part]
    faster = {each: measured(layers, each, asked.rounds) for each in rows}
    table = markdown(["rows", *WAYS], ((each, *faster[each].values()) for each in rows))
    results = {
        name: {each: [ratio.q1, ratio.median, ratio.q3] for each in rows for ratio in [faster[each][name]]}
        for name in WAYS
    }
    publish(asked, {"times_as_fast": results}, table, partial(plot, faster), layers=len(layers))


def layers_of(vlm: PrunedVLM, part: str) -> list[CpuLinear]:
    """Those of the language model's blocks, of its head, or of the tower."""
    places = {"language": "language_model.layers", "head": "lm_head", "vision": "vision_tower"}
    named = vlm.model.named_modules()
    return [module for name, module in named if isinstance(module, CpuLinear) and places[part] in name]


@torch.no_grad()
def in_16_bits(layers: Sequence[CpuLinear]) -> None:
    """Round the weights to bfloat16, as published ones are."""
    for layer in layers:
        layer.weight.copy_(layer.weight.bfloat16())


@torch.inference_mode()
def measured(layers: Sequence[CpuLinear], rows: int, rounds: int) -> dict[str, Spread]:
    """Plain seconds over those of each other way."""
    inputs = {
        layer.in_features: torch.randn(rows, layer.in_features, dtype=layer.weight.dtype) for layer in layers
    }
    halves = [held for layer in layers if (held := HalfWeight.of(layer.weight)) is not None]
    ways: dict[str, list[Callable[[torch.Tensor], object]]] = {
        "plain": [partial(nn.Linear.forward, layer) for layer in layers],
        "oneDNN": [layer.forward for layer in layers],
        "packed": [packed_copy(layer).forward for layer in layers],
        "16 bits": [
            partial(half.product, bias=layer.bias) for half, layer in zip(halves, layers, strict=True)
        ],
    }

    def seconds(name: str, _round: int) -> float:
        began = time.perf_counter()
        for way, layer in zip(ways[name], layers, strict=True):
            way(inputs[layer.in_features])
        return time.perf_counter() - began

    taken = in_turns({name: partial(seconds, name) for name in ways}, rounds)
    return {name: ratios(taken["plain"], taken[name]) for name in WAYS}


def packed_copy(layer: CpuLinear) -> CpuLinear:
    """A layer of the same parameters."""
    copy = CpuLinear(layer.in_features, layer.out_features, device="meta")
    copy.weight, copy.bias = layer.weight, layer.bias
    copy.copies = Copies(copy)
    copy.copies.pack()
    return copy


def plot(faster: dict[int, dict[str, Spread]], file: Path) -> None:
    with plotted(file) as axes:
        for name in WAYS:
            axes.plot(list(faster), [each[name].median for each in faster.values()], marker="o", label=name)
        axes.axhline(1, color="grey", linewidth=1, label="plain")
        axes.set(xscale="log", xlabel="rows", ylabel="times as fast as plain layers")


if __name__ == "__main__":
    main()
