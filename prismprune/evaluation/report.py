"""The sums of a comparison: by method and budget, as a table, as CSV and as a plot."""

from __future__ import annotations

import csv
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from prismprune.errors import InvalidOptionError
from prismprune.evaluation.measures import paired_difference, wilson

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from prismprune.evaluation.subjects import Question

Setting = tuple[str, int | None]
"""(method, tokens kept of a picture or clip). None keeps all; the method is then "none"."""
UNPRUNED: Setting = ("none", None)
REFERENCE = "prism"
"""The method that the others are compared with at the same budget."""


def check_plots(path: Path) -> None:
    """Raise `InvalidOptionError` where matplotlib is not installed, or cannot write that file's format."""
    if find_spec("matplotlib") is None:
        raise InvalidOptionError("A plot needs matplotlib, the extra `plots`: pip install -e '.[plots]'.")
    from matplotlib.backend_bases import FigureCanvasBase  # noqa: PLC0415 (an extra)

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise InvalidOptionError(f"Cannot draw {path.name}: a plot is one of {', '.join(sorted(formats))}.")


@dataclass(frozen=True, slots=True)
class Kept:
    """How the tokens that one setting keeps of one picture lie among the others; see `evaluation.measures`.

    select_ms: scoring and selection, milliseconds.
    """

    tokens: int
    overlap: float
    coverage: float
    select_ms: float


@dataclass(slots=True)
class Tally:
    """Right answers of one setting by kind of question, and what it kept of each picture."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    kept: list[Kept] = field(default_factory=list)
    by_picture: list[tuple[int, int]] = field(default_factory=list)
    """Right answers and questions of each."""

    def add(self, questions: Sequence[Question], marks: Sequence[bool], kept: Kept) -> None:
        """One more picture."""
        for question, right in zip(questions, marks, strict=True):
            self.asked[question.kind] += 1
            self.right[question.kind] += right
        self.kept.append(kept)
        self.by_picture.append((sum(marks), len(marks)))

    @property
    def questions(self) -> int:
        return self.asked.total()

    @property
    def accuracy(self) -> float:
        return self.right.total() / self.questions if self.questions else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Wilson's score."""
        return wilson(self.right.total(), self.questions)

    @property
    def margin(self) -> float:
        """Half of the interval."""
        low, high = self.interval
        return (high - low) / 2

    @property
    def overlap(self) -> float:
        """Mean over pictures of the share of kept tokens that `prism` keeps too."""
        return statistics.fmean(one.overlap for one in self.kept) if self.kept else 0.0

    @property
    def coverage(self) -> float:
        """Mean over pictures of how near, in cosine, a dropped patch is to a kept one."""
        return statistics.fmean(one.coverage for one in self.kept) if self.kept else 0.0

    @property
    def select_ms(self) -> float:
        """Median over pictures."""
        return statistics.median(one.select_ms for one in self.kept) if self.kept else 0.0


