"""Prefill, answers and memory in the geometry of the real models, at the paper's budgets, beside its ratios.

    python -m benchmarks.geometry --layers 4                              # float32 on a CPU, 4 of 32 layers
    python -m benchmarks.geometry --layers 2 --quantization nf4 --json geometry.json
    python -m benchmarks.geometry --model llava-1.6-13b --device cuda --budgets 640,320,160 --new-tokens 8

LLaVA-1.5 and 1.6 with random weights: tower and projector are whole, the language model has as many of its
layers as are asked for (all, if not said), and the output says how many; nothing is estimated for layers that
are not there. LLaVA-1.6 is packed as in the paper, without unpadding and newlines. Every round asks about a
new picture at each budget, in an order that moves on. Products are the worker's, and on CUDA what it records
is recorded in three rounds that are dropped. The process's allocator is left as it is: what it would keep of
one budget's memory would be the next one's, too.

The paper times whole answers of LLaVA-1.6-13B on a GPU, at 640, 320 and 160 of 2880 tokens; its memory is
that of the device at the peak, weights and all.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks._measure import (
    ALL,
    CLOCKS,
    MIB,
    Spread,
    at_least,
    in_turns,
    kept_tokens,
    markdown,
    options,
    peak_bytes,
    picture,
    plotted,
    publish,
    ratios,
    reset_peak,
    several,
)
from benchmarks._models import CUDA_GRAPH_BYTES, GEOMETRIES, WARM_UP_CUDA, random_llava
from prismprune import GenerationOptions, PrunedVLM
from prismprune.loading import torch_dtype
from prismprune.meters import memory_bytes
from prismprune.planning import decoder_flops
from prismprune.quantization import DTYPES, KINDS
from prismprune.session import Asked

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

QUESTION = " ".join(["word"] * 40)
"""As many text tokens as a usual prompt has, system text included."""
PAPER_SECONDS = {576: 3073, 128: 1364, 64: 1084, 32: 942}
"""The supplement's total times of LLaVA-1.6-13B, by tokens a crop."""


@dataclass(frozen=True)
class Run:
    """One answer. Seconds; `peak_bytes` is what the device held at the most, from the encoding on."""

    encode: float
    prefill: float
    generate: float
    peak_bytes: int
    over_bytes: int
    """Of them, beyond the loaded model."""
    kv_bytes: int
    flops: int

    @property
    def first_token(self) -> float:
        """Seconds until the first token could be chosen."""
        return self.encode + self.prefill

    @property
    def total(self) -> float:
        """Seconds of the answer."""
        return self.first_token + self.generate


@dataclass(frozen=True)
class Answering:
    """The model at one budget."""

    vlm: PrunedVLM
    budget: str
    new_tokens: int
    clock: Callable[[], float]

    def __call__(self, number: int) -> Run:
        """About picture `number`."""
        reset_peak(self.vlm.device)
        loaded = memory_bytes(self.vlm.device)
        began = self.clock()
        encoded = self.vlm.encode(picture(number), self.budget)
        session = self.vlm.session()
        asked = Asked(encoded, (QUESTION,), GenerationOptions(max_new_tokens=self.new_tokens))
        request = session.prepare(asked)
        until = self.clock()
        session.join([request])
        prefilled = self.clock()
        peak = peak_bytes(self.vlm.device)  # the session looks at it, and begins anew
        while session.pending:
            session.step()
        ended = self.clock()
        peak = max(peak, request.peak_bytes)
        answer = session.answers(request)[0]
        text, prompt = self.vlm.model.config.get_text_config(), answer.prompt_tokens
        return Run(
            encode=until - began,
            prefill=prefilled - until,
            generate=ended - prefilled,
            peak_bytes=peak,
            over_bytes=peak - loaded,
            kv_bytes=answer.memory.kv_cache_bytes,
            flops=decoder_flops(text, prompt, prompt),
        )


