"""What the whole service adds to its engine, in one run: to the time of a request, and to the rate.

    python -m benchmarks.overhead --threads 2 --json overhead.json --plot overhead.png
    python -m benchmarks.overhead --model DIRECTORY --budget 64 --requests 32 --rounds 5

The service is `make serve`'s, on the CPU in float32, the engine the same model in this process, with as many
threads; while one works, the other idles. Its settings are the defaults, but that its caches are off, which
no request here could use, and that it waits longer before it gives anything up. Both decode the same JPEG
files, and must say the same.

By itself: both are asked about the same new picture, in turns; what a request takes longer through the
service is what was added. Besides, the service's own account: its client's time less the stages that it
reports, which does not suffer from what disturbs the machine between two requests. Together: the service
answers a round's requests for as many clients as its worker holds jobs, the library in batches of what the
worker answers at once.
"""

from __future__ import annotations

import io
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks._measure import (
    Spread,
    at_least,
    in_turns,
    markdown,
    options,
    percentile,
    picture,
    plotted,
    publish,
    ratios,
    tail_name,
)
from benchmarks._models import PACKED_BYTES, as_the_worker
from benchmarks.serving.rivals.ours import PrismPrune
from benchmarks.serving.servers import Keeper, leave_by_sigterm
from prismprune import PrunedVLM
from prismprune.loading import DEMO
from prismprune.vlm import visual_request

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

QUESTION = "What color is the star?"
BATCH, CLIENTS = 8, 16
"""The defaults of `PRISM_MAX_BATCH` and `PRISM_CONCURRENCY`: what one worker answers, and holds, at once."""
STAGES = ("decode_ms", "preprocess_ms", "vision_ms", "select_ms", "prefill_ms", "generate_ms")


@dataclass(frozen=True)
class One:
    """One request by itself: milliseconds, the text, and of the service what its stages leave of the time."""

    ms: float
    text: str
    unaccounted_ms: float = 0.0


@dataclass(frozen=True)
class Together:
    """Many requests: answers a second, and their texts in the requests' order."""

    per_s: float
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Offline:
    """The library in this process."""

    vlm: PrunedVLM
    fields: dict[str, Any]

    def one(self, number: int) -> One:
        """About picture `number`."""
        data, began = jpeg(number), time.perf_counter()
        answer = self.vlm.answer(data, QUESTION, **self.fields)
        return One(1e3 * (time.perf_counter() - began), answer.text)

    def together(self, numbers: Sequence[int]) -> Together:
        """In batches of `BATCH`."""
        files, began, texts = list(map(jpeg, numbers)), time.perf_counter(), list[str]()
        for start in range(0, len(files), BATCH):
            own = files[start : start + BATCH]
            batch = [visual_request(data, QUESTION, **self.fields) for data in own]
            texts += [answers[0].text for answers in self.vlm.answer_batch(batch)]
        return Together(len(files) / (time.perf_counter() - began), tuple(texts))


@dataclass(frozen=True)
class Service:
    """The same by way of the front end."""

    http: httpx.Client
    fields: dict[str, Any]

    def one(self, number: int) -> One:
        """About picture `number`."""
        data, began = jpeg(number), time.perf_counter()
        body = self._answer(data)
        ms = 1e3 * (time.perf_counter() - began)
        return One(ms, body["answer"], ms - sum(body["timings"][stage] for stage in STAGES))

    def together(self, numbers: Sequence[int]) -> Together:
        """`CLIENTS` at once."""
        files = list(map(jpeg, numbers))
        with ThreadPoolExecutor(CLIENTS) as clients:
            began = time.perf_counter()
            bodies = list(clients.map(self._answer, files))
            wall_s = time.perf_counter() - began
        return Together(len(files) / wall_s, tuple(body["answer"] for body in bodies))

    def _answer(self, data: bytes) -> dict[str, Any]:
        form = {"question": QUESTION, **{name: str(value) for name, value in self.fields.items()}}
        reply = self.http.post("/v1/answer", data=form, files={"image": data})
        reply.raise_for_status()
        body: dict[str, Any] = reply.json()
        return body


