"""What it wins to multiply a layer's weights together and to call its parts past their modules, in turns.

    python -m benchmarks.layers --threads 2 --rounds 15
    python -m benchmarks.layers --model DIRECTORY --dtype bfloat16

A decoding step of one answer and of eight, prompts of so many tokens without a picture, and a picture of
noise in the tower, where the model has one, of the size that it is served at. Both sides have copies of
their weights as the kernels like them (`prismprune.cpu_products`). On one of them attention and MLPs have
theirs together (`prismprune.cpu_layers`), a step leaves out what lies around the layers
(`prismprune.cpu_steps`), and products in the tower's MLPs come with the activation behind them
(`prismprune.cpu_towers`).
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from benchmarks._measure import Spread, in_turns, markdown, options, plotted, publish, ratios
from benchmarks._models import PACKED_BYTES, as_the_worker
from prismprune import PrunedVLM, cpu_layers
from prismprune.batches import Batch, roomy_cache
from prismprune.cpu_steps import CpuSteps
from prismprune.loading import DEMO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BEHIND = 82
"""Tokens that a step is behind: a question about a picture of 64."""
STEPS, PROMPTS = (1, 8), (50, 82, 140, 594)


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--model", default=DEMO, help="a checkpoint directory or a hub id")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    as_the_worker(asked.threads)
    load = partial(
        PrunedVLM.from_pretrained, asked.model, device="cpu", dtype=asked.dtype, packed_bytes=PACKED_BYTES
    )
    with patch.multiple(cpu_layers, JOINED={}, fusible_layers=lambda _: None):
        apart = load().model
    sides = {"apart": apart, "joined": load().model}
    with torch.inference_mode():
        found = {f"a step of {rows}": measured(sides, partial(step, rows), asked.rounds) for rows in STEPS}
        found |= {
            f"a prompt of {length}": measured(sides, partial(prompt, length), asked.rounds)
            for length in PROMPTS
        }
        if hasattr(apart.model, "vision_tower"):
            found["a picture in the tower"] = measured(sides, view, asked.rounds)
    rows = [
        (name, Spread.of(1e3 * each for each in taken["apart"]), gain)
        for name, (taken, gain) in found.items()
    ]
    table = markdown(["", "apart, ms", "times as fast joined"], rows)
    results = {name: [gain.q1, gain.median, gain.q3] for name, (_, gain) in found.items()}
    publish(asked, {"times_as_fast": results}, table, partial(plot, results))


def measured(
    sides: dict[str, Any], work: Callable[[Any], Callable[[], object]], rounds: int
) -> tuple[dict[str, list[float]], Spread]:
    """Seconds of each side, and how many times as fast the joined one is."""
    works = {name: work(model) for name, model in sides.items()}

    def seconds(name: str, _round: int) -> float:
        began = time.perf_counter()
        works[name]()
        return time.perf_counter() - began

    taken = in_turns({name: partial(seconds, name) for name in works}, rounds)
    return taken, ratios(taken["apart"], taken["joined"])


def fed(model: Any, rows: int, tokens: int) -> Batch:
    """So many rows that were fed so many tokens, whichever."""
    ids = torch.arange(rows * tokens).view(rows, tokens) % 1000
    following = torch.full((rows,), tokens)
    batch = Batch(roomy_cache(), torch.zeros(rows, 0, dtype=torch.long), following, None)
    batch.extend(model, ids, torch.ones_like(ids), torch.arange(tokens).expand(rows, -1))
    return batch


def step(rows: int, model: Any) -> Callable[[], object]:
    batch, tokens, steps = fed(model, rows, BEHIND), [1] * rows, CpuSteps.of(model)
    return partial(batch.step, model, tokens) if steps is None else partial(steps.step, batch, tokens)


def prompt(tokens: int, model: Any) -> Callable[[], object]:
    return lambda: fed(model, 1, tokens)


def view(model: Any) -> Callable[[], object]:
    tower, draw = model.model.vision_tower, torch.Generator().manual_seed(0)
    edge = math.isqrt(model.config.image_seq_length) * tower.config.patch_size
    return partial(tower, torch.randn(1, 3, edge, edge, generator=draw).to(tower.dtype))


def plot(found: dict[str, list[float]], file: Path) -> None:
    with plotted(file) as axes:
        axes.bar(list(found), [median for _, median, _ in found.values()])
        axes.axhline(1, color="grey", linewidth=1, label="apart")
        axes.set(ylabel="times as fast joined")


if __name__ == "__main__":
    main()
