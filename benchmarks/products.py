"""A model's linear layers: oneDNN's products, with and without packed weights, against plain `nn.Linear`.

    python -m benchmarks.products --threads 2 --rounds 9
    python -m benchmarks.products --model DIRECTORY --part vision --rows 577,1154

One row is a decoding step of one answer, a hundred are a prompt pruned to 64 visual tokens, 577 a picture in
the tower. All ways multiply the same rows by the same weights, which come from memory each time, as they do
when a model answers.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks._measure import Spread, in_turns, markdown, options, plotted, publish, ratios
from prismprune import PrunedVLM
from prismprune.cpu_products import OneDnnLinear
from prismprune.loading import DEMO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

ROWS = {"language": "1,2,4,8,16,32,64,100,200,400,640", "head": "1,2,4,8,16,32", "vision": "577,1154"}


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--model", default=DEMO, help="a checkpoint directory or a hub id")
    parser.add_argument("--part", default="language", choices=ROWS, help="of which the layers are")
    parser.add_argument("--rows", help="default: what that part sees")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    layers = layers_of(PrunedVLM.from_pretrained(asked.model, device="cpu", dtype=asked.dtype), asked.part)
    if not layers:
        raise SystemExit(f"This CPU does not multiply {asked.dtype} by oneDNN here.")
    rows = [int(each) for each in (asked.rows or ROWS[asked.part]).split(",")]
    faster = {each: measured(layers, each, asked.rounds) for each in rows}
    table = markdown(["rows", "oneDNN", "packed"], ((each, *faster[each].values()) for each in rows))
    results = {
        name: {each: [ratio.q1, ratio.median, ratio.q3] for each in rows for ratio in [faster[each][name]]}
        for name in ("oneDNN", "packed")
    }
    publish(asked, {"times_as_fast": results}, table, partial(plot, faster), layers=len(layers))


def layers_of(vlm: PrunedVLM, part: str) -> list[OneDnnLinear]:
    """Those of the language model's blocks, of its head, or of the tower."""
    places = {"language": "language_model.layers", "head": "lm_head", "vision": "vision_tower"}
    named = vlm.model.named_modules()
    return [module for name, module in named if isinstance(module, OneDnnLinear) and places[part] in name]


@torch.inference_mode()
def measured(layers: Sequence[OneDnnLinear], rows: int, rounds: int) -> dict[str, Spread]:
    """Plain seconds over those of each other way."""
    inputs = {
        layer.in_features: torch.randn(rows, layer.in_features, dtype=layer.weight.dtype) for layer in layers
    }
    packed = [packed_copy(layer) for layer in layers]
    ways: dict[str, tuple[Callable[..., torch.Tensor], Sequence[OneDnnLinear]]] = {
        "plain": (nn.Linear.forward, layers),
        "oneDNN": (OneDnnLinear.forward, layers),
        "packed": (OneDnnLinear.forward, packed),
    }

    def seconds(name: str, _round: int) -> float:
        way, chosen = ways[name]
        began = time.perf_counter()
        for layer in chosen:
            way(layer, inputs[layer.in_features])
        return time.perf_counter() - began

    taken = in_turns({name: partial(seconds, name) for name in ways}, rounds)
    return {name: ratios(taken["plain"], taken[name]) for name in ("oneDNN", "packed")}


def packed_copy(layer: OneDnnLinear) -> OneDnnLinear:
    """A layer of the same parameters."""
    copy = OneDnnLinear(layer.in_features, layer.out_features, device="meta")
    copy.weight, copy.bias = layer.weight, layer.bias
    copy.pack()
    return copy


def plot(faster: dict[int, dict[str, Spread]], file: Path) -> None:
    with plotted(file) as axes:
        for name in ("oneDNN", "packed"):
            axes.plot(list(faster), [each[name].median for each in faster.values()], marker="o", label=name)
        axes.axhline(1, color="grey", linewidth=1, label="plain")
        axes.set(xscale="log", xlabel="rows", ylabel="times as fast as plain layers")


if __name__ == "__main__":
    main()
