"""Decoding steps that CUDA replays, against the same steps launched one kernel after the other, in one run.

    python -m benchmarks.steps                                   # LLaVA-1.5-7B's geometry, bfloat16
    python -m benchmarks.steps --model llava-1.5-13b --quantization nf4 --rows 1,8 --json steps.json

A picture's question is asked so many times at once, at each budget, and every answer has as many tokens. Rows
are those of a batch at work: the more, the less the program's launches matter. The first round records.
Beside the times stands the least that a step can take: reading every weight of the language model once, at
the rate of a copy within the device's memory, measured in the same run.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from benchmarks._measure import (
    Spread,
    at_least,
    draw_lines,
    in_turns,
    kept_tokens,
    markdown,
    options,
    picture,
    plotted,
    publish,
    ratios,
    several,
)
from benchmarks._models import GEOMETRIES, random_llava
from prismprune import GenerationOptions, PrunedVLM
from prismprune.loading import torch_dtype
from prismprune.quantization import DTYPES, KINDS
from prismprune.session import Asked

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

ENOUGH = 2**36
WAYS = ("plain", "replayed")
Setting = tuple[str, int]
"""Budget and rows."""


@dataclass(frozen=True)
class Decoding:
    """A model that replays its steps or does not, at one budget and number of rows."""

    vlm: PrunedVLM
    setting: Setting
    tokens: int

    def __call__(self, number: int) -> float:
        """Seconds of one step, of the mean of all but the first ones."""
        budget, rows = self.setting
        encoded = self.vlm.encode(picture(number), budget)
        session = self.vlm.session()
        questions = tuple(f"{'word ' * 20} {row}" for row in range(rows))
        session.admit([Asked(encoded, questions, GenerationOptions(max_new_tokens=self.tokens))])
        for _ in range(2):  # the first tokens are the prefill's, and the next step may record
            session.step()
        torch.cuda.synchronize()
        began, steps = time.perf_counter(), 0
        while session.pending:
            session.step()
            steps += 1
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps


def main() -> None:
    asked = parsed()
    device = torch.device("cuda")
    layers = asked.layers or GEOMETRIES[asked.model].layers
    model = partial(
        random_llava,
        asked.model,
        layers,
        device=device,
        dtype=torch_dtype(asked.dtype),
        quantization=asked.quantization,
    )
    plain = model()
    replayed = PrunedVLM(plain._loaded, cuda_graph_bytes=ENOUGH)  # noqa: SLF001 (one model serves both)
    settings = list(product(asked.budgets, asked.rows))
    sides = {
        (way, setting): Decoding(vlm, setting, asked.tokens)
        for setting in settings
        for way, vlm in zip(WAYS, (plain, replayed), strict=True)
    }
    measured = in_turns(sides, asked.rounds)
    floor = reading_s(plain)
    rows = [
        summary(setting, measured["plain", setting], measured["replayed", setting], floor)
        for setting in settings
    ]
    facts = {"device": torch.cuda.get_device_name(device), "of_layers": GEOMETRIES[asked.model].layers}
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows), **facts)


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--model", choices=GEOMETRIES, default="llava-1.5-7b")
    parser.add_argument("--layers", type=at_least(1), help="of the language model; default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--quantization", choices=KINDS, help="of the language model's layers")
    parser.add_argument("--budgets", type=several(kept_tokens), default=("64", "all"))
    parser.add_argument("--rows", type=several(at_least(1)), default=(1, 2, 4, 8))
    parser.add_argument("--tokens", type=at_least(4), default=32, help="of each answer")
    return parser.parse_args()


def reading_s(vlm: PrunedVLM) -> float:
    """Seconds to read the language model's layers and head once, at the rate of a copy, read and write."""
    parts = (vlm.model.model.language_model.layers, vlm.model.lm_head)
    weights = sum(tensor.nbytes for part in parts for tensor in part.parameters())
    source = torch.empty(2**30, dtype=torch.uint8, device=vlm.device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    torch.cuda.synchronize()
    rate = 20 * 2 * source.nbytes / (time.perf_counter() - began)
    return weights / rate


def summary(
    setting: Setting, plain: Sequence[float], replayed: Sequence[float], floor: float
) -> dict[str, Any]:
    budget, rows = setting
    return {
        "budget": budget,
        "rows": rows,
        "plain_ms": asdict(Spread.of(each * 1e3 for each in plain)),
        "replayed_ms": asdict(Spread.of(each * 1e3 for each in replayed)),
        "faster": asdict(ratios(plain, replayed)),
        "times_reading": asdict(Spread.of(each / floor for each in replayed)),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    columns = ("plain_ms", "replayed_ms", "faster", "times_reading")
    header = ("tokens", "rows", "plain, ms", "replayed, ms", "times as fast", "times reading the weights")
    return markdown(
        header, [(one["budget"], one["rows"], *(Spread(**one[name]) for name in columns)) for one in rows]
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Times as fast over rows, a line a budget."""
    with plotted(file) as axes:
        draw_lines(axes, rows, by="budget", x="rows", y="faster")
        axes.axhline(1, color="grey", linewidth=1, label="plain")
        axes.set(xlabel="rows", ylabel="times as fast", ylim=(0, None))


if __name__ == "__main__":
    main()
