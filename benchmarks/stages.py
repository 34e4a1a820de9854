"""Each stage of an answer against what this machine's arithmetic allows.

    python -m benchmarks.stages --threads 1 --json stages.json --plot stages.png
    python -m benchmarks.stages --model DIRECTORY --budgets all,128,64,32

The limit of a stage is the floating point operations that it cannot do without (`prismprune.planning`) over
the rate of a large square matrix product, measured in the same round. To say why a stage is above it, the
stage's own linear layers are run by themselves, on as many rows as the stage has: what these take beyond the
limit is the price of their shapes (a token's products wait for the weights to come from memory), and what the
stage takes beyond these is everything that is no linear layer: attention, norms, and the program around them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from benchmarks._measure import (
    Spread,
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
from prismprune import GenerationOptions, PrunedVLM, TokenBudget
from prismprune.loading import DEMO
from prismprune.planning import stage_flops
from prismprune.selection import selector
from prismprune.session import Asked

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from prismprune.cpu_products import Copies

QUESTION = "What color is the star?"
STAGES = ("vision", "prefill", "token")
SQUARE, PRODUCTS = 1024, 8
"""Edge and number of the products that the machine's rate is measured with: 17 GFLOP, in cache."""
TOKENS = 4
"""Of an answer; the median step between two of them counts."""


@dataclass(frozen=True)
class Run:
    """Seconds of one answer: its stages, what is no arithmetic, and the stages' linear layers alone.

    rate: floating point operations a second of the square product.
    """

    stages: dict[str, float]
    layers: dict[str, float]
    preprocess: float
    select: float
    rate: float


@dataclass(frozen=True)
class Product:
    """A call of linear layers that multiply the same values: on how many rows."""

    layers: tuple[nn.Linear, ...]
    copies: Copies | None
    rows: int

    def run(self, values: torch.Tensor) -> None:
        """On the first rows and columns of `values`."""
        own = values[: self.rows, : self.inputs]
        if self.copies is None or self.copies.product(own) is None:
            for layer in self.layers:
                layer(own)

    @property
    def inputs(self) -> int:
        return self.layers[0].in_features


