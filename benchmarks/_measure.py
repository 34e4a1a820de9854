"""What the benchmarks share: turns, medians, the machine's name, memory."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping, Sequence

K = TypeVar("K")
T = TypeVar("T")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What passes, and what this process computes: the latter where other work shares the cores."""
MIB = 2**20


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


def in_turns(sides: Mapping[K, Callable[[int], T]], rounds: int) -> dict[K, list[T]]:
    """What each side gives for the rounds 1 to `rounds`; round 0, of first times, is dropped.

    The order moves on from round to round, so that whatever slows the machine down meets all sides.
    """
    names = list(sides)
    measured: dict[K, list[T]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            result = sides[name](number)
            if number > 0:
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


def reset_peak_resident() -> None:
    """Forget the peak so far (Linux only: see proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """VmHWM, in bytes: the most that was resident since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="file for the plot, such as plot.png")


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Of benchmarks that measure this process alone."""
    told = "cpu: processor time, for a machine that has other work to do"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=told)


def write_json(file: Path | None, results: Mapping[str, Any]) -> None:
    """The results and what they were measured on, if a file was named."""
    if file is not None:
        head = {"processor": processor(), **software()}
        file.write_text(json.dumps(head | dict(results), indent=2) + "\n")


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
