"""Pictures and prompts side by side on a share of a CPU's threads each, and one by one on all of them.

    python -m benchmarks.lanes --threads 2
    python -m benchmarks.lanes --model DIRECTORY --budgets 64 --counts 2,8 --json lanes.json --plot lanes.png

What `prismprune.lanes` is for: so many pictures through the tower to their kept tokens, and so many prompts
through the language model, each in a pass of its own. (The engine runs short prompts several to a pass.)
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks._measure import (
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
from benchmarks._models import PACKED_BYTES, as_the_worker
from prismprune import PrunedVLM
from prismprune.lanes import side_by_side
from prismprune.loading import DEMO
from prismprune.vlm import visual_request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks._measure import Spread

    Passes = Sequence[Callable[[], object]]
    Way = Callable[[Passes], object]

QUESTION = "What color is the star?"


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--budgets", type=several(kept_tokens), default=("all", "64"))
    parser.add_argument("--counts", type=several(at_least(1)), default=(2, 3, 4, 8), help="of pictures")
    asked = parser.parse_args()
    as_the_worker(asked.threads)
    vlm = PrunedVLM.from_pretrained(asked.model, device="cpu", packed_bytes=PACKED_BYTES)
    cells: list[tuple[str, int, str, Spread]] = []
    with torch.inference_mode():
        for kept, count in itertools.product(asked.budgets, asked.counts):
            for stage, gain in measured(vlm, kept, count, asked.rounds).items():
                cells.append((kept, count, stage, gain))
    table = markdown(["tokens", "pictures", "stage", "times as fast side by side"], cells)
    rows = [
        {"case": f"{stage}, {kept}", "pictures": count, "gain": asdict(gain)}
        for kept, count, stage, gain in cells
    ]
    publish(asked, {"rows": rows}, table, partial(plot, rows))


def measured(vlm: PrunedVLM, kept: str, count: int, rounds: int) -> dict[str, Spread]:
    """How many times as fast each stage of so many requests is side by side."""
    ways: dict[str, Way] = {
        "after each other": lambda passes: [run() for run in passes],
        "side by side": partial(side_by_side, device=vlm.device),
    }
    numbers = itertools.count()

    def vision(way: str, _round: int) -> float:
        shown = [picture(next(numbers)) for _ in range(count)]
        requests = [visual_request(one, QUESTION, token_budget=kept) for one in shown]
        return seconds(ways[way], [partial(vlm.session().encode, [request]) for request in requests])

    requests = [visual_request(picture(number), QUESTION, token_budget=kept) for number in range(count)]
    encoded = vlm.session().encode(requests)

    def prefill(way: str, _round: int) -> float:
        return seconds(ways[way], [partial(vlm.session().admit, [one]) for one in encoded])

    gains = {}
    for name, stage in {"vision": vision, "prefill": prefill}.items():
        taken = in_turns({way: partial(stage, way) for way in ways}, rounds)
        gains[name] = ratios(taken["after each other"], taken["side by side"])
    return gains


def seconds(way: Way, passes: Passes) -> float:
    began = time.perf_counter()
    way(passes)
    return time.perf_counter() - began


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """How many times as fast, by the number of pictures."""
    with plotted(file) as axes:
        draw_lines(axes, rows, by="case", x="pictures", y="gain")
        axes.set(xlabel="pictures", ylabel="times as fast")


if __name__ == "__main__":
    main()
