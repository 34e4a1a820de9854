"""The demo's answers, weights, memory and prefill at each precision and budget, on each device that is there.

    python -m benchmarks.precision                             # the embedded demo model, 20 pictures
    python -m benchmarks.precision --pictures 200 --json

int8 and NF4 are of the language model's layers; the rest stays in bfloat16, as when they are served. The
models of all precisions answer the same questions about the same held-out scenes, greedily, in an order that
moves on from picture to picture, so that whatever slows the machine down meets all of them. A picture's
questions are one batch; the first picture warms up and is not timed, nor are the next two on CUDA, where what
can be is recorded and replayed as when it is served. Peak memory is that of a process of its own for each
precision and device, which answers at growing budgets and records nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks._measure import (
    ALL,
    add_threads,
    apart,
    at_least,
    kept_tokens,
    listed,
    machine,
    one_of,
    peak_bytes,
    reset_peak,
    several,
    touch,
)
from benchmarks._models import CUDA_GRAPH_BYTES, WARM_UP_CUDA
from prismprune import GenerationOptions, PrunedVLM
from prismprune.demo.evaluate import SCENES, subjects
from prismprune.evaluation.compare import same_answer
from prismprune.evaluation.measures import wilson
from prismprune.loading import DEMO
from prismprune.meters import memory_bytes
from prismprune.planning import plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismprune.evaluation.subjects import Subject
    from prismprune.replay import GraphBytes

PRECISIONS: dict[str, tuple[str, str | None]] = {
    "fp32": ("float32", None),
    "bf16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "nf4": ("bfloat16", "nf4"),
}
"""The number format, and the quantization."""
REFERENCE, EVERYTHING = "fp32", ALL
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
GREEDY = GenerationOptions(max_new_tokens=16)
WARM_UP = 1
"""Pictures."""


@dataclass
class Tally:
    """What one precision answered at one budget: right ones, those equal to the reference's, and times."""

    right: list[bool] = field(default_factory=list)
    unchanged: list[bool] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)

    def summary(self, reference_ms: Sequence[float]) -> dict[str, Any]:
        """Shares with their 95 % interval; how many times faster than the reference, picture by picture."""
        faster = [theirs / ours for theirs, ours in zip(reference_ms, self.prefill_ms, strict=True)]
        first, _, third = statistics.quantiles(faster, n=4, method="inclusive")
        return {
            "questions": len(self.right),
            "accuracy": _share(self.right),
            "unchanged": _share(self.unchanged),
            "prefill_ms": statistics.median(self.prefill_ms),
            "times_faster": {"median": statistics.median(faster), "q1": first, "q3": third},
        }


def _share(marks: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(marks), len(marks))
    return {"share": statistics.fmean(marks), "low": low, "high": high}


def measure(
    model: str, device: str, budgets: Sequence[str], asked: Sequence[Subject]
) -> dict[str, dict[str, Any]]:
    """By precision and budget, what `Tally.summary` says."""
    vlms = {name: load(model, name, device, CUDA_GRAPH_BYTES) for name in PRECISIONS}
    warm_up = WARM_UP if device == "cpu" else WARM_UP_CUDA
    tallies: dict[str, dict[str, Tally]] = {name: {budget: Tally() for budget in budgets} for name in vlms}
    for number, subject in enumerate(track(asked, device, console=Console(stderr=True), transient=True)):
        order = list(vlms)[number % len(vlms) :] + list(vlms)[: number % len(vlms)]
        said = {(name, budget): answers(vlms[name], subject, budget) for name in order for budget in budgets}
        true = [question.answer for question in subject.questions]
        for (name, budget), (texts, prefill_ms) in said.items():
            tally = tallies[name][budget]
            tally.right += map(same_answer, texts, true)
            tally.unchanged += map(str.__eq__, texts, said[REFERENCE, budget][0])
            tally.prefill_ms += [prefill_ms] if number >= warm_up else []
    reference_ms = tallies[REFERENCE][EVERYTHING].prefill_ms
    return {
        name: {budget: tally.summary(reference_ms) for budget, tally in own.items()}
        for name, own in tallies.items()
    }


def load(model: str, precision: str, device: str, cuda_graph_bytes: GraphBytes = 0) -> PrunedVLM:
    dtype, quantization = PRECISIONS[precision]
    return PrunedVLM.from_pretrained(
        model, device=device, dtype=dtype, quantization=quantization, cuda_graph_bytes=cuda_graph_bytes
    )


def answers(vlm: PrunedVLM, subject: Subject, budget: str) -> tuple[list[str], float]:
    """To each of the questions, and how long the language model took for their prompts, in milliseconds."""
    found = vlm.answer_encoded(
        vlm.encode(subject.media, budget), [question.text for question in subject.questions], GREEDY
    )
    return [answer.text for answer in found], found[0].timings.prefill_ms


