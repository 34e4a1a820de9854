"""What the benchmarks share: options and outputs, turns, medians, the machine's name, memory."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from torch import nn

K = TypeVar("K")
N = TypeVar("N", int, float)
T = TypeVar("T")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What passes, and what this process computes: the latter where other work shares the cores."""
MIB = 2**20
OUTPUTS = {"json": "file for the results", "plot": "file for the plot, such as plot.png"}
"""Options that name a file."""
ALL = "all"
"""The budget that keeps every token."""
P99_OF = 100
"""Values of which the 99th percentile is not just the greatest."""
PROC = Path("/proc")
FORGET_PEAK = "5"
"""What the kernel reads in a process's `clear_refs` as to begin anew with its peak: see proc(5)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of what was measured several times."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of at least one value."""
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(*ordered * 3)
        q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, q1, q3)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.q1:.3g} to {self.q3:.3g})"


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that `share` (0 to 1) of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def tail_name(count: int) -> str:
    """What to call `percentile(values, 0.99)` of so many values: of few it is the greatest of them."""
    return "p99" if count >= P99_OF else "most"


def in_turns(sides: Mapping[K, Callable[[int], T]], rounds: int, *, warm_up: int = 1) -> dict[K, list[T]]:
    """What each side gives in each of the `rounds`, behind `warm_up` of first times, which are dropped.

    Sides are called with the number of the round, from 0 on. The order moves on from round to round, so that
    whatever slows the machine down meets all of them.
    """
    names = list(sides)
    measured: dict[K, list[T]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            result = sides[name](number)
            if number >= warm_up:
                measured[name].append(result)
    return measured


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Of each round's value to the same round's base."""
    return Spread.of(own / other for own, other in zip(values, base, strict=True))


def processor() -> str:
    """The CPU's model and how many of its cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def software() -> dict[str, str]:
    """The versions that do the arithmetic."""
    return {name: version(name) for name in ("torch", "transformers")}


def machine(*, on_cuda: bool) -> dict[str, str | int]:
    """What a program of torch's was measured on."""
    name = torch.cuda.get_device_name() if on_cuda else processor()
    return {"processor": name, "threads": torch.get_num_threads(), **software()}


def listed(facts: Mapping[str, object]) -> str:
    """Names and values on one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def touch(model: nn.Module) -> None:
    """Make the weights resident: they are mapped from a file, and read once somebody looks."""
    for parameter in model.parameters():
        parameter.data.any()


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far (of resident memory on Linux alone: see proc(5), clear_refs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_resident_peak()


def peak_bytes(device: torch.device) -> int:
    """The most that was allocated on CUDA, or resident elsewhere, since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()[1]


def forget_resident_peak(process: int | str = "self") -> None:
    """From now on the kernel keeps a new peak of that process's resident set."""
    (PROC / str(process) / "clear_refs").write_text(FORGET_PEAK)


def resident_bytes(process: int | str = "self") -> tuple[int, int]:
    """A process's resident set now, and at its peak; of one that ended and is not gone, nothing."""
    lines = (PROC / str(process) / "status").read_text().splitlines()
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    now, peak = (int(sizes.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def apart(module: str, *argv: object) -> Any:
    """What a script prints as JSON in a process of its own, where nothing else takes memory."""
    command = [sys.executable, "-m", module, *map(str, argv)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)  # noqa: S603 (ours)


def options(
    about: str | None, *, rounds: int | None = None, clock: bool = False, threads: str = "torch's"
) -> argparse.ArgumentParser:
    """A parser with the options that the benchmarks share; `about` is the script's own docstring.

    rounds: how many by default, where sides take turns. clock: whether one may choose what is counted, where
    this process alone is measured. threads: whose they are.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=formatter)
    if rounds is not None:
        told = "measured, after what is dropped"
        parser.add_argument("--rounds", type=at_least(1), default=rounds, help=told)
        add_threads(parser, threads)
    if clock:
        told = "cpu: processor time, for a machine that has other work to do"
        parser.add_argument("--clock", choices=CLOCKS, default="wall", help=told)
    for output, told in OUTPUTS.items():
        parser.add_argument(f"--{output}", type=output_file, help=told)
    return parser


def add_threads(parser: argparse.ArgumentParser, whose: str = "torch's") -> None:
    """The option that `torch.set_num_threads` takes."""
    default = torch.get_num_threads()
    parser.add_argument("--threads", type=at_least(1), default=default, help=f"{whose}; default: %(default)s")


def output_file(text: str) -> Path:
    """An argument's type: a file that can be written when all is measured, hours later perhaps."""
    file = Path(text)
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return file


def at_least(least: N) -> Callable[[str], N]:
    """An argument's type: a number of the kind of `least`, and no less."""

    def number(text: str) -> N:
        try:
            value = type(least)(text)
        except ValueError:
            value = None
        if value is None or not least <= value < math.inf:
            kind = "whole number" if isinstance(least, int) else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind} of at least {least}")
        return value

    return number


def kept_tokens(text: str) -> str:
    """An argument's type: how many visual tokens stay, or `ALL`."""
    if text != ALL:
        at_least(1)(text)
    return text


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """An argument's type: one of these."""

    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return name


def several(each: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """An argument's type: values with commas between them, none twice."""

    def values(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(each(part.strip()) for part in text.split(",")))

    return values


def publish(
    asked: argparse.Namespace,
    results: Mapping[str, Any],
    table: str,
    plot: Callable[[Path], None],
    **facts: object,
) -> None:
    """Print the table, below the machine and what was asked; write the files that `options` let one name.

    facts: what was not asked, and is told beside it.
    """
    about = {name: value for name, value in vars(asked).items() if name not in OUTPUTS} | facts
    print(f"{processor()}; {listed(about)}\n\n{table}")
    write_json(asked.json, about | dict(results))
    if asked.plot:
        plot(asked.plot)


def write_json(file: Path | None, results: Mapping[str, Any]) -> None:
    """The results and what they were measured on, if a file was named."""
    if file is not None:
        head = {"processor": processor(), **software()}
        file.write_text(json.dumps(head | dict(results), indent=2) + "\n")


@contextmanager
def plotted(file: Path) -> Iterator[Axes]:
    """Axes to draw on; at the end of the block they get a legend and are saved."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.legend()
    figure.savefig(file)


def draw_lines(axes: Axes, rows: Sequence[Mapping[str, Any]], *, by: str, x: str, y: str) -> None:
    """The medians of `y` over `x`, a line for each value of `by`."""
    for label in dict.fromkeys(row[by] for row in rows):
        own = [row for row in rows if row[by] == label]
        axes.plot([row[x] for row in own], [row[y]["median"] for row in own], marker="o", label=str(label))


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def picture(number: int) -> Image.Image:
    """A scene of five shapes on a plain ground, 640 x 480; another one for each number."""
    ground = 225 - number // 2800 % 200  # after so many the places of the shapes come again
    image = Image.new("RGB", (640, 480), (235, 235, ground))
    draw = ImageDraw.Draw(image)
    for place, color in enumerate(("red", "green", "blue", "orange", "purple")):
        left, top = (place * 120 + number * 37) % 560, (place * 90 + number * 53) % 400
        shape = (draw.ellipse, draw.rectangle)[(place + number) % 2]
        shape((left, top, left + 70, top + 70), fill=color)
    return image
