"""Attention of a language model as `prismprune.cpu_attention` gives it to torch's kernel, and as it is.

    python -m benchmarks.attention --threads 2
    python -m benchmarks.attention --dtypes bfloat16 --rounds 25 --json attention.json --plot attention.png

Steps of one answer and of eight behind so many tokens, and prompts of so many, for heads as published models
have them. Every round goes through as many layers' keys and values, so that they come from memory.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks._measure import Spread, in_turns, markdown, options, plotted, publish, ratios
from prismprune.cpu_attention import CpuAttention
from prismprune.heap import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

HEADS = {
    "SmolLM2-135M": (9, 3, 64),
    "Qwen2.5-VL-7B": (28, 4, 128),
    "LLaVA-NeXT-8B": (32, 8, 128),
    "LLaVA-1.5-7B": (32, 32, 128),
}
"""Heads, those of keys and values, and the width of one."""
STEPS = ((1, 100), (1, 600), (8, 100), (8, 600))
"""Answers, and tokens that each is behind."""
PROMPTS = (82, 200, 300, 594)
ROOM = 64
"""Tokens that a cache has room for beyond those it holds."""
LAYERS = 8


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    rows = []
    with torch.inference_mode():
        for dtype in asked.dtypes.split(","):
            for model, heads in HEADS.items():
                cases = {f"a step of {count} behind {known}": (count, 1, known) for count, known in STEPS}
                cases |= {f"a prompt of {length}": (1, length, 0) for length in PROMPTS}
                for case, sizes in cases.items():
                    took, gain = measured(heads, getattr(torch, dtype), sizes, asked.rounds)
                    rows.append({"dtype": dtype, "model": model, "case": case, "ms": took, "gain": gain})
    table = markdown(
        ["numbers", "heads of", "", "as it is, ms a layer", "times as fast"],
        [[row[name] for name in ("dtype", "model", "case", "ms", "gain")] for row in rows],
    )
    told = [row | {name: quartiles(row[name]) for name in ("ms", "gain")} for row in rows]
    publish(asked, {"rows": told}, table, partial(plot, rows))


def measured(
    heads: tuple[int, int, int], dtype: torch.dtype, sizes: tuple[int, int, int], rounds: int
) -> tuple[Spread, Spread]:
    """Milliseconds a layer as torch has it, and how many times as fast the other way is."""
    all_heads, shared, width = heads
    batch, length, known = sizes
    tokens = known + length
    queries = torch.randn(batch, length, all_heads, width).to(dtype).transpose(1, 2)
    layers = [
        torch.randn(2, batch, shared, tokens + ROOM, width).to(dtype)[:, :, :, :tokens].unbind()
        for _ in range(LAYERS)
    ]
    attention, scale = CpuAttention(), width**-0.5
    ways = {"as it is": partial(as_it_is, scale), "given": partial(as_given, attention, scale)}
    taken = in_turns({name: partial(seconds, way, queries, layers) for name, way in ways.items()}, rounds)
    own = Spread.of(1e3 * each / LAYERS for each in taken["as it is"])
    return own, ratios(taken["as it is"], taken["given"])


def seconds(way: Callable[..., Tensor], queries: Tensor, layers: Sequence[Any], _round: int) -> float:
    began = time.perf_counter()
    for keys, values in layers:
        way(queries, keys, values)
    return time.perf_counter() - began


def as_it_is(scale: float, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    causal, shared = queries.shape[2] > 1, queries.shape[1] > keys.shape[1]
    found = scaled_dot_product_attention(
        queries, keys, values, is_causal=causal, scale=scale, enable_gqa=shared
    )
    return found.transpose(1, 2).flatten(2)


def as_given(attention: CpuAttention, scale: float, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    found = attention.attended(queries, keys, values, None, scale)
    return as_it_is(scale, queries, keys, values) if found is None else found


def quartiles(spread: Spread) -> list[float]:
    return [spread.q1, spread.median, spread.q3]


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    with plotted(file) as axes:
        for dtype, model in dict.fromkeys((row["dtype"], row["model"]) for row in rows):
            own = [row for row in rows if (row["dtype"], row["model"]) == (dtype, model)]
            gains = [row["gain"].median for row in own]
            axes.plot(gains, [row["case"] for row in own], "o", label=f"{model}, {dtype}")
        axes.axvline(1, color="grey", linewidth=1)
        axes.invert_yaxis()
        axes.set(xlabel="times as fast")


if __name__ == "__main__":
    main()