def peak_memory(
    model: str, precision: str, device: str, budgets: Sequence[str], subject: Subject
) -> dict[str, Any]:
    """Bytes that one precision takes: once loaded, and at the highest while it answers at each budget."""
    vlm = load(model, precision, device)
    touch(vlm.model)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading freed goes back to Linux, or it would be counted
    loaded = memory_bytes(vlm.device)
    peaks = {}
    for budget in sorted(budgets, key=lambda budget: int(budget) if budget.isdecimal() else sys.maxsize):
        reset_peak(vlm.device)
        for _ in range(2):
            answers(vlm, subject, budget)
        peaks[budget] = peak_bytes(vlm.device)
    return {"loaded_bytes": loaded, "peak_bytes": peaks}


def peak_memory_apart(arguments: argparse.Namespace, precision: str, device: str) -> dict[str, Any]:
    """The same of a process of its own."""
    names = ("model", "questions", "threads")
    asked = [word for name in names for word in (f"--{name}", getattr(arguments, name))]
    asked += ["--budgets", ",".join(arguments.budgets)]
    own = ("--memory-of", precision, "--devices", device)
    memory: dict[str, Any] = apart("benchmarks.precision", *own, *asked)
    return memory


def scenes(arguments: argparse.Namespace) -> list[Subject]:
    """Held-out ones, the same every time."""
    found = subjects(SCENES, arguments.pictures)
    return [replace(subject, questions=subject.questions[: arguments.questions]) for subject in found]


def run(arguments: argparse.Namespace, devices: Sequence[str], budgets: Sequence[str]) -> dict[str, Any]:
    asked = scenes(arguments)
    return {
        "machine": machine(on_cuda=torch.cuda.is_available()),
        "model": arguments.model,
        "pictures": arguments.pictures,
        "weight_bytes": {name: weight_bytes(arguments.model, name) for name in PRECISIONS},
        "devices": {
            device: {
                # Before this process takes memory of its own on the device.
                "memory": {name: peak_memory_apart(arguments, name, device) for name in PRECISIONS},
                "answers": measure(arguments.model, device, budgets, asked),
            }
            for device in devices
        },
    }


def weight_bytes(model: str, precision: str) -> int:
    """Planned, which the tests hold to the byte against what is loaded."""
    dtype, quantization = PRECISIONS[precision]
    return plan(model, dtype=dtype, quantization=quantization).budget.weight_bytes


def report(results: dict[str, Any]) -> Table:
    """A row a precision and budget; columns of each device beside each other."""
    devices = results["devices"]
    answered = next(iter(devices.values()))["answers"]
    questions = next(iter(answered[REFERENCE].values()))["questions"]
    table = Table(
        *("precision", "tokens", "weights MB"),
        *(f"{device}\n{column}" for device in devices for column in COLUMNS),
        title=f"{results['model']}: {results['pictures']} pictures, {questions} questions",
        caption=listed(results["machine"]),
        box=SIMPLE_HEAD,
    )
    for precision, own in answered.items():
        for budget in own:
            weights = f"{results['weight_bytes'][precision] / 1e6:.0f}"
            cells = [cell for each in devices.values() for cell in _cells(each, precision, budget)]
            table.add_row(precision, budget, weights, *cells)
    return table


COLUMNS = (
    "accuracy % (95 %)",
    "unchanged % (95 %)",
    "peak MB (over model)",
    "prefill, times faster than fp32 with all",
)


def _cells(measured: dict[str, Any], precision: str, budget: str) -> list[str]:
    one, memory = measured["answers"][precision][budget], measured["memory"][precision]
    shares = [
        f"{100 * one[name]['share']:.1f} ({100 * one[name]['low']:.1f} to {100 * one[name]['high']:.1f})"
        for name in ("accuracy", "unchanged")
    ]
    peak, faster = memory["peak_bytes"][budget], one["times_faster"]
    over = peak - memory["loaded_bytes"]
    times = f"{faster['median']:.2f} ({faster['q1']:.2f} to {faster['q3']:.2f})"
    return [*shares, f"{peak / 1e6:.0f} ({over / 1e6:.0f})", times]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=DEMO, help="the demo, or another model of its questions")
    parser.add_argument("--pictures", type=at_least(2 + WARM_UP_CUDA), default=20, help="held-out scenes")
    parser.add_argument("--questions", type=at_least(1), default=10, help="about each of them, at most")
    told = "visual tokens; all among them"
    parser.add_argument("--budgets", type=several(kept_tokens), default=("all", "128", "64", "32"), help=told)
    parser.add_argument("--devices", type=several(one_of(DEVICES)), default=DEVICES)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--memory-of", choices=PRECISIONS, help=argparse.SUPPRESS)  # how it calls itself
    arguments = parser.parse_args()
    if EVERYTHING not in arguments.budgets:
        parser.error("times are told against all tokens")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    devices, budgets = arguments.devices, arguments.budgets
    if arguments.memory_of:
        subject = scenes(arguments)[0]
        print(json.dumps(peak_memory(arguments.model, arguments.memory_of, devices[0], budgets, subject)))
        return
    results = run(arguments, devices, budgets)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # a line cut short says nothing
    console.print(report(results))


if __name__ == "__main__":
    main()
