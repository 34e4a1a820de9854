"""What the rounds measured, as a table, JSON and a plot."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks._measure import MIB, P99_OF, markdown, percentile, tail_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.serving.asking import Round

BASELINES = ("vllm", "transformers serve", "litserve")
"""Ratios are to the first of these that took part."""
WAYS = {"closed": "clients", "burst": "at once", "open": "requests/s arriving"}


@dataclass(frozen=True)
class Load:
    """How servers are asked.

    `way` closed: by `level` clients, each of which asks again once it has its answer. burst: by `level`
    clients that hardly do. open: `level` requests a second arrive.
    """

    way: str
    level: float

    def __str__(self) -> str:
        return f"{self.level:g} {WAYS[self.way]}"


@dataclass(frozen=True)
class Row:
    """One side under one load. Of each round its rate and medians; here their medians, least and most.

    p99_s: of all answers of all rounds; of fewer than a hundred that is the most. per_token_s: None where
    answers come whole. memory_bytes: the peak. cpu_s: processor time an answer. rate_ratio, p50_ratio: over
    the baseline's, median of the rounds.
    """

    name: str
    way: str
    level: float
    answers: int
    per_s: float
    least_per_s: float
    most_per_s: float
    p50_s: float
    least_p50_s: float
    most_p50_s: float
    p99_s: float
    first_s: float
    per_token_s: float | None
    memory_bytes: int
    cpu_s: float
    rate_ratio: float
    p50_ratio: float


def rows(load: Load, rounds: dict[str, list[Round]]) -> list[Row]:
    """A row a side. Each has as many rounds as the others, taken in turn."""
    baseline = next((name for name in BASELINES if name in rounds), next(iter(rounds)))
    return [_row(load, name, own, rounds[baseline]) for name, own in rounds.items()]


def _row(load: Load, name: str, own: Sequence[Round], baseline: Sequence[Round]) -> Row:
    rates, medians = [one.per_s for one in own], [_p50(one) for one in own]
    answers = [answer for one in own for answer in one.answers]
    between = [median for one in own if (median := _per_token(one)) is not None]
    pairs = list(zip(own, baseline, strict=True))
    return Row(
        name=name,
        way=load.way,
        level=load.level,
        answers=len(answers),
        per_s=statistics.median(rates),
        least_per_s=min(rates),
        most_per_s=max(rates),
        p50_s=statistics.median(medians),
        least_p50_s=min(medians),
        most_p50_s=max(medians),
        p99_s=percentile([answer.total_s for answer in answers], 0.99),
        first_s=statistics.median(statistics.median(answer.first_s for answer in one.answers) for one in own),
        per_token_s=statistics.median(between) if between else None,
        memory_bytes=max(one.usage.peak_bytes for one in own),
        cpu_s=statistics.median(one.usage.cpu_s / len(one.answers) for one in own),
        rate_ratio=statistics.median(one.per_s / other.per_s for one, other in pairs),
        p50_ratio=statistics.median(_p50(one) / _p50(other) for one, other in pairs),
    )


def _p50(one: Round) -> float:
    return statistics.median(answer.total_s for answer in one.answers)


def _per_token(one: Round) -> float | None:
    between = [answer.per_token_s for answer in one.answers if answer.per_token_s is not None]
    return statistics.median(between) if between else None


def table(head: str, measured: Sequence[Row]) -> str:
    """Markdown."""
    baseline = next(name for name in (*BASELINES, measured[0].name) if name in {row.name for row in measured})
    tail = tail_name(max(row.answers for row in measured))
    columns = (
        "load",
        "server",
        "requests/s (spread)",
        f"of {baseline}",
        "p50 (spread)",
        f"of {baseline}",
        tail,
        "first token",
        "per token",
        "processor time",
        "memory",
    )
    lines = []
    for row in measured:
        per_token = "" if row.per_token_s is None else f"{1e3 * row.per_token_s:.0f} ms"
        cells = (
            str(Load(row.way, row.level)),
            row.name,
            f"{row.per_s:.2f} ({row.least_per_s:.2f} to {row.most_per_s:.2f})",
            f"{row.rate_ratio:.2f}",
            f"{row.p50_s:.2f} s ({row.least_p50_s:.2f} to {row.most_p50_s:.2f})",
            f"{row.p50_ratio:.2f}",
            f"{row.p99_s:.2f} s" + " (most)" * (tail == "p99" and row.answers < P99_OF),
            f"{row.first_s:.2f} s",
            per_token,
            f"{row.cpu_s:.2f} s",
            f"{row.memory_bytes / MIB:.0f} MiB",
        )
        lines.append(cells)
    return f"{head}\n\n{markdown(columns, lines)}"


def plot(measured: Sequence[Row], file: Path) -> None:
    """Rate and latency over the load, a line a side; closed and open loops in rows of their own."""
    from matplotlib.figure import Figure  # noqa: PLC0415 -- an extra

    ways = [way for way in WAYS if any(row.way == way for row in measured)]
    figure = Figure(figsize=(10, 4 * len(ways)), layout="constrained")
    for row, way in zip(figure.subplots(len(ways), 2, squeeze=False), ways, strict=True):
        for axes, (title, value) in zip(row, PANELS.items(), strict=True):
            for name in dict.fromkeys(each.name for each in measured):
                own = [each for each in measured if each.name == name and each.way == way]
                axes.plot([each.level for each in own], [value(each) for each in own], marker="o", label=name)
            axes.set(title=title, xlabel=WAYS[way], ylim=(0, None), xscale="log")
            axes.set_xticks(levels := sorted({each.level for each in measured if each.way == way}))
            axes.set_xticklabels([f"{level:g}" for level in levels])
            axes.minorticks_off()
    figure.axes[-1].legend(loc="upper left")  # times rise to the right: there is room
    figure.savefig(file)


PANELS: dict[str, Callable[[Row], float]] = {
    "requests a second": lambda row: row.per_s,
    "median seconds to the answer": lambda row: row.p50_s,
}
