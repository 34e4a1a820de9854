"""What those who are being answered feel when others join: encoding beside their tokens, or between them.

    python -m benchmarks.joining --rounds 5 --json joining.json --plot joining.png
    python -m benchmarks.joining --model DIRECTORY --device cuda --budget 64 --arrivals 8

One answer of `--tokens` tokens runs in the worker's engine, without the queue, while requests about other
pictures arrive, each when the one before has its answer. `beside` is `PRISM_OVERLAP=on`, `between` is off.
Both have `--threads` threads a thread of torch's own: beside it are two at work, where there is a core for
each. An answer's end token is not heeded, so that all are of one length, and tokens are the same on both.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks._measure import (
    Spread,
    at_least,
    in_turns,
    kept_tokens,
    markdown,
    options,
    percentile,
    picture,
    plotted,
    publish,
    ratios,
)
from benchmarks._models import CUDA_GRAPH_BYTES, PACKED_BYTES, as_the_worker
from prismprune import GenerationOptions, Picture, PrunedVLM, TokenBudget, VisualRequest
from prismprune.loading import DEMO, load_checkpoint
from worker.engine import Engine
from worker.line import Limits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

WAYS = ("between", "beside")
QUESTION = "Describe every shape and where it lies."


@dataclass
class Heard:
    """When the long answer's tokens came."""

    at: list[float] = field(default_factory=list)
    first: threading.Event = field(default_factory=threading.Event)

    def text(self, _question: int, _text: str) -> None:
        self.at.append(time.monotonic())
        self.first.set()

    def again(self) -> None:
        raise RuntimeError("the batch failed")


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds: from token to token of the long answer, of each that joined from its asking, and of all."""

    gaps: list[float]
    joined: list[float]
    whole: float


@dataclass(frozen=True)
class Joining:
    """The model, and how it is asked."""

    vlm: PrunedVLM
    budget: TokenBudget
    tokens: int
    arrivals: int

    def round(self, way: str, number: int) -> Round:
        """One long answer, and the arrivals."""
        engine = Engine(
            lambda: self.vlm,
            limits=Limits(max_batch=8, max_tokens=10**6, max_wait_s=0),
            overlap=lambda _: way == "beside",
            on_batch=lambda _: None,
            on_death=_die,
        )
        heard, joined = Heard(), list[float]()
        deadline = time.monotonic() + 3600
        with engine:
            engine.model()
            began = time.monotonic()
            long = engine.submit(self._request(number, 0, self.tokens), deadline, listener=heard)
            long.future.add_done_callback(lambda _: heard.first.set())  # a failure says no word
            heard.first.wait()
            for arrival in range(1, self.arrivals + 1):
                asked = time.monotonic()
                engine.submit(self._request(number, arrival, 2), deadline).answered()
                joined.append(time.monotonic() - asked)
            until = time.monotonic()
            long.answered()
            whole = time.monotonic() - began
        at = [moment for moment in heard.at if moment <= until]
        return Round([after - before for before, after in pairwise(at)], joined, whole)

    def _request(self, number: int, arrival: int, tokens: int) -> VisualRequest:
        shown = (Picture(picture(number * 100 + arrival)),)
        return VisualRequest(
            shown, (QUESTION,), self.budget, generation=GenerationOptions(max_new_tokens=tokens)
        )


def _die(error: BaseException) -> None:
    raise error


def main() -> None:
    asked = parsed()
    as_the_worker(asked.threads)
    loaded = load_checkpoint(asked.model, device=asked.device, packed_bytes=PACKED_BYTES)
    vlm = PrunedVLM(replace(loaded, end_ids=frozenset()), cuda_graph_bytes=CUDA_GRAPH_BYTES)
    joining = Joining(vlm, TokenBudget.parse(asked.budget), asked.tokens, asked.arrivals)
    measured = in_turns({way: partial(joining.round, way) for way in WAYS}, asked.rounds)
    rows = [summary(way, measured[way], measured["between"]) for way in WAYS]
    # `device` was perhaps "auto".
    publish(asked, {"rows": rows}, table(rows), partial(plot, measured), device=str(vlm.device))


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=5, threads="torch's, of each of the two threads that compute")
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=kept_tokens, default="64")
    parser.add_argument("--tokens", type=at_least(2), default=120, help="of the long answer")
    parser.add_argument("--arrivals", type=at_least(1), default=6, help="requests that join meanwhile")
    parser.set_defaults(threads=1)
    return parser.parse_args()


def summary(way: str, rounds: Sequence[Round], base: Sequence[Round]) -> dict[str, Any]:
    """Gaps while others join, and ratios to the other way in the same round."""

    def longest(one: Round) -> float:
        return percentile(one.gaps, 1)

    def joining(one: Round) -> float:
        return percentile(one.joined, 0.5)

    def compared(measure: Any) -> dict[str, Any]:
        return asdict(ratios([measure(one) for one in rounds], [measure(one) for one in base]))

    return {
        "way": way,
        "gap_ms": asdict(Spread.of(gap * 1e3 for one in rounds for gap in one.gaps)),
        "longest_gap_ms": asdict(Spread.of(longest(one) * 1e3 for one in rounds)),
        "longest_gap_ratio": compared(longest),
        "joining_ratio": compared(joining),
        "whole_ratio": compared(lambda one: one.whole),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header = (
        "way",
        "token to token, ms",
        "longest, ms",
        "longest, times",
        "a joiner's answer, times",
        "all, times",
    )
    columns = ("gap_ms", "longest_gap_ms", "longest_gap_ratio", "joining_ratio", "whole_ratio")
    return markdown(header, [(row["way"], *(Spread(**row[name]) for name in columns)) for row in rows])


def plot(measured: dict[str, list[Round]], file: Path) -> None:
    """How many of the gaps are at most so long, a line a way."""
    with plotted(file) as axes:
        for way, rounds in measured.items():
            axes.ecdf([gap * 1e3 for one in rounds for gap in one.gaps], label=way)
        axes.set(xlabel="ms from token to token while others join", ylabel="share", xlim=(0, None))


if __name__ == "__main__":
    main()