class Answering:
    """One question at one budget, stage by stage. The first call notes the linear layers of each."""

    def __init__(self, vlm: PrunedVLM, budget: str) -> None:
        self.vlm, self.budget = vlm, budget
        self.products: dict[str, list[Product]] = {}
        self.flops: dict[str, int] = {}

    def __call__(self, number: int) -> Run:
        """Asks about picture `number`."""
        noted: list[Product] = []
        hooks = [] if self.products else self._noting(noted)
        stages, preprocess, select = self._stages(number, noted)
        for hook in hooks:
            hook.remove()
        return Run(stages, self._layers(), preprocess, select, rate())

    def _stages(self, number: int, noted: list[Product]) -> tuple[dict[str, float], float, float]:
        encoded = self.vlm.encode(picture(number), self.budget)
        self._keep("vision", noted)
        session = self.vlm.session()
        request = session.prepare(Asked(encoded, (QUESTION,), GenerationOptions(max_new_tokens=TOKENS)))
        prefill = seconds(partial(session.join, [request]))
        self._keep("prefill", noted)
        session.step()  # chooses the first token
        steps = []
        while session.pending:
            steps.append(seconds(session.step))
            self._keep("token", noted)
        kept, prompt = encoded.visual_tokens.kept, len(request.prompts[0].token_ids)
        self.flops = asdict(stage_flops(self.vlm.model.config, kept, prompt - kept, self._looked_at()))
        times = {
            "vision": encoded.timings.vision_ms / 1e3,
            "prefill": prefill,
            "token": statistics.median(steps),
        }
        return times, encoded.timings.preprocess_ms / 1e3, encoded.timings.select_ms / 1e3

    def _looked_at(self) -> int | None:
        patches = self.vlm.model.config.image_seq_length
        keep = TokenBudget.parse(self.budget).resolve(patches)
        looked_at = selector().looks_at(torch.rand(1, 1, patches), keep)
        return None if keep >= patches or looked_at is None else looked_at.shape[1]

    def _noting(self, noted: list[Product]) -> list[Any]:
        linears = [module for module in self.vlm.model.modules() if isinstance(module, nn.Linear)]
        held = [copies for module in self.vlm.model.modules() if (copies := getattr(module, "copies", None))]
        groups = {layer: copies for copies in held for layer in copies.layers}

        def note(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            copies = groups.get(layer)
            layers = (cast("nn.Linear", layer),) if copies is None else copies.layers
            if layer is layers[0]:  # of those that multiply together each is called while hooks watch
                noted.append(Product(layers, copies, args[0].shape[:-1].numel()))

        return [layer.register_forward_pre_hook(note) for layer in linears]

    def _keep(self, stage: str, noted: list[Product]) -> None:
        if noted:
            self.products.setdefault(stage, list(noted))
            noted.clear()

    def _layers(self) -> dict[str, float]:
        return {stage: seconds(partial(run_all, products)) for stage, products in self.products.items()}


@torch.inference_mode()
def run_all(products: Sequence[Product]) -> None:
    """The products of a stage, on values that cost nothing."""
    rows, columns = max(one.rows for one in products), max(one.inputs for one in products)
    values = torch.ones(rows, columns)
    for product in products:
        product.run(values)


def rate() -> float:
    """Floating point operations a second of a square matrix product."""
    one, other = torch.ones(SQUARE, SQUARE), torch.ones(SQUARE, SQUARE)
    torch.mm(one, other)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(one, other)

    return PRODUCTS * 2 * SQUARE**3 / seconds(multiply)


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    asked = parsed()
    as_the_worker(asked.threads)
    vlm = PrunedVLM.from_pretrained(asked.model, device="cpu", dtype="float32", packed_bytes=PACKED_BYTES)
    sides = {each: Answering(vlm, each) for each in asked.budgets}
    measured = in_turns(sides, asked.rounds)
    rows = [row for name, side in sides.items() for row in rows_of(side, measured[name])]
    publish(asked, {"rows": rows}, table(rows), partial(plot, rows), dtype="float32")


def parsed() -> argparse.Namespace:
    parser = options(__doc__, rounds=10)
    parser.add_argument("--model", default=DEMO, help="in LLaVA's shape")
    parser.add_argument("--budgets", type=several(kept_tokens), default=("all", "128", "64", "32"))
    return parser.parse_args()


def rows_of(side: Answering, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """For each stage its time over the limit, the layers' over the limit, its own over the layers'.

    share: of the time until the first token, of which selection and preprocessing are a part too.
    """
    first = [
        sum(run.stages[one] for one in ("vision", "prefill")) + run.preprocess + run.select for run in runs
    ]
    for stage in STAGES:
        own = [run.stages[stage] for run in runs]
        limit = [side.flops[stage] / run.rate for run in runs]
        layers = [run.layers[stage] for run in runs]
        yield {
            "budget": side.budget,
            "stage": stage,
            "gflop": side.flops[stage] / 1e9,
            "of_limit": asdict(ratios(own, limit)),
            "layers_of_limit": asdict(ratios(layers, limit)),
            "of_layers": asdict(ratios(own, layers)),
            "share": asdict(ratios(own, first)) if stage != "token" else None,
        }
    for stage, own in (
        ("preprocess", [run.preprocess for run in runs]),
        ("select", [run.select for run in runs]),
    ):
        yield {"budget": side.budget, "stage": stage, "share": asdict(ratios(own, first))}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    ratio_names = ("of_limit", "layers_of_limit", "of_layers", "share")
    header: tuple[str, ...] = (
        "budget",
        "stage",
        "GFLOP",
        "times its limit",
        "its linear layers alone, times the limit",
    )
    header += ("the stage, times its linear layers", "share of the time to the first token")
    return markdown(
        header,
        [
            (
                row["budget"],
                row["stage"],
                f"{row['gflop']:.3g}" if "gflop" in row else "",
                *(Spread(**row[name]) if row.get(name) else "" for name in ratio_names),
            )
            for row in rows
        ],
    )


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """How many times its limit each stage takes, a group a budget; the limit is the line at 1."""
    with plotted(file) as axes:
        budgets = list(dict.fromkeys(row["budget"] for row in rows))
        for place, stage in enumerate(STAGES):
            own = [row["of_limit"]["median"] for row in rows if row["stage"] == stage]
            axes.bar([number + 0.25 * place for number in range(len(budgets))], own, 0.25, label=stage)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(ylabel="times the arithmetic limit", xlabel="visual tokens", yscale="log")
        axes.set_xticks([number + 0.25 for number in range(len(budgets))], budgets)


if __name__ == "__main__":
    main()
