"""`prismprune compare`: methods x budgets on a set of questions. Torch is loaded once it runs."""

from __future__ import annotations

import json
import sys
from itertools import chain, combinations, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prismprune import cli_options

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prismprune.evaluation.compare import Marker
    from prismprune.evaluation.report import Report, Setting
    from prismprune.evaluation.subjects import Subject
    from prismprune.vlm import PrunedVLM

DEFAULT_BUDGETS = (128, 64, 32)

Results = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="JSON lines of finished pictures: a later run goes on from them."),
]
Answers = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="Write what was said: a JSON line a question, method and budget."),
]
Csv = Annotated[Path | None, typer.Option(dir_okay=False, help="Write the table as CSV.")]
Plot = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Draw accuracy over budget (.png, .svg, .pdf).")
]


def compare(
    questions: Annotated[
        str,
        typer.Argument(
            help='A file of lines {"image": path, "question": text, "answer": text}, "group" if wanted; '
            "or a suite of the demo's: scenes, easy-vqa, clips."
        ),
    ],
    *,
    model: Annotated[str, typer.Option(help="prism-demo, a directory or a hub id.")] = "prism-demo",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Repeat for several; with options: prism:pool_factor=2 (default: every method)."),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Visual tokens of a picture or clip; repeat for several "
            f"(default: {', '.join(map(str, DEFAULT_BUDGETS))}).",
        ),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="The first so many pictures or clips.")] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a model.")] = 16,
    dtype: cli_options.Dtype = "auto",
    device: cli_options.Device = "auto",
    layout: cli_options.Layout = None,
    quantization: cli_options.Quantized = None,
    compute_dtype: cli_options.ComputeDtype = None,
    double_quant: cli_options.DoubleQuant = True,
    quantize_also: cli_options.QuantizeAlso = None,
    results: Results = None,
    answers: Answers = None,
    csv: Csv = None,
    plot: Plot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare methods at equal budgets on one model: accuracy, overlap with prism, coverage, selection time.

    The unpruned model in the same layout is always among them.
    """
    from prismprune.evaluation.compare import compare as compared  # noqa: PLC0415 -- loads torch
    from prismprune.vlm import PrunedVLM  # noqa: PLC0415 -- loads torch

    settings = _settings(method, budget or DEFAULT_BUDGETS)
    _check_files(questions, plot, results, answers, csv)
    weights = cli_options.quantized(quantization, compute_dtype, double_quant, quantize_also)
    subjects = _subjects(questions, pictures)
    vlm = PrunedVLM.from_pretrained(model, dtype=dtype, device=device, quantization=weights, layout=layout)
    marker = _marker(vlm, max_new_tokens, said=answers is not None)
    suite = Path(questions).stem
    reports = compared(vlm, suite, subjects, settings, marker=marker, results=results, answers=answers)
    report = _watched(reports, pictures)
    _print(report, as_json=as_json)
    if csv:
        report.write_csv(csv)
    if plot:
        report.write_plot(plot)


def _settings(method: Sequence[str] | None, budgets: Sequence[int]) -> list[Setting]:
    """Unpruned first, then each method at each budget; a wrong method is told before a model is loaded."""
    from prismprune.evaluation.compare import parsed_method  # noqa: PLC0415 -- loads torch
    from prismprune.selection import METHODS  # noqa: PLC0415 -- loads torch

    methods = method or list(METHODS)
    for one in methods:
        parsed_method(one)
    settings = [(one, tokens) for one in methods for tokens in budgets]
    return list(dict.fromkeys([("none", None), *settings]))


def _check_files(questions: str, plot: Path | None, results: Path | None, *others: Path | None) -> None:
    """What cannot be written, or would be lost, is told before anything is computed."""
    from prismprune.demo.evaluate import SETTINGS  # noqa: PLC0415 -- loads torch
    from prismprune.errors import InvalidOptionError  # noqa: PLC0415 -- beside the others
    from prismprune.evaluation.compare import read_results  # noqa: PLC0415 -- loads torch
    from prismprune.evaluation.report import check_plots  # noqa: PLC0415 -- beside the others

    if plot:
        check_plots(plot)
    files = [file for file in (plot, results, *others) if file]
    asked = [] if questions in SETTINGS else [Path(questions)]
    if any(starmap(_same, combinations([*asked, *files], 2))):
        raise InvalidOptionError("Questions, results, answers, table and plot each need a file of their own.")
    if results and results.exists():
        read_results(results)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file, by whatever name or link."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def _subjects(questions: str, pictures: int) -> Iterator[Subject]:
    from prismprune.demo.evaluate import SETTINGS, subjects  # noqa: PLC0415 -- loads torch
    from prismprune.errors import InvalidOptionError  # noqa: PLC0415 -- beside the others
    from prismprune.evaluation.subjects import read_subjects  # noqa: PLC0415 -- beside the others

    suite = questions in SETTINGS
    found = subjects(questions, pictures) if suite else read_subjects(Path(questions), pictures)
    first = next(found, None)  # a wrong file is told before a model is loaded, too
    if first is None:
        raise InvalidOptionError(f"{questions} holds no questions.")
    return chain([first], found)


def _marker(vlm: PrunedVLM, max_new_tokens: int, *, said: bool) -> Marker:
    """The demo's questions are packed, a picture in one pass, unless what is `said` is wanted."""
    from prismprune.demo.evaluate import is_demo, packed  # noqa: PLC0415 -- loads torch
    from prismprune.evaluation.compare import generated  # noqa: PLC0415 -- loads torch

    return packed(vlm) if is_demo(vlm) and not said else generated(vlm, max_new_tokens)


def _watched(reports: Iterable[Report], total: int) -> Report:
    """The last of the growing reports, with a bar on standard error meanwhile."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        *_, last = progress.track(reports, total=total, description="comparing")
    return last


def _print(report: Report, *, as_json: bool) -> None:
    if not as_json:
        report.show()
        return
    whole: dict[str, Any] = {
        "suite": report.suite,
        "pictures": report.pictures,
        "majority": report.majority,
        "settings": report.rows(),
    }
    sys.stdout.write(json.dumps(whole) + "\n")