@dataclass(slots=True)
class Report:
    """Tallies by setting."""

    suite: str
    pictures: int = 0
    tallies: dict[Setting, Tally] = field(default_factory=lambda: defaultdict(Tally))
    _answers: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def ask(self, questions: Iterable[Question]) -> None:
        """Count one more picture and what is asked about it."""
        self.pictures += 1
        self._answers.update((question.kind, question.text, question.answer) for question in questions)

    @property
    def majority(self) -> float:
        """Accuracy of the majority class of each kind; of each wording, where all are of one kind."""
        by_wording = len({kind for kind, _, _ in self._answers}) == 1
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for (kind, text, answer), count in self._answers.items():
            answers[text if by_wording else kind][answer] += count
        commonest = sum(counter.most_common(1)[0][1] for counter in answers.values())
        return commonest / self._answers.total() if answers else 0.0

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for kind, _, _ in self._answers})

    def relative(self, tally: Tally) -> float | None:
        """Accuracy as a share of the unpruned model's; None where that was not asked or is never right."""
        whole = self.tallies[UNPRUNED].accuracy if UNPRUNED in self.tallies else 0.0
        return tally.accuracy / whole if whole else None

    def difference(self, setting: Setting) -> tuple[float, float, float] | None:
        """Accuracy beyond that of `prism` at the same budget, and its 95 % interval, by pairs of pictures.

        None for `prism` itself, and where it was not asked.
        """
        method, budget = setting
        if budget is None or method == REFERENCE or (REFERENCE, budget) not in self.tallies:
            return None
        right, asked = zip(*self.tallies[setting].by_picture, strict=True)
        reference, _ = zip(*self.tallies[REFERENCE, budget].by_picture, strict=True)
        return paired_difference(right, reference, asked)

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a setting, as in the CSV file; shares are 0 to 1, by kind under "accuracy: kind"."""
        return [self._row(setting, tally) for setting, tally in self.tallies.items()]

    def _row(self, setting: Setting, tally: Tally) -> dict[str, Any]:
        low, high = tally.interval
        difference, worst, best = self.difference(setting) or (None, None, None)
        row: dict[str, Any] = {
            "method": setting[0],
            "budget": "all" if setting[1] is None else setting[1],
            "pictures": len(tally.kept),
            "questions": tally.questions,
            "right": tally.right.total(),
            "accuracy": tally.accuracy,
            "low": low,
            "high": high,
            "relative": self.relative(tally),
            "difference": difference,
            "difference_low": worst,
            "difference_high": best,
            "overlap": tally.overlap,
            "coverage": tally.coverage,
            "select_ms": tally.select_ms,
        }
        named = [kind for kind in self.kinds if kind and tally.asked[kind]]
        return row | {f"accuracy: {kind}": tally.right[kind] / tally.asked[kind] for kind in named}

    def show(self) -> None:
        """Print `table` at its full width: a line cut short says nothing."""
        console = Console(highlight=False)
        console.width = max(console.width, 120)
        console.print(self.table())

    def table(self) -> Table:
        """What a terminal shows; shares in percent."""
        asked = self._answers.total()
        table = Table(
            *("method", "tokens", "accuracy", "95 %", "of all", "to prism", "overlap", "coverage", "select"),
            title=f"{self.suite}: {self.pictures} pictures, {asked} questions",
            caption=f"majority-class baseline: {self.majority:.1%}; to prism: difference in points, and "
            "its 95 %, by pairs of pictures; overlap with prism; select in ms",
            box=SIMPLE_HEAD,
        )
        for row in self.rows():
            relative = "" if row["relative"] is None else f"{100 * row['relative']:.1f}"
            table.add_row(
                *(row["method"], str(row["budget"]), f"{100 * row['accuracy']:.1f}"),
                *(f"{100 * row['low']:.1f} to {100 * row['high']:.1f}", relative, _points(row)),
                *(f"{100 * row['overlap']:.0f}", f"{row['coverage']:.3f}", f"{row['select_ms']:.1f}"),
            )
        return table

    def write_csv(self, path: Path) -> None:
        """Write `rows`, with a header."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)

    def write_plot(self, path: Path) -> None:
        """Draw accuracy over kept tokens, a line a method; the format is that of the path's ending.

        Raises `InvalidOptionError` where matplotlib is not installed or cannot write that format.
        """
        check_plots(path)
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="visual tokens kept", ylabel="accuracy %", title=self.suite)
        methods = list(dict.fromkeys(method for method, budget in self.tallies if budget is not None))
        for place, method in enumerate(methods):
            beside = 2 ** (0.04 * (place - (len(methods) - 1) / 2))  # so that no interval hides another
            axes.errorbar(**self._line(method, beside), fmt="o:", markersize=4, capsize=2, label=method)
        if UNPRUNED in self.tallies:
            accuracy = 100 * self.tallies[UNPRUNED].accuracy
            axes.axhline(accuracy, color="black", linestyle="--", linewidth=1, label="all tokens")
        budgets = sorted({budget for _, budget in self.tallies if budget is not None})
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.legend(fontsize="small", ncols=2)
        figure.savefig(path, dpi=150)

    def _line(self, method: str, beside: float) -> dict[str, Any]:
        budgets = sorted(budget for name, budget in self.tallies if name == method and budget is not None)
        tallies = [self.tallies[method, budget] for budget in budgets]
        below = [100 * (tally.accuracy - tally.interval[0]) for tally in tallies]
        above = [100 * (tally.interval[1] - tally.accuracy) for tally in tallies]
        return {
            "x": [beside * budget for budget in budgets],
            "y": [100 * tally.accuracy for tally in tallies],
            "yerr": [below, above],
        }


def _points(row: dict[str, Any]) -> str:
    """`-1.2 (-3.0 to +0.6)`."""
    if row["difference"] is None:
        return ""
    points = [f"{100 * row[name]:+.1f}" for name in ("difference", "difference_low", "difference_high")]
    return "{} ({} to {})".format(*points)
