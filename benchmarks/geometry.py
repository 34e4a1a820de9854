"""Prefill and memory in the geometry of the real models, at the paper's budgets, beside the paper's ratios.

    python -m benchmarks.geometry --layers 4                                   # float32, 4 of 32 layers
    python -m benchmarks.geometry --layers 32 --nf4 --json geometry.json       # the whole of LLaVA-1.5-7B
    python -m benchmarks.geometry --model llava-1.5-13b --layers 2 --nf4

LLaVA-1.5 with random weights: tower and projector are whole, the language model has as many of its layers as
the machine holds, and the output says how many; nothing is estimated for layers that are not there. Every
round asks about a new picture at each budget, in an order that moves on.

The paper times whole answers of LLaVA-1.6-13B on a GPU, at the same shares of its 2880 tokens: 640, 320 and
160; its ratio of memory counts the weights too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks._measure import (
    CLOCKS,
    MIB,
    Spread,
    in_turns,
    markdown,
    options,
    peak_bytes,
    picture,
    plotted,
    publish,
    ratios,
    reset_peak,
)
from benchmarks._models import LANGUAGE_MODELS, LAYERS, llava
from prismprune import GenerationOptions, PrunedVLM
from prismprune.meters import memory_bytes
from prismprune.planning import decoder_flops
from prismprune.session import Asked

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

ALL = "all"
QUESTION = " ".join(["word"] * 40)
"""As many text tokens as a usual prompt has, system text included."""
PAPER_SECONDS = {"all": 3073, "128": 1364, "64": 1084, "32": 942}
"""The supplement's total times of LLaVA-1.6-13B, by tokens a crop."""


@dataclass(frozen=True)
class Run:
    """One prefill. Seconds; `peak_bytes` is what it held beyond the loaded model, from the encoding on."""

    encode: float
    prefill: float
    peak_bytes: int
    kv_bytes: int
    flops: int

    @property
    def first_token(self) -> float:
        """Seconds until the first token could be chosen."""
        return self.encode + self.prefill


@dataclass(frozen=True)
class Prefilling:
    """The model at one budget."""

    vlm: PrunedVLM
    budget: str
    clock: Callable[[], float]

    def __call__(self, number: int) -> Run:
        """About picture `number`."""
        reset_peak(self.vlm.device)
        loaded = memory_bytes(self.vlm.device)
        began = self.clock()
        encoded = self.vlm.encode(picture(number), self.budget)
        session = self.vlm.session()
        asked = Asked(encoded, (QUESTION,), GenerationOptions(max_new_tokens=1))
        request = session.prepare(asked)
        until = self.clock()
        session.join([request])
        ended = self.clock()
        peak = peak_bytes(self.vlm.device) - loaded
        while session.pending:
            session.step()
        answer = session.answers(request)[0]
        text, prompt = self.vlm.model.config.get_text_config(), answer.prompt_tokens
        flops = decoder_flops(text, prompt, prompt)
        return Run(until - began, ended - until, peak, answer.memory.kv_cache_bytes, flops)


def main() -> None:
    asked = parsed()
    torch.set_num_threads(asked.threads)
    vlm = llava(asked.model, asked.layers, nf4=asked.nf4)
    budgets = [ALL, *asked.budgets.split(",")]
    measured = in_turns(
        {budget: Prefilling(vlm, budget, CLOCKS[asked.clock]) for budget in budgets}, asked.rounds
    )
    rows = [row(budget, measured[budget], measured[ALL]) for budget in budgets]
    facts = {"of_layers": LAYERS[asked.model], "resident_mib": vlm.memory_bytes() // MIB}
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows), **facts)


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=5, clock=True)
    parser.add_argument("--model", choices=LANGUAGE_MODELS, default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--nf4", action="store_true", help="the language model's layers in NF4")
    parser.add_argument("--budgets", default="192,128,64", help="beside all")
    return parser.parse_args()


def row(budget: str, runs: Sequence[Run], base: Sequence[Run]) -> dict[str, Any]:
    """Everything as a ratio to every token kept, round by round; memory and cache in bytes as well."""
    names = ("encode", "prefill", "first_token", "peak_bytes")
    return {
        "budget": budget,
        **{
            name: asdict(ratios([getattr(run, name) for run in runs], [getattr(run, name) for run in base]))
            for name in names
        },
        "flops": runs[0].flops / base[0].flops,
        "kv": runs[0].kv_bytes / base[0].kv_bytes,
        "bytes_over_the_model": asdict(Spread.of(run.peak_bytes for run in runs)),
        "encode_share": asdict(ratios([run.encode for run in runs], [run.first_token for run in runs])),
        "paper_total_time": PAPER_SECONDS[budget] / PAPER_SECONDS[ALL] if budget in PAPER_SECONDS else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header: tuple[str, ...] = (
        "tokens",
        "prefill",
        "its FLOPs",
        "first token",
        "peak over the model",
        "MiB over it",
        "KV",
    )
    header += ("encoding's share", "paper: total time")
    return markdown(
        header,
        [
            (
                one["budget"],
                Spread(**one["prefill"]),
                f"{one['flops']:.3f}",
                Spread(**one["first_token"]),
                Spread(**one["peak_bytes"]),
                f"{one['bytes_over_the_model']['median'] / MIB:.0f}",
                f"{one['kv']:.3f}",
                Spread(**one["encode_share"]),
                f"{one['paper_total_time']:.3f}" if one["paper_total_time"] else "",
            )
            for one in rows
        ],
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """The ratios over the budgets."""
    with plotted(file) as axes:
        budgets = [one["budget"] for one in rows]
        for name in ("prefill", "first_token", "peak_bytes"):
            axes.plot(
                budgets, [one[name]["median"] for one in rows], marker="o", label=name.replace("_", " ")
            )
        axes.plot(budgets, [one["flops"] for one in rows], linestyle="--", label="prefill's FLOPs")
        axes.plot(
            budgets, [one["paper_total_time"] or float("nan") for one in rows], "s", label="paper: total time"
        )
        axes.set(xlabel="visual tokens", ylabel="times all 576", ylim=(0, None))


if __name__ == "__main__":
    main()
