"""The worker's engine under load against transformers' own `generate`, in one process and one run.

    python -m benchmarks.engine --device cuda --clients 1,8,32
    python -m benchmarks.engine --device cuda --model llava-1.5-13b --quantization nf4 --budgets 128,64
    python -m benchmarks.engine --layers 2 --clients 1,4                # on a CPU, 2 of 32 layers

The geometry of a published model with random weights, which on a CPU are there twice: `transformers` has them
without the worker's products. Every client asks about a new picture as soon as it has
its last answer, and every answer has as many tokens. `transformers` is what one writes without a server:
pictures of all clients through the processor and `generate`, unpruned, as one batch; the engine takes as many
at once. Both begin with pictures, and see the same ones. `benchmarks.serving` compares whole servers; this
one runs where they cannot, on the geometry of real models.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
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
    percentile,
    picture,
    plotted,
    publish,
    ratios,
    several,
    tail_name,
)
from benchmarks._models import CUDA_GRAPH_BYTES, GEOMETRIES, as_the_worker, random_llava
from prismprune import GenerationOptions, Picture, PrunedVLM, TokenBudget, VisualRequest
from prismprune.loading import torch_dtype
from prismprune.quantization import DTYPES, KINDS
from worker.engine import Engine
from worker.line import Limits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from PIL import Image

QUESTION = " ".join(["word"] * 40)
"""As many text tokens as a usual prompt has, system text included."""
BASELINE = "transformers"


@dataclass(frozen=True)
class Round:
    """Answers a second, and seconds from asking to answer."""

    per_s: float
    seconds: list[float]


@dataclass(frozen=True)
class Plain:
    """transformers, unpruned, a batch of all clients' pictures at a time."""

    vlm: PrunedVLM
    clients: int
    waves: int
    tokens: int

    def __call__(self, number: int) -> Round:
        """About pictures that no other round showed."""
        shown, began, seconds = pictures(number), time.perf_counter(), []
        for _ in range(self.waves):
            until = time.perf_counter()
            self._answer([next(shown) for _ in range(self.clients)])
            seconds += [time.perf_counter() - until] * self.clients
        return Round(len(seconds) / (time.perf_counter() - began), seconds)

    def _answer(self, images: Sequence[Image.Image]) -> None:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        prompt = self.vlm.processor.apply_chat_template([{"role": "user", "content": content}])
        inputs = self.vlm.processor(images=list(images), text=[prompt] * len(images), return_tensors="pt")
        inputs = inputs.to(self.vlm.device, self.vlm.dtype)
        output = self.vlm.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        if output.shape[1] - inputs["input_ids"].shape[1] != self.tokens:
            raise RuntimeError("an answer has another length")
        output.cpu()


@dataclass(frozen=True)
class Pruned:
    """The engine at one budget, closed loops."""

    vlm: PrunedVLM
    budget: TokenBudget
    clients: int
    waves: int
    tokens: int

    def __call__(self, number: int) -> Round:
        """About pictures that no other round showed."""
        shown, lock, failures = pictures(number), threading.Lock(), list[BaseException]()
        engine: Any = Engine(
            lambda: self.vlm,
            limits=Limits(max_batch=self.clients, max_tokens=10**7, max_wait_s=0.2),
            overlap=lambda vlm: bool(vlm.device.type == "cuda"),
            on_batch=lambda _: None,
            on_death=failures.append,
        )
        deadline = time.monotonic() + 3600

        def client(_: int) -> list[float]:
            seconds = []
            for _ in range(self.waves):
                with engine.coming():
                    with lock:
                        media = (Picture(next(shown)),)
                    began = time.perf_counter()
                    options = GenerationOptions(max_new_tokens=self.tokens)
                    request = VisualRequest(media, (QUESTION,), self.budget, generation=options)
                    ticket = engine.submit(request, deadline)
                (answer,) = ticket.answered().answers
                if len(answer.token_ids) != self.tokens:
                    raise RuntimeError("an answer has another length")
                seconds.append(time.perf_counter() - began)
            return seconds

        with engine, ThreadPoolExecutor(self.clients) as pool:
            engine.model()
            began = time.perf_counter()
            seconds = [each for own in pool.map(client, range(self.clients)) for each in own]
            wall = time.perf_counter() - began
        if failures:
            raise failures[0]
        return Round(len(seconds) / wall, seconds)


