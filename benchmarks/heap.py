"""Requests with glibc's allocator as it is, and with `prismprune.heap.keep_freed_memory` as in the worker.

    python -m benchmarks.heap --threads 2
    python -m benchmarks.heap --budgets all,64 --requests 12 --rounds 6 --json heap.json --plot heap.png

What an allocator has been told cannot be taken back, so every round starts a process for each way, in turns;
both answer the same questions about the same pictures. The model is that of `benchmarks.serving`: a tower in
CLIP's shape, whose activations are many blocks of some MiB.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from benchmarks._measure import (
    apart,
    at_least,
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
from benchmarks._models import PACKED_BYTES
from benchmarks.serving.checkpoint import FOLDER, checkpoint
from prismprune import GenerationOptions, PrunedVLM
from prismprune.heap import keep_freed_memory
from prismprune.session import Asked
from prismprune.settings import LibrarySettings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

WAYS = ("as it is", "kept")
FIRST = 4
"""Requests of a process that are dropped: memory is taken for the first time."""
STAGES = ("vision_ms", "prefill_ms", "token_ms")
Answers = dict[str, list[float]]
"""By what is measured, a value a request."""


def main() -> None:
    asked = parsed()
    if asked.way:
        print(json.dumps(answers(asked)))
        return
    asked.model = asked.model or str(
        checkpoint(LibrarySettings().cache_dir / "benchmarks" / FOLDER).transformers
    )
    rows = [row for each in asked.budgets for row in compared(asked, each)]
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows))


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=4)
    parser.add_argument("--model", help="in LLaVA's shape; default: the one of benchmarks.serving")
    parser.add_argument("--budgets", type=several(kept_tokens), default=("all", "64"))
    parser.add_argument(
        "--requests", type=at_least(1), default=10, help="of each process, after the first that are dropped"
    )
    parser.add_argument("--way", choices=WAYS, help="one process: answer, and print what was measured")
    return parser.parse_args()


def answers(asked: argparse.Namespace) -> Answers:
    """One way at one budget, in this process."""
    if asked.way == "kept" and not keep_freed_memory():
        raise SystemExit("the allocator is not glibc's")
    torch.set_num_threads(asked.threads)
    logging.disable_progress_bar()
    vlm = PrunedVLM.from_pretrained(asked.model, device="cpu", dtype="float32", packed_bytes=PACKED_BYTES)
    measured: Answers = {name: [] for name in (*STAGES, "page_faults")}
    for number in range(FIRST + asked.requests):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        one = answer(vlm, number, asked.budgets[0])
        one["page_faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        for name, value in one.items():
            if number >= FIRST:
                measured[name].append(value)
    return measured


def answer(vlm: PrunedVLM, number: int, kept: str) -> dict[str, float]:
    """The stages of one question about picture `number`, in milliseconds."""
    encoded = vlm.encode(picture(number), kept)
    session = vlm.session()
    question = Asked(encoded, ("What color is the star?",), GenerationOptions(max_new_tokens=4))
    (request,) = session.admit([question])
    began = time.perf_counter()
    steps = 0
    while session.pending:
        session.step()
        steps += 1
    token_ms = 1e3 * (time.perf_counter() - began) / max(1, steps - 1)  # the first was prefilled
    (told,) = session.answers(request)
    return {"vision_ms": told.timings.vision_ms, "prefill_ms": told.timings.prefill_ms, "token_ms": token_ms}


def compared(asked: argparse.Namespace, kept: str) -> list[dict[str, Any]]:
    """A row a way: medians over rounds, and of each stage the ratio to the allocator as it is."""
    same = {"model": asked.model, "threads": asked.threads, "requests": asked.requests, "budgets": kept}
    argv = [part for name, value in same.items() for part in (f"--{name}", value)]

    def medians(way: str, _round: int) -> dict[str, float]:
        told: Answers = apart("benchmarks.heap", "--way", way, *argv)
        return {name: statistics.median(values) for name, values in told.items()}

    measured = in_turns({way: partial(medians, way) for way in WAYS}, asked.rounds)
    rows = []
    for way, own in measured.items():
        row: dict[str, Any] = {"budget": kept, "way": way}
        row |= {name: statistics.median(one[name] for one in own) for name in own[0]}
        for stage in STAGES:
            row[f"{stage}_ratio"] = str(
                ratios([one[stage] for one in own], [one[stage] for one in measured[WAYS[0]]])
            )
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a budget and way; times are of the allocator's as it is."""
    header = ("budget", "freed memory", "page faults a request", "vision", "prefill", "a token")
    cells = [
        (row["budget"], row["way"], f"{row['page_faults']:.0f}", *(row[f"{stage}_ratio"] for stage in STAGES))
        for row in rows
    ]
    return markdown(header, cells)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Milliseconds of each stage, a group a budget and way."""
    with plotted(file) as axes:
        names = [f"{row['budget']}, {row['way']}" for row in rows]
        below = [0.0] * len(rows)
        for stage in STAGES:
            values = [row[stage] for row in rows]
            axes.bar(names, values, bottom=below, label=stage.removesuffix("_ms"))
            below = [low + value for low, value in zip(below, values, strict=True)]
        axes.set(ylabel="ms")


if __name__ == "__main__":
    main()