def main() -> None:
    asked = parsed()
    torch.set_num_threads(asked.threads)
    device, geometry = torch.device(asked.device), GEOMETRIES[asked.model]
    layers = asked.layers or geometry.layers
    vlm = random_llava(
        asked.model,
        layers,
        device=device,
        dtype=torch_dtype(asked.dtype or ("float32" if device.type == "cpu" else "bfloat16")),
        quantization=asked.quantization,
        cuda_graph_bytes=CUDA_GRAPH_BYTES,
    )
    resident = vlm.memory_bytes() // MIB
    budgets, clock = dict.fromkeys([ALL, *asked.budgets]), clock_of(device, asked.clock)
    sides = {each: Answering(vlm, each, asked.new_tokens, clock) for each in budgets}
    warm_up = WARM_UP_CUDA if device.type == "cuda" else 1
    measured = in_turns(sides, asked.rounds, warm_up=warm_up)
    rows = [row(each, geometry.crops, measured[each], measured[ALL]) for each in budgets]
    facts = {"layers": f"{layers} of {geometry.layers}", "resident_mib": resident, "dtype": vlm.dtype}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows), **{k: str(v) for k, v in facts.items()})


def clock_of(device: torch.device, name: str) -> Callable[[], float]:
    """One of `CLOCKS`; on CUDA the wall's, once the device has done what it was told."""
    if device.type == "cpu":
        return CLOCKS[name]

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=5, clock=True)
    parser.add_argument("--model", choices=GEOMETRIES, default="llava-1.5-7b")
    parser.add_argument("--layers", type=at_least(1), help="of the language model; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--quantization", choices=KINDS, help="of the language model's layers")
    parser.add_argument(
        "--budgets", type=several(kept_tokens), default=("192", "128", "64"), help="beside all"
    )
    parser.add_argument("--new-tokens", type=at_least(1), default=1, help="of each answer")
    return parser.parse_args()


def row(kept: str, crops: int, runs: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    """Everything as a ratio to every token kept, round by round; memory and seconds by themselves as well."""
    names = ("encode", "prefill", "first_token", "generate", "total", "peak_bytes", "over_bytes")
    paper = PAPER_SECONDS.get(576 if kept == ALL else int(kept) // crops)
    return {
        "budget": kept,
        **{
            name: asdict(ratios([getattr(run, name) for run in runs], [getattr(run, name) for run in base]))
            for name in names
        },
        "flops": runs[0].flops / base[0].flops,
        "kv": runs[0].kv_bytes / base[0].kv_bytes,
        "seconds": {name: asdict(Spread.of(getattr(run, name) for run in runs)) for name in names[:5]},
        "bytes": {name: asdict(Spread.of(getattr(run, name) for run in runs)) for name in names[5:]},
        "encode_share": asdict(ratios([run.encode for run in runs], [run.first_token for run in runs])),
        "paper_total_time": paper / PAPER_SECONDS[576] if paper and kept != ALL else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header: tuple[str, ...] = ("tokens", "prefill", "its FLOPs", "first token", "whole answer")
    header += (
        "paper: total time",
        "peak, MiB",
        "over the model, MiB",
        "KV",
        "encoding's share",
        "prefill, ms",
    )
    return markdown(
        header,
        [
            (
                one["budget"],
                Spread(**one["prefill"]),
                f"{one['flops']:.3f}",
                Spread(**one["first_token"]),
                Spread(**one["total"]),
                f"{one['paper_total_time']:.3f}" if one["paper_total_time"] else "",
                *(f"{one['bytes'][name]['median'] / MIB:.0f}" for name in ("peak_bytes", "over_bytes")),
                f"{one['kv']:.3f}",
                Spread(**one["encode_share"]),
                f"{one['seconds']['prefill']['median'] * 1e3:.1f}",
            )
            for one in rows
        ],
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """The ratios over the budgets."""
    with plotted(file) as axes:
        budgets = [one["budget"] for one in rows]
        for name in ("prefill", "first_token", "total", "over_bytes"):
            axes.plot(
                budgets, [one[name]["median"] for one in rows], marker="o", label=name.replace("_", " ")
            )
        axes.plot(budgets, [one["flops"] for one in rows], linestyle="--", label="prefill's FLOPs")
        axes.plot(
            budgets, [one["paper_total_time"] or float("nan") for one in rows], "s", label="paper: total time"
        )
        axes.set(xlabel="visual tokens", ylabel="times all tokens", ylim=(0, None))


if __name__ == "__main__":
    main()
