"""Requests with glibc's allocator as it is, and as `prismprune.heap` has it for the worker.

    python -m benchmarks.heap --threads 2
    python -m benchmarks.heap --budgets all,64 --rounds 60 --json heap.json --plot heap.png

A process for each way: as it is, keeping what is freed, and keeping it in pages of 2 MiB. They answer the
same questions about the same pictures in turns, request by request, so that whatever slows the machine down
meets all of them. The model is that of `benchmarks.serving`: a tower in CLIP's shape, whose activations are
many blocks of some MiB.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from transformers.utils import logging

from benchmarks._measure import (
    MIB,
    PROC,
    in_turns,
    kept_tokens,
    markdown,
    one_of,
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
from prismprune.heap import TUNABLES, keep_freed_memory, with_large_pages
from prismprune.session import Asked
from prismprune.settings import LibrarySettings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from pathlib import Path

AS_IT_IS, KEPT, LARGE = WAYS = ("as it is", "kept", "kept, large pages")
FIRST = 4
"""Rounds that are dropped: memory is taken for the first time."""
STAGES = ("vision_ms", "prefill_ms", "token_ms", "request_ms")


def main() -> None:
    asked = parsed()
    if asked.way:
        answer_all(asked)
        return
    asked.model = asked.model or str(
        checkpoint(LibrarySettings().cache_dir / "benchmarks" / FOLDER).transformers
    )
    rows = compared(asked)
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows))


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=30)
    parser.add_argument("--model", help="in LLaVA's shape; default: the one of benchmarks.serving")
    parser.add_argument("--budgets", type=several(kept_tokens), default=("all", "64"))
    parser.add_argument("--way", type=one_of(WAYS), help="one process: answers a line of input each")
    return parser.parse_args()


def answer_all(asked: argparse.Namespace) -> None:
    """Answers lines of a picture's number and a budget, as JSON, until there are no more."""
    if asked.way != AS_IT_IS and not keep_freed_memory():
        raise SystemExit("the allocator is not glibc's")
    torch.set_num_threads(asked.threads)
    logging.disable_progress_bar()
    vlm = PrunedVLM.from_pretrained(asked.model, device="cpu", dtype="float32", packed_bytes=PACKED_BYTES)
    for line in sys.stdin:
        number, _, kept = line.strip().partition(" ")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        told = answer(vlm, int(number), kept)
        told["page_faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        told |= memory()
        print(json.dumps(told), flush=True)


def answer(vlm: PrunedVLM, number: int, kept: str) -> dict[str, float]:
    """The stages of one question about picture `number`, in milliseconds."""
    image = picture(number)
    began = time.perf_counter()
    encoded = vlm.encode(image, kept)
    session = vlm.session()
    question = Asked(encoded, ("What color is the star?",), GenerationOptions(max_new_tokens=4))
    (request,) = session.admit([question])
    decoding = time.perf_counter()
    steps = 0
    while session.pending:
        session.step()
        steps += 1
    ended = time.perf_counter()
    (told,) = session.answers(request)
    return {
        "vision_ms": told.timings.vision_ms,
        "prefill_ms": told.timings.prefill_ms,
        "token_ms": 1e3 * (ended - decoding) / max(1, steps - 1),  # the first was prefilled
        "request_ms": 1e3 * (ended - began),
    }


def memory() -> dict[str, float]:
    """What of this process is resident, and how much of that lies in large pages, in MiB."""
    lines = (PROC / "self" / "smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return {"resident_mib": sizes["Rss"] * 1024 / MIB, "large_mib": sizes["AnonHugePages"] * 1024 / MIB}


def environment(way: str) -> Mapping[str, str]:
    """Of a process that answers this way: what is told to this one is not told to the others."""
    own = {name: value for name, value in os.environ.items() if name != TUNABLES}
    return with_large_pages(own) if way == LARGE else own


class Side:
    """A process that answers one way."""

    def __init__(self, asked: argparse.Namespace, way: str) -> None:
        own = ("--way", way, "--model", asked.model, "--threads", str(asked.threads))
        command = [sys.executable, "-m", "benchmarks.heap", *own]
        self.process = subprocess.Popen(  # noqa: S603 (ours)
            command, env=environment(way), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def answer(self, kept: str, number: int) -> dict[str, float]:
        """What it measured of one request."""
        print(number, kept, file=cast("IO[str]", self.process.stdin), flush=True)
        line = cast("IO[str]", self.process.stdout).readline()
        if not line:
            raise SystemExit(f"a process ended: {self.process.wait()}")
        told: dict[str, float] = json.loads(line)
        return told


def compared(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a budget and way: medians over rounds, and of each stage the ratio to the allocator as it is."""
    rows = []
    with ExitStack() as stack:
        sides = {way: Side(asked, way) for way in WAYS}
        for side in sides.values():
            stack.enter_context(side.process)
        for kept in asked.budgets:
            turns = {way: partial(side.answer, kept) for way, side in sides.items()}
            measured = in_turns(turns, asked.rounds, warm_up=FIRST)
            rows += [row(kept, way, own, measured[AS_IT_IS]) for way, own in measured.items()]
    return rows


def row(
    kept: str, way: str, own: Sequence[dict[str, float]], base: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Of one way's rounds and those of the allocator as it is."""
    told: dict[str, Any] = {"budget": kept, "way": way}
    told |= {name: statistics.median(one[name] for one in own) for name in own[0]}
    for stage in STAGES:
        told[f"{stage}_ratio"] = str(ratios([one[stage] for one in own], [one[stage] for one in base]))
    return told


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row a budget and way; times are of the allocator's as it is."""
    header = (
        *("budget", "freed memory", "page faults a request", "MiB", "in large pages"),
        *("vision", "prefill", "a token", "all"),
    )
    cells = [
        (
            *(each["budget"], each["way"], f"{each['page_faults']:.0f}"),
            *(f"{each[name]:.0f}" for name in ("resident_mib", "large_mib")),
            *(each[f"{stage}_ratio"] for stage in STAGES),
        )
        for each in rows
    ]
    return markdown(header, cells)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Milliseconds of vision and prefill, a bar a budget and way."""
    with plotted(file) as axes:
        names = [f"{each['budget']}, {each['way']}" for each in rows]
        below = [0.0] * len(rows)
        for stage in STAGES[:2]:
            values = [each[stage] for each in rows]
            axes.bar(names, values, bottom=below, label=stage.removesuffix("_ms"))
            below = [low + value for low, value in zip(below, values, strict=True)]
        axes.set(ylabel="ms")


if __name__ == "__main__":
    main()
