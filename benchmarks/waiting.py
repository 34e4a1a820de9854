"""What it wins when jobs wait a moment to share a batch with others (`PRISM_MAX_WAIT_MS`), in one run.

    python -m benchmarks.waiting --threads 2 --json waiting.json --plot waiting.png
    python -m benchmarks.waiting --clients 8,32 --tokens 4,48

Two services, started as `make serve` does but for that setting, serve the small checkpoint of
`benchmarks.serving`, whose answers end where they are told to, and get the same new pictures from so many
closed-loop clients, in turns. Answers are of `--tokens` tokens, or, where two numbers are given, of as many
as a seed draws from between them: then callers come back at all times.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks._measure import (
    Spread,
    at_least,
    draw_lines,
    in_turns,
    markdown,
    options,
    plotted,
    publish,
    ratios,
    several,
)
from benchmarks.serving.asking import Contender, closed_loop, questions
from benchmarks.serving.checkpoint import FOLDER, checkpoint
from benchmarks.serving.rivals.ours import PrismPrune
from benchmarks.serving.servers import Keeper, leave_by_sigterm
from prismprune.settings import LibrarySettings
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from benchmarks.serving.asking import Round

DEFAULT_MS = WorkerSettings.model_fields["max_wait_ms"].default

MEASURES: dict[str, Callable[[Round], float]] = {
    "per_s": lambda one: one.per_s,
    "first_s": lambda one: median(answer.first_s for answer in one.answers),
    "total_s": lambda one: median(answer.total_s for answer in one.answers),
}
"""Answers a second, and seconds until an answer's first words and until its last."""


def main() -> None:
    asked = parsed()
    leave_by_sigterm()
    model = str(checkpoint(Path(asked.cache) / FOLDER).transformers)
    logs = Path(tempfile.gettempdir()) / "prismprune-waiting"
    with tempfile.TemporaryDirectory() as scratch, Keeper(asked.threads, logs) as keeper:
        contenders = {
            ms: Contender(
                keeper.start(
                    PrismPrune(model, Path(scratch) / str(ms), logs, settings={"PRISM_MAX_WAIT_MS": str(ms)})
                ),
                f"{ms:g} ms",
                {"token_budget": asked.budget},
            )
            for ms in (0, asked.wait)
        }
        rows = [row for clients in asked.clients for row in _compared(contenders, clients, asked)]
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows))


def parsed() -> argparse.Namespace:
    numbers = several(at_least(1))
    parser = options(__doc__, rounds=5, threads="torch's, of each service")
    parser.add_argument(
        "--cache", default=str(LibrarySettings().cache_dir / "benchmarks"), help="of checkpoints"
    )
    parser.add_argument("--budget", type=at_least(1), default=64)
    parser.add_argument("--clients", type=numbers, default=(1, 8, 32))
    parser.add_argument("--requests", type=at_least(1), default=64, help="of each side in each round")
    parser.add_argument(
        "--tokens", type=several(at_least(1)), default=(4,), help="of an answer: so many, or from,to"
    )
    parser.add_argument("--wait", type=at_least(0.1), default=DEFAULT_MS, help="ms, compared with none")
    asked = parser.parse_args()
    if sorted(asked.tokens[:2]) != list(asked.tokens):
        parser.error("--tokens is a number, or a lower and a higher one")
    return asked


def _compared(
    contenders: dict[float, Contender], clients: int, asked: argparse.Namespace
) -> list[dict[str, Any]]:
    def side(contender: Contender, number: int) -> Round:
        seed = 10_000 * clients + 1_000 * number
        rng = random.Random(seed)
        lengths = [rng.randint(asked.tokens[0], asked.tokens[-1]) for _ in range(asked.requests)]
        return asyncio.run(closed_loop(contender, questions(asked.requests, seed), clients, lengths))

    rounds = in_turns({ms: partial(side, own) for ms, own in contenders.items()}, asked.rounds)
    measured = {
        ms: {name: [of(one) for one in own] for name, of in MEASURES.items()} for ms, own in rounds.items()
    }
    return [
        {"clients": clients, "wait": f"{ms:g} ms"}
        | {name: asdict(ratios(own[name], measured[0][name])) for name in MEASURES}
        for ms, own in measured.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header = ("clients", "wait", "answers a second, times 0 ms'", "median to first words", "median in all")
    return markdown(
        header,
        [(row["clients"], row["wait"], *(Spread(**row[name]) for name in MEASURES)) for row in rows],
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Rates over clients."""
    with plotted(file) as axes:
        draw_lines(axes, rows, by="wait", x="clients", y="per_s")
        axes.set(xlabel="clients", ylabel="answers a second, times 0 ms'", ylim=(0, None))


if __name__ == "__main__":
    main()