def pictures(number: int) -> Iterator[Image.Image]:
    """Those of a round."""
    return (picture(10_000 * number + place) for place in count())


def main() -> None:
    asked = parsed()
    as_the_worker(asked.threads)
    device, geometry = torch.device(asked.device), GEOMETRIES[asked.model]
    model = partial(
        random_llava,
        asked.model,
        asked.layers or geometry.layers,
        device=device,
        dtype=torch_dtype(asked.dtype or ("float32" if device.type == "cpu" else "bfloat16")),
        quantization=asked.quantization,
    )
    vlm = model(cuda_graph_bytes=CUDA_GRAPH_BYTES)
    plain = model(plain=True) if device.type == "cpu" else vlm
    budgets = {f"prismprune {each}": TokenBudget.parse(each) for each in asked.budgets}
    rows: list[dict[str, Any]] = []
    for clients in asked.clients:
        sides: dict[str, Plain | Pruned] = {BASELINE: Plain(plain, clients, asked.waves, asked.tokens)}
        for name, kept in budgets.items():
            sides[name] = Pruned(vlm, kept, clients, asked.waves, asked.tokens)
        measured = in_turns(sides, asked.rounds)
        rows += [row(clients, name, measured[name], measured[BASELINE]) for name in sides]
    facts: dict[str, Any] = {"of_layers": geometry.layers}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows), **facts)


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--model", choices=GEOMETRIES, default="llava-1.5-7b")
    parser.add_argument("--layers", type=at_least(1), help="of the language model; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--quantization", choices=KINDS, help="of the language model's layers")
    parser.add_argument("--budgets", type=several(kept_tokens), default=("all", "128", "64", "32"))
    parser.add_argument("--clients", type=several(at_least(1)), default=(1, 8, 32))
    parser.add_argument("--waves", type=at_least(1), default=3, help="requests of each client in a round")
    parser.add_argument("--tokens", type=at_least(1), default=16, help="of each answer")
    return parser.parse_args()


def row(clients: int, side: str, rounds: Sequence[Round], base: Sequence[Round]) -> dict[str, Any]:
    """Rates and median times, and their ratios to the baseline's of the same round.

    p99_ms: of fewer answers than a hundred the most.
    """

    def median(one: Round) -> float:
        return percentile(one.seconds, 0.5)

    answers = [each for one in rounds for each in one.seconds]
    return {
        "clients": clients,
        "side": side,
        "answers": len(answers),
        "per_s": asdict(Spread.of(one.per_s for one in rounds)),
        "rate": asdict(ratios([one.per_s for one in rounds], [one.per_s for one in base])),
        "p50_ms": asdict(Spread.of(median(one) * 1e3 for one in rounds)),
        "p50": asdict(ratios(list(map(median, rounds)), list(map(median, base)))),
        "p99_ms": percentile(answers, 0.99) * 1e3,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header: tuple[str, ...] = ("clients", "side", "requests/s", "times the rate", "p50, ms", "times its p50")
    header += ("p99, ms", "which is the")
    return markdown(
        header,
        [
            (
                one["clients"],
                one["side"],
                Spread(**one["per_s"]),
                Spread(**one["rate"]),
                Spread(**one["p50_ms"]),
                Spread(**one["p50"]),
                f"{one['p99_ms']:.0f}",
                tail_name(one["answers"]),
            )
            for one in rows
        ],
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Times the baseline's rate over clients, a line a side."""
    with plotted(file) as axes:
        draw_lines(axes, rows, by="side", x="clients", y="rate")
        axes.set(
            xscale="log", xlabel="clients", ylabel="times transformers' requests a second", ylim=(0, None)
        )


if __name__ == "__main__":
    main()
