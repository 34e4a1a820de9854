"""`prismprune demo ...`: fetch, draw, train, evaluate the embedded demo model."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path  # noqa: TC003 (typer reads annotations)
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from prismprune.demo import checkpoint
from prismprune.demo.clips import draw_clip
from prismprune.demo.parts import EASY_VQA, fetch
from prismprune.demo.questions import HELD_OUT, clip_questions, scene_questions
from prismprune.demo.scenes import draw_scene
from prismprune.errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prismprune.demo.train import Recipe
    from prismprune.evaluation.report import Report, Setting

app = typer.Typer(no_args_is_help=True)


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


@app.command("fetch")
def fetch_command() -> None:
    """Fetch the pretrained parts and assemble the demo model; nothing is done twice."""
    with _progress() as progress:
        task = progress.add_task("prism-demo")
        folder = checkpoint(
            lambda what, done, steps: progress.update(task, description=what, completed=done, total=steps)
        )
        progress.update(task, description="fetching easy-VQA")
        fetch(EASY_VQA)
    Console(highlight=False, soft_wrap=True).print(f"prism-demo is ready in {folder}")


@app.command()
def draw(
    target: Annotated[Path, typer.Argument(help="A .png for a scene, a .gif for a clip.")],
    seed: Annotated[int, typer.Option(help="Another seed, another picture.")] = 0,
    objects: Annotated[
        int | None, typer.Option(min=1, max=6, help="How many objects (default: one to six).")
    ] = None,
) -> None:
    """Draw a scene or clip of the demo's world and print questions about it with their true answers."""
    ending = target.suffix.lower()
    if Image.registered_extensions().get(ending) not in Image.SAVE:
        raise InvalidOptionError(f"Cannot draw {target.name}: a .png is a scene, a .gif a clip.")
    rng = random.Random(seed)
    if ending == ".gif":
        clip = draw_clip(rng)
        clip.frames[0].save(target, save_all=True, append_images=clip.frames[1:], duration=250, loop=0)
        questions = clip_questions(rng, clip, 8, HELD_OUT)
    else:
        scene = draw_scene(rng, objects)
        scene.image.save(target)
        questions = scene_questions(rng, scene, 12, HELD_OUT)
    table = Table("question", "answer")
    for question in questions:
        table.add_row(question.text, question.answer)
    Console().print(table)


@app.command()
def train(
    folder: Annotated[Path, typer.Argument(help="Where the weights and the state to resume from go.")],
    *,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps in all (default: the recipe's).")
    ] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option("--recipe", help="JSON with fields of the recipe, as in a run's recipe.json."),
    ] = None,
    begin_from: Annotated[
        Path | None, typer.Option(help="Begin from trained weights, such as prismprune/demo/weights.")
    ] = None,
    ship: Annotated[
        Path | None, typer.Option(help="Write the weights in 16 bits to this folder as well.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw scenes.")] = 1,
) -> None:
    """Train projector and adapter from the recipe's seed, or go on where FOLDER left off."""
    from prismprune.demo import train as training  # noqa: PLC0415 (needs peft)

    recipe = _recipe(recipe_file) if recipe_file else training.Recipe()
    recipe = recipe if steps is None else dataclasses.replace(recipe, steps=steps)
    console = Console(highlight=False)
    with _progress() as progress:
        task = progress.add_task("training", total=recipe.steps)
        for record in training.train(folder, recipe, begin_from=begin_from, workers=workers):
            progress.update(task, completed=record["step"])
            console.print(json.dumps(record))
    if ship:
        training.ship(folder, ship)


def _recipe(file: Path) -> Recipe:
    """The recipe with the fields that `file` holds. Raises `InvalidOptionError` for anything else in it."""
    from prismprune.demo.train import Recipe  # noqa: PLC0415 (needs peft)

    try:
        fields = json.loads(file.read_bytes())
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise InvalidOptionError(f"{file} is no JSON object with fields of the recipe.")
    known = dataclasses.asdict(Recipe())
    if unknown := sorted(fields.keys() - known.keys()):
        raise InvalidOptionError(f"{file}: the recipe has no {unknown[0]}, but {', '.join(known)}.")
    for name, value in fields.items():
        kind = type(known[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise InvalidOptionError(f"{file}: {name} is of type {kind.__name__}, not {value!r}.")
    return Recipe(**fields)


@app.command("evaluate")
def evaluate_command(
    pictures: Annotated[int, typer.Option(min=0, help="Own scenes, ten questions each.")] = 200,
    clips: Annotated[int, typer.Option(min=0, help="Clips of eight frames.")] = 40,
    easy_vqa: Annotated[
        int, typer.Option(min=0, help="Pictures of easy-VQA's test set (1,000 in all).")
    ] = 200,
    model: Annotated[
        Path | None, typer.Option(help="A directory of a demo checkpoint (default: the demo's own).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a suite.")] = False,
) -> None:
    """Print accuracy by method and budget, on scenes, phrasings and pictures that the model never saw."""
    from prismprune.demo import evaluate as suites  # noqa: PLC0415 (loads torch)
    from prismprune.vlm import PrunedVLM  # noqa: PLC0415 (loads torch)

    vlm = PrunedVLM.from_pretrained(model or "prism-demo")
    console = Console(highlight=False)
    numbers = {suites.SCENES: pictures, suites.EASY_VQA_TEST: easy_vqa, suites.CLIPS: clips}
    for suite, number in numbers.items():
        if not number:
            continue
        report = _last(suites.evaluate(vlm, suite, number), suite, number)
        console.print_json(json.dumps(_as_json(report))) if as_json else console.print(*_tables(report))


def _last(reports: Iterable[Report], suite: str, number: int) -> Report:
    from prismprune.evaluation.report import Report  # noqa: PLC0415 (loads torch)

    report = Report(suite)
    with _progress() as progress:
        for report in progress.track(reports, total=number, description=suite):  # noqa: B007 (the last one is wanted)
            pass
    return report


def _label(setting: Setting) -> str:
    method, budget = setting
    return "all tokens" if budget is None else f"{method} {budget}"


def _tables(report: Report) -> list[Table]:
    unpruned = report.tallies[("none", None)]
    kinds = sorted(unpruned.asked)
    title = f"{report.suite}: {report.pictures} subjects, {unpruned.questions} questions"
    caption = f"majority-class baseline of each kind: {report.majority:.1%}"
    table = Table("setting", "accuracy %", "± (95 %)", "of unpruned %", *kinds, title=title, caption=caption)
    for setting, tally in report.tallies.items():
        by_kind = [f"{100 * tally.right[kind] / tally.asked[kind]:.0f}" for kind in kinds]
        share = report.relative(tally)
        relative = "" if share is None else f"{100 * share:.1f}"
        row = f"{100 * tally.accuracy:.1f}", f"{100 * tally.margin:.1f}", relative
        table.add_row(_label(setting), *row, *by_kind)
    return [table]


def _as_json(report: Report) -> dict[str, object]:
    settings = {
        _label(setting): {
            "accuracy": round(tally.accuracy, 4),
            "margin": round(tally.margin, 4),
            "by_kind": {
                kind: round(tally.right[kind] / tally.asked[kind], 4) for kind in sorted(tally.asked)
            },
        }
        for setting, tally in report.tallies.items()
    }
    questions = report.tallies[("none", None)].questions
    head = {"suite": report.suite, "subjects": report.pictures, "questions": questions}
    return {**head, "majority": round(report.majority, 4), "settings": settings}
