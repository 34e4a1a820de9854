"""What it wins when jobs wait a moment to share a batch with others (`PRISM_MAX_WAIT_MS`), in one run.

    python -m benchmarks.waiting --threads 2 --json waiting.json --plot waiting.png
    python -m benchmarks.waiting --model DIRECTORY --clients 8,32 --tokens 4,48 --requests 64

Two services, started as `make serve` does but for that setting, get the same new pictures from so many
closed-loop clients, in turns. Answers are of `--tokens` tokens, or, where two numbers are given, of as many
as a seed draws from between them: then callers come back at all times.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._measure import Spread, draw_lines, in_turns, markdown, options, plotted, publish, ratios
from benchmarks.serving.asking import Contender, Told, ask, connections, questions
from benchmarks.serving.rivals.ours import PrismPrune
from benchmarks.serving.servers import Keeper
from prismprune.loading import DEMO
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

DEFAULT_MS = WorkerSettings.model_fields["max_wait_ms"].default

MEASURES = ("per_s", "first_s", "total_s")


@dataclass(frozen=True)
class Round:
    """What the clients of one round saw: answers a second, and the median seconds to first and last words."""

    per_s: float
    first_s: float
    total_s: float


def main() -> None:
    asked = parsed()
    logs = Path(tempfile.gettempdir()) / "prismprune-waiting"
    with tempfile.TemporaryDirectory() as scratch, Keeper(asked.threads, logs) as keeper:
        contenders = {
            ms: Contender(
                keeper.start(
                    PrismPrune(
                        asked.model,
                        Path(scratch) / str(ms),
                        settings={"PRISM_MAX_WAIT_MS": str(ms)},
                    )
                ),
                f"{ms} ms",
                {"token_budget": asked.budget},
            )
            for ms in (0, asked.wait)
        }
        rows = [row for clients in asked.clients for row in _compared(contenders, clients, asked)]
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows))


def parsed() -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser = options(__doc__, rounds=5)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--clients", type=numbers, default=(1, 8, 32))
    parser.add_argument("--requests", type=int, default=64, help="of each side in each round")
    parser.add_argument("--tokens", type=numbers, default=(4,), help="of an answer: so many, or from,to")
    parser.add_argument("--wait", type=float, default=DEFAULT_MS, help="ms, compared with none")
    return parser.parse_args()


def _compared(
    contenders: dict[float, Contender], clients: int, asked: argparse.Namespace
) -> list[dict[str, Any]]:
    def side(contender: Contender, number: int) -> Round:
        return asyncio.run(_round(contender, clients, asked, seed=10_000 * clients + 1_000 * number))

    rounds = in_turns({ms: partial(side, own) for ms, own in contenders.items()}, asked.rounds)

    def against_none(own: Sequence[Round], measure: str) -> dict[str, float]:
        values, base = ([getattr(one, measure) for one in each] for each in (own, rounds[0]))
        return asdict(ratios(values, base))

    return [
        {"clients": clients, "wait": f"{ms:g} ms"} | {name: against_none(own, name) for name in MEASURES}
        for ms, own in rounds.items()
    ]


async def _round(contender: Contender, clients: int, asked: argparse.Namespace, seed: int) -> Round:
    rng = random.Random(seed)
    least, most = asked.tokens[0], asked.tokens[-1]
    waiting = [(content, rng.randint(least, most)) for content in questions(asked.requests, seed)]
    answers: list[Told] = []

    async def one_after_another() -> None:
        while waiting:
            content, tokens = waiting.pop()
            answers.append(await ask(http, contender, content, tokens))

    async with connections(contender) as http:
        began = time.perf_counter()
        await asyncio.gather(*(one_after_another() for _ in range(clients)))
        wall_s = time.perf_counter() - began
    return Round(
        len(answers) / wall_s,
        Spread.of(answer.first_s for answer in answers).median,
        Spread.of(answer.total_s for answer in answers).median,
    )


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
