"""Several questions about one picture: in one request, at once, and one after the other, in one run.

    python -m benchmarks.questions --rounds 5 --json questions.json --plot questions.png
    python -m benchmarks.questions --model DIRECTORY --budget 64 --counts 1,2,4,8,16

Each round asks about a new picture in five ways, in an order that moves on: `request`, all questions in one
request; `at once`, a request a question, all there when the engine takes its next; `after another`, a request
a question, each when the last was answered, with the worker's caches of encodings and of prefixes;
`encodings cached`, the same without the prefixes; `no cache`, the same without either. The session is the
worker's own, without the queue. Greedy answers are the same in all five.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from benchmarks._measure import (
    CLOCKS,
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
from benchmarks._models import PACKED_BYTES, as_the_worker
from prismprune import GenerationOptions, Picture, PrunedVLM, TokenBudget, VisualRequest
from prismprune.caching import EncodingCache
from prismprune.loading import DEMO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

CACHE_BYTES = 256 * 2**20
"""The default of `PRISM_MEDIA_CACHE_BYTES`, and of `PRISM_PREFIX_CACHE_BYTES`."""
WAYS = {
    "request": (CACHE_BYTES, CACHE_BYTES),
    "at once": (CACHE_BYTES, CACHE_BYTES),
    "after another": (CACHE_BYTES, CACHE_BYTES),
    "encodings cached": (CACHE_BYTES, 0),
    "no cache": (0, 0),
}
"""And the bytes of the two caches."""
WORDS = ("star", "circle", "square", "triangle", "cross", "ring", "heart", "moon")
ASKED = ("What color is the {}?", "How many shapes are left of the {}?")


def questions(count: int) -> tuple[str, ...]:
    """At most 16 questions, no two of them the same."""
    return tuple(asked.format(word) for asked in ASKED for word in WORDS)[:count]


@dataclass(frozen=True)
class Asking:
    """The model, and what every question is asked with."""

    vlm: PrunedVLM
    budget: TokenBudget
    generation: GenerationOptions
    clock: Callable[[], float]

    def seconds(self, count: int, way: str, number: int) -> float:
        """Until all of `count` questions about picture `number` have their answers."""
        session = self.vlm.session(EncodingCache(*WAYS[way]))
        turns = self._turns(questions(count), way, number)
        began = self.clock()
        for requests in turns:
            session.ask(requests)
            while session.pending:
                session.step()
        return self.clock() - began

    def _turns(self, asked: tuple[str, ...], way: str, number: int) -> list[list[VisualRequest]]:
        """The requests that join together, in their order."""
        media = (Picture(picture(number)),)

        def request(*own: str) -> VisualRequest:
            return VisualRequest(media, own, self.budget, generation=self.generation, media_key=number)

        if way == "request":
            return [[request(*asked)]]
        each = [request(question) for question in asked]
        return [each] if way == "at once" else [[one] for one in each]


def main() -> None:
    asked = parsed()
    as_the_worker(asked.threads)
    vlm = PrunedVLM.from_pretrained(asked.model, packed_bytes=PACKED_BYTES)
    generation = GenerationOptions(max_new_tokens=asked.tokens)
    asking = Asking(vlm, TokenBudget.parse(asked.budget), generation, CLOCKS[asked.clock])
    kinds = list(product(asked.counts, WAYS))
    measured = in_turns({kind: partial(asking.seconds, *kind) for kind in kinds}, asked.rounds)
    one = measured[1, "no cache"]
    rows = [summary(*kind, measured[kind], one) for kind in kinds]
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows))


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=5, clock=True)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--budget", type=kept_tokens, default="64")
    parser.add_argument("--counts", type=_counts, default=(1, 2, 4, 8, 16))
    parser.add_argument("--tokens", type=at_least(1), default=4, help="of an answer, at most")
    return parser.parse_args()


def _counts(text: str) -> tuple[int, ...]:
    """Of questions; one alone is what the others are compared with."""
    return tuple(sorted({1, *several(_count)(text)}))


def _count(text: str) -> int:
    if (count := at_least(1)(text)) > len(questions(count)):
        raise argparse.ArgumentTypeError(f"there are no {count} different questions")
    return count


def summary(count: int, way: str, seconds: Sequence[float], one: Sequence[float]) -> dict[str, Any]:
    """Times of the round's single question, for all and for each after the first."""
    further = (
        [(own - first) / (count - 1) for own, first in zip(seconds, one, strict=True)] if count > 1 else []
    )
    return {
        "questions": count,
        "way": way,
        "seconds": asdict(Spread.of(seconds)),
        "of_one": asdict(ratios(seconds, one)),
        "each_further_of_one": asdict(ratios(further, one)) if further else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header = ("questions", "way", "times one question", "each further, times one")
    return markdown(
        header,
        [
            (
                row["questions"],
                row["way"],
                Spread(**row["of_one"]),
                Spread(**row["each_further_of_one"]) if row["each_further_of_one"] else "",
            )
            for row in rows
        ],
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Time of all questions over their number, a line a way."""
    with plotted(file) as axes:
        draw_lines(axes, rows, by="way", x="questions", y="of_one")
        axes.set(
            xlabel="questions about one picture", ylabel="times one question", xlim=(0, None), ylim=(0, None)
        )


if __name__ == "__main__":
    main()