def jpeg(number: int) -> bytes:
    """Picture `number` as a file."""
    buffer = io.BytesIO()
    picture(number).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def main() -> None:
    asked = parsed()
    leave_by_sigterm()
    as_the_worker(asked.threads)
    fields = {"token_budget": asked.budget, "max_new_tokens": asked.tokens}
    logs = Path(tempfile.gettempdir()) / "prismprune-overhead"
    with tempfile.TemporaryDirectory() as scratch, Keeper(asked.threads, logs) as keeper:
        rival = PrismPrune(asked.model, Path(scratch), logs)
        server = keeper.start(rival)
        vlm = PrunedVLM.from_pretrained(
            asked.model, device=rival.device, dtype=rival.dtype, packed_bytes=PACKED_BYTES
        )
        offline = Offline(vlm, fields)
        with httpx.Client(base_url=server.url, timeout=600, trust_env=False) as http:
            service = Service(http, fields)
            ones = alternating(offline, service, asked.requests * asked.rounds)
            sides: dict[str, Offline | Service] = {"offline": offline, "service": service}
            many = in_turns(
                {name: partial(_round, side, asked.requests, asked.rounds) for name, side in sides.items()},
                asked.rounds,
            )
    results = summary(ones, many)
    publish(asked, results, table(results), partial(plot, ones))


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=5, threads="torch's, of each side")
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--budget", type=at_least(1), default=64)
    parser.add_argument("--requests", type=at_least(1), default=32, help="of each side in each round")
    parser.add_argument("--tokens", type=at_least(1), default=4, help="of an answer, at most")
    return parser.parse_args()


def alternating(offline: Offline, service: Service, requests: int) -> dict[str, list[One]]:
    """One request after the other, each side's turn coming first as often as the other's."""
    ones = in_turns({"offline": offline.one, "service": service.one}, requests)
    _same([one.text for one in ones["offline"]], [one.text for one in ones["service"]])
    return ones


def _round(side: Offline | Service, requests: int, rounds: int, number: int) -> Together:
    """About pictures that no other round showed, nor any request by itself: no cache knows them."""
    first = 1 + requests * (rounds + number)
    return side.together(range(first, first + requests))


def _same(offline: Sequence[str], service: Sequence[str]) -> None:
    """Raise SystemExit where they answer differently: then they were not asked the same."""
    different = sum(one != other for one, other in zip(offline, service, strict=True))
    if different:
        raise SystemExit(f"{different} of {len(offline)} answers differ between service and library")


def summary(ones: dict[str, list[One]], many: dict[str, list[Together]]) -> dict[str, Any]:
    """Milliseconds added, by pairs of the same picture and by the service's own account, and rates.

    Of fewer pairs than a hundred a p99 is the most.
    """
    for one, other in zip(many["offline"], many["service"], strict=True):
        _same(one.texts, other.texts)
    times = {name: [one.ms for one in own] for name, own in ones.items()}
    pairs = [own - base for own, base in zip(times["service"], times["offline"], strict=True)]
    left = [one.unaccounted_ms for one in ones["service"]]
    rates = {name: [one.per_s for one in own] for name, own in many.items()}
    return {
        "added_pairs_ms": asdict(Spread.of(pairs)),
        "added_p50_of_offline": percentile(times["service"], 0.5) / percentile(times["offline"], 0.5),
        "pairs": len(pairs),
        "added_p99_ms": percentile(pairs, 0.99),
        "unaccounted_ms": asdict(Spread.of(left)),
        "unaccounted_p99_ms": percentile(left, 0.99),
        "rate_of_offline": asdict(ratios(rates["service"], rates["offline"])),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    header = ("measure", "median (quartiles)", tail_name(results["pairs"]))
    return markdown(
        header,
        [
            (
                "ms added, same picture in process",
                Spread(**results["added_pairs_ms"]),
                f"{results['added_p99_ms']:.1f}",
            ),
            (
                "ms beyond the stages that the service reports",
                Spread(**results["unaccounted_ms"]),
                f"{results['unaccounted_p99_ms']:.1f}",
            ),
            ("p50, times in process", f"{results['added_p50_of_offline']:.3f}", ""),
            ("rate, times the offline batches'", Spread(**results["rate_of_offline"]), ""),
        ],
    )


def plot(ones: dict[str, list[One]], file: Path) -> None:
    """The share of requests that took at most so long."""
    with plotted(file) as axes:
        for name, own in ones.items():
            axes.ecdf([one.ms for one in own], label=name)
        axes.set(xlabel="ms of a request", ylabel="share of requests", xlim=(0, None))


if __name__ == "__main__":
    main()
