"""Attention on a CPU as `prismprune.cpu_attention` has it computed, and as torch's kernel does it by itself.

    python -m benchmarks.attention --threads 2
    python -m benchmarks.attention --dtypes bfloat16 --rounds 25 --json attention.json --plot attention.png

Steps of one answer and of eight behind so many tokens, prompts of so many, and towers' views of pictures, for
heads as published models have them. Every round goes through several layers' keys and values, so that they
come from memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks._measure import (
    Spread,
    in_turns,
    markdown,
    one_of,
    options,
    plotted,
    publish,
    ratios,
    several,
)
from prismprune.cpu_attention import CpuAttention, looked_at_all
from prismprune.heap import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    Way = Callable[[Tensor, Tensor, Tensor], Tensor]

HEADS = {
    "SmolLM2-135M": (9, 3, 64),
    "Qwen2.5-VL-7B": (28, 4, 128),
    "LLaVA-NeXT-8B": (32, 8, 128),
    "LLaVA-1.5-7B": (32, 32, 128),
}
"""Heads, those of keys and values, and the width of one."""
TOWERS = {"ViT-S/14": (6, 6, 64), "CLIP-L/14": (16, 16, 64)}
VIEWS, PATCHES = (1, 5), 576
"""Of 336 pixels, looked at together: a picture for LLaVA-1.5, and a tiled one for LLaVA-NeXT."""
STEPS = ((1, 100), (1, 600), (8, 100), (8, 600))
"""Answers, and tokens that each is behind."""
PROMPTS = (82, 200, 300, 594)
ROOM = 64
"""Tokens that a cache has room for beyond those it holds."""
LAYERS = 8
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--dtypes", type=several(one_of(DTYPES)), default=DTYPES)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    rows = []
    with torch.inference_mode():
        for dtype in asked.dtypes:
            for model, case, ways, sizes in cases():
                took, gain = measured(ways, sizes, getattr(torch, dtype), asked.rounds)
                rows.append({"dtype": dtype, "model": model, "case": case, "ms": took, "gain": gain})
    table = markdown(
        ["numbers", "heads of", "", "as it is, ms a layer", "times as fast"],
        [[row[name] for name in ("dtype", "model", "case", "ms", "gain")] for row in rows],
    )
    told = [row | {name: quartiles(row[name]) for name in ("ms", "gain")} for row in rows]
    publish(asked, {"rows": told}, table, partial(plot, rows))


def cases() -> Iterator[tuple[str, str, Mapping[str, Way], Sizes]]:
    """Whose heads, what of them, as torch's kernel does it and as it is had, and of what size."""
    for model, (heads, shared, width) in HEADS.items():
        scale = width**-0.5
        ways = {"as it is": partial(causal, scale), "had": partial(as_language_models, CpuAttention(), scale)}
        for count, known in STEPS:
            sizes = Sizes(heads, shared, width, count, 1, known)
            yield model, f"a step of {count} behind {known}", ways, sizes
        for length in PROMPTS:
            yield model, f"a prompt of {length}", ways, Sizes(heads, shared, width, 1, length, 0)
    for model, (heads, shared, width) in TOWERS.items():
        ways = {"as it is": partial(all_of_all, width**-0.5), "had": partial(as_towers, width**-0.5)}
        for views in VIEWS:
            sizes = Sizes(heads, shared, width, views, PATCHES + 1, None)
            yield model, f"{views} view{'s' * (views > 1)} of {PATCHES} patches", ways, sizes


@dataclass(frozen=True)
class Sizes:
    """known: tokens in the cache, before those of the queries; None: there is no cache."""

    heads: int
    shared: int
    width: int
    batch: int
    length: int
    known: int | None


def measured(ways: Mapping[str, Way], sizes: Sizes, dtype: torch.dtype, rounds: int) -> tuple[Spread, Spread]:
    """Milliseconds a layer as torch has it, and how many times as fast the other way is."""
    shape = sizes.batch, sizes.length, sizes.heads, sizes.width
    queries = torch.randn(shape).to(dtype).transpose(1, 2)
    layers = [keys_and_values(sizes, dtype) for _ in range(LAYERS)]
    taken = in_turns({name: partial(seconds, way, queries, layers) for name, way in ways.items()}, rounds)
    own = Spread.of(1e3 * each / LAYERS for each in taken["as it is"])
    return own, ratios(taken["as it is"], taken["had"])


def keys_and_values(sizes: Sizes, dtype: torch.dtype) -> Sequence[Tensor]:
    """As a cache with room holds them, or as projections leave them."""
    batch, shared, width = sizes.batch, sizes.shared, sizes.width
    if sizes.known is None:
        return torch.randn(2, batch, sizes.length, shared, width).to(dtype).transpose(2, 3).unbind()
    tokens = sizes.known + sizes.length
    return torch.randn(2, batch, shared, tokens + ROOM, width).to(dtype)[:, :, :, :tokens].unbind()


def seconds(way: Way, queries: Tensor, layers: Sequence[Sequence[Tensor]], _round: int) -> float:
    began = time.perf_counter()
    for keys, values in layers:
        way(queries, keys, values)
    return time.perf_counter() - began


def causal(scale: float, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    several, shared = queries.shape[2] > 1, queries.shape[1] > keys.shape[1]
    found = scaled_dot_product_attention(
        queries, keys, values, is_causal=several, scale=scale, enable_gqa=shared
    )
    return found.transpose(1, 2).flatten(2)


def as_language_models(
    attention: CpuAttention, scale: float, queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    found = attention.attended(queries, keys, values, None, scale)
    return causal(scale, queries, keys, values) if found is None else found


def all_of_all(scale: float, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2).flatten(2)


def as_towers(scale: float, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return looked_at_all(queries, keys, values, scale)


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
