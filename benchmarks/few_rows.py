"""Few rows through a language model's linear layers: all cores' way against plain `nn.Linear`.

    python -m benchmarks.few_rows --threads 2 --rounds 9
    python -m benchmarks.few_rows --model DIRECTORY --rows 1,64

One row is a decoding step of one answer, a hundred are a prompt pruned to 64 visual tokens. Both ways
multiply the same rows by the same weights, which come from memory each time, as they do when a model answers.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks._measure import Spread, in_turns, markdown, options, plotted, publish, ratios
from prismprune import PrunedVLM
from prismprune.few_rows import MOST_ROWS, FewRowsLinear
from prismprune.loading import DEMO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

WAYS: dict[str, Callable[[FewRowsLinear, Tensor], Tensor]] = {
    "plain": nn.Linear.forward,
    "slices": FewRowsLinear.forward,
}


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--model", default=DEMO, help="a checkpoint directory or a hub id")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,100,128,192", help=f"up to {MOST_ROWS}")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    layers = language_layers(PrunedVLM.from_pretrained(asked.model, device="cpu", dtype="float32"))
    faster = {int(rows): measured(layers, int(rows), asked.rounds) for rows in asked.rows.split(",")}
    table = markdown(["rows", "times as fast"], faster.items())
    results = {"faster": {rows: [ratio.q1, ratio.median, ratio.q3] for rows, ratio in faster.items()}}
    publish(asked, results, table, partial(plot, faster), layers=len(layers))


def language_layers(vlm: PrunedVLM) -> list[FewRowsLinear]:
    """Those of the language model's blocks."""
    blocks = vlm.model.model.language_model.layers
    return [module for module in blocks.modules() if isinstance(module, FewRowsLinear)]


@torch.inference_mode()
def measured(layers: Sequence[FewRowsLinear], rows: int, rounds: int) -> Spread:
    """Plain seconds over those of slices."""
    inputs = {layer.in_features: torch.randn(rows, layer.in_features) for layer in layers}

    def seconds(way: Callable[[FewRowsLinear, Tensor], Tensor], _round: int) -> float:
        began = time.perf_counter()
        for layer in layers:
            way(layer, inputs[layer.in_features])
        return time.perf_counter() - began

    taken = in_turns({name: partial(seconds, way) for name, way in WAYS.items()}, rounds)
    return ratios(taken["plain"], taken["slices"])


def plot(faster: dict[int, Spread], file: Path) -> None:
    with plotted(file) as axes:
        axes.plot(list(faster), [ratio.median for ratio in faster.values()], marker="o", label="slices")
        axes.axhline(1, color="grey", linewidth=1, label="plain")
        axes.set(xscale="log", xlabel="rows", ylabel="times as fast as plain layers")


if __name__ == "__main__":
    main()
