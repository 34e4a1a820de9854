"""A text that every prompt begins with, such as an application's instructions, kept and computed each time.

    python -m benchmarks.system_text --rounds 5 --json system.json --plot system.png
    python -m benchmarks.system_text --model DIRECTORY --budgets all,64 --words 50,200

Each round shows a new picture to two sessions of the worker's own, without the queue: one keeps what texts
before media leave in the cache (`PRISM_PREFIX_CACHE_BYTES`), one keeps nothing. Media are new each time, so
nothing else is found. Greedy answers are the same in both, or the script fails.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, islice, product
from typing import TYPE_CHECKING, Any

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
from benchmarks._models import PACKED_BYTES, as_the_worker
from prismprune import GenerationOptions, Picture, PrunedVLM, TokenBudget, VisualRequest
from prismprune.caching import EncodingCache
from prismprune.loading import DEMO

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from prismprune.session import Session

WAYS = {"computed each time": 0, "kept": 256 * 2**20}
"""And the bytes of the cache of prefixes; the latter is the setting's default."""
QUESTION = "What color is the circle?"
TEXT = (
    "You answer questions about pictures for a shop. Say only what can be seen, name colors by their common "
    "names, count with care, and say so where something cannot be told."
)


@dataclass(frozen=True)
class Told:
    """Seconds of a request and of its prefill, its prompt's tokens and its answer's."""

    seconds: float
    prefill_s: float
    prompt_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Asking:
    """A session for each way, text and budget, which goes through all rounds."""

    vlm: PrunedVLM
    tokens: int
    sessions: dict[tuple[str, int, str], Session] = field(default_factory=dict)

    def __call__(self, way: str, words: int, budget: str, number: int) -> Told:
        """One request about picture `number`."""
        kind = (way, words, budget)
        if kind not in self.sessions:
            self.sessions[kind] = self.vlm.session(EncodingCache(0, WAYS[way]))
            for early in (-2, -1):  # a text is kept when it comes for the second time
                self._ask(kind, early)
        return self._ask(kind, number)

    def _ask(self, kind: tuple[str, int, str], number: int) -> Told:
        session, (_, words, budget) = self.sessions[kind], kind
        generation = GenerationOptions(
            max_new_tokens=self.tokens, system=" ".join(islice(cycle(TEXT.split()), words))
        )
        media = (Picture(picture(number)),)
        began = time.perf_counter()
        request = VisualRequest(media, (QUESTION,), TokenBudget.parse(budget), generation=generation)
        (pending,) = session.ask([request])
        while session.pending:
            session.step()
        (answer,) = session.answers(pending)
        seconds, prefill_s = time.perf_counter() - began, answer.timings.prefill_ms / 1e3
        return Told(seconds, prefill_s, answer.prompt_tokens, answer.token_ids)


def main() -> None:
    asked = parsed()
    as_the_worker(asked.threads)
    asking = Asking(PrunedVLM.from_pretrained(asked.model, packed_bytes=PACKED_BYTES), asked.tokens)
    kinds = list(product(WAYS, asked.words, asked.budgets))
    measured = in_turns({kind: partial(asking, *kind) for kind in kinds}, asked.rounds)
    base, kept = WAYS
    rows = [
        summary(words, each, measured[kept, words, each], measured[base, words, each])
        for words, each in product(asked.words, asked.budgets)
    ]
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows))


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--budgets", type=several(kept_tokens), default=("all", "64"))
    parser.add_argument("--words", type=several(at_least(1)), default=(25, 50, 100, 200), help="of the text")
    parser.add_argument("--tokens", type=at_least(1), default=4, help="of an answer, at most")
    return parser.parse_args()


def summary(words: int, budget: str, kept: Sequence[Told], computed: Sequence[Told]) -> dict[str, Any]:
    """Times where the text is kept, of those where it is not."""
    if [one.token_ids for one in kept] != [one.token_ids for one in computed]:
        raise RuntimeError("the answers differ")
    return {
        "words": words,
        "budget": budget,
        "prompt_tokens": kept[0].prompt_tokens,
        "prefill": asdict(ratios([one.prefill_s for one in kept], [one.prefill_s for one in computed])),
        "request": asdict(ratios([one.seconds for one in kept], [one.seconds for one in computed])),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header = ("words of text", "tokens kept", "tokens of the prompt", "prefill, times", "request, times")
    columns = ("words", "budget", "prompt_tokens")
    return markdown(
        header,
        [
            (*(row[name] for name in columns), Spread(**row["prefill"]), Spread(**row["request"]))
            for row in rows
        ],
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Time of a request over the words of the text, a line a budget."""
    with plotted(file) as axes:
        draw_lines(axes, rows, by="budget", x="words", y="request")
        axes.set(xlabel="words of the text", ylabel="times computing it", xlim=(0, None), ylim=(0, None))


if __name__ == "__main__":
    main()
