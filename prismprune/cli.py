"""`prismprune`: ask about pictures and videos, list models, build the demo.

Answers and lists go to standard output, everything else to standard error. Torch is loaded by the commands
that need it, so that help comes at once.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from typer.core import TyperGroup

import prismprune
from prismprune import cli_options
from prismprune.errors import (
    InvalidBudgetError,
    InvalidOptionError,
    PrismError,
    UnknownMethodError,
    UnknownModelError,
    with_cause,
)
from prismprune.evaluation.cli import compare
from prismprune.settings import LibrarySettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prismprune.media import Clip, FrameSampling, Picture
    from prismprune.planning import Plan
    from prismprune.results import Answer

USAGE_ERRORS = (InvalidBudgetError, InvalidOptionError, UnknownMethodError)
"""What another command line would have avoided: exit status 2, as for an unknown option; else 1."""
EXAMPLES = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "video_llava": "LanguageBind/Video-LLaVA-7B-hf",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
}
"""A published checkpoint of each family."""
DEFAULT_BUDGET = "all"


def output() -> Console:
    return Console(highlight=False, soft_wrap=True)


def messages() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


class Commands(TyperGroup):
    """Ends an error that a user can act on in one line, for every command below."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PrismError as error:
            _complain(with_cause(error) if isinstance(error, UnknownModelError) else str(error))
            raise typer.Exit(2 if isinstance(error, USAGE_ERRORS) else 1) from None
        except OSError as error:
            _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
            raise typer.Exit(1) from None


class DemoCommands(TyperGroup):
    """The commands of `prismprune.demo.cli`, imported when one of them is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return self._loaded().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._loaded().get_command(ctx, cmd_name)

    @staticmethod
    def _loaded() -> TyperGroup:
        from prismprune.demo.cli import app as demo  # noqa: PLC0415 -- loads torch

        return typer.main.get_group(demo)


app = typer.Typer(
    cls=Commands,
    help="Fewer visual tokens for vision-language models, chosen by saliency and diversity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(
    typer.Typer(cls=DemoCommands, no_args_is_help=True),
    name="demo",
    help="The embedded demo model: fetch, train, evaluate.",
)
app.command()(compare)


def main() -> None:
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        output().print(prismprune.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def answer(
    media: Annotated[
        list[Path],
        typer.Argument(help="Pictures, or a video.", exists=True, dir_okay=False, readable=True),
    ],
    question: Annotated[str, typer.Argument(help="What to ask about them.")],
    *,
    token_budget: Annotated[
        str | None,
        typer.Option("--token-budget", "-b", help='Visual tokens to keep of all media, or "all".'),
    ] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep.")] = None,
    method: Annotated[str, typer.Option(help="Which tokens stay; see `prismprune models`.")] = "prism",
    model: Annotated[
        str, typer.Option("--model", "-m", help="prism-demo, a directory or a hub id.")
    ] = "prism-demo",
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Draw the same again.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video to look at (default: 8).")] = None,
    start: Annotated[float | None, typer.Option(help="Look from this second of a video.")] = None,
    end: Annotated[float | None, typer.Option(help="Look up to this second of a video.")] = None,
    quantization: cli_options.Quantized = None,
    compute_dtype: cli_options.ComputeDtype = None,
    double_quant: cli_options.DoubleQuant = True,
    quantize_also: cli_options.QuantizeAlso = None,
    layout: cli_options.Layout = None,
    dtype: cli_options.Dtype = "auto",
    device: cli_options.Device = "auto",
    save_map: Annotated[
        Path | None, typer.Option(help="Write a PNG that shows the kept tokens.", dir_okay=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask about pictures or a video, with a budget of visual tokens.

    An animated GIF is a picture unless --num-frames, --start or --end is given.
    """
    sampling = _sampling(num_frames, start, end)
    budget = prismprune.TokenBudget.parse(token_budget, keep_ratio=keep_ratio)
    opened = tuple(prismprune.open_media(path, sampling=sampling) for path in media)
    generation = prismprune.GenerationOptions(max_new_tokens, temperature, top_p, seed)
    prismprune.selector(method)  # an unknown method is told before a model is loaded
    weights = cli_options.quantized(quantization, compute_dtype, double_quant, quantize_also)
    vlm = _load(model, dtype=dtype, device=device, quantization=weights, layout=layout)
    request = prismprune.VisualRequest(opened, (question,), budget, method, generation=generation)
    found = vlm.answer_batch([request])[0][0]
    _show(found, model, as_json=as_json)
    if save_map is not None:
        _save_map(save_map, opened, found)


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """What can be served: the embedded demo, checkpoints in the hub's cache, model families, methods."""
    from prismprune.demo.parts import LANGUAGE, VISION  # noqa: PLC0415 -- help comes at once
    from prismprune.families import FAMILIES  # noqa: PLC0415 -- loads torch
    from prismprune.hub import cached_checkpoints  # noqa: PLC0415 -- loads torch

    cache = LibrarySettings().cache_dir
    parts = [cache / "parts" / part.requirement / Path(part.member).name for part in (VISION, LANGUAGE)]
    listed = {
        "demo": {
            "name": "prism-demo",
            "fetched": all(part.exists() for part in parts),
            "cache": str(cache),
        },
        "cached": [asdict(checkpoint) for checkpoint in cached_checkpoints()],
        "families": [
            {"name": name, "example": EXAMPLES.get(name), "modalities": list(family.modalities)}
            for name, family in FAMILIES.items()
        ],
        "methods": list(prismprune.METHODS),
        "default_token_budget": DEFAULT_BUDGET,
    }
    if as_json:
        sys.stdout.write(json.dumps(listed) + "\n")
    else:
        _print_models(listed)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="prism-demo, a directory (its config.json is enough) or a hub id.")
    ],
    *,
    token_budget: Annotated[
        str, typer.Option("--token-budget", "-b", help='Visual tokens to keep, or "all".')
    ] = "64",  # noqa: S107 -- no password
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float16",
    quantization: cli_options.Quantized = None,
    compute_dtype: cli_options.ComputeDtype = None,
    double_quant: cli_options.DoubleQuant = True,
    quantize_also: cli_options.QuantizeAlso = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of question and answer.")] = 64,
    visual_tokens: Annotated[
        int | None,
        typer.Option(help="Visual tokens before pruning (default: those of one picture or clip)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a model needs at a budget, before anyone loads it: from its config alone."""
    from prismprune import planning  # noqa: PLC0415 -- loads torch

    budget = int(token_budget) if token_budget.isdecimal() else token_budget
    planned = planning.plan(
        model,
        budget,
        dtype=dtype,
        quantization=cli_options.quantized(quantization, compute_dtype, double_quant, quantize_also),
        text_tokens=text_tokens,
        visual_tokens=visual_tokens,
    )
    if as_json:
        sys.stdout.write(json.dumps(asdict(planned)) + "\n")
    else:
        output().print(_planned(planned))


def _planned(planned: Plan) -> Table:
    weights = planned.quantization or planned.dtype
    table = Table(title=f"{planned.model}: {planned.parameters / 1e9:.2f} G parameters, {weights}")
    for column in (
        "",
        f"{planned.budget.visual_tokens} tokens",
        f"all {planned.everything.visual_tokens}",
        "saved",
    ):
        table.add_column(column, justify="right" if column else "left")
    for name, field in (
        ("weights", "weight_bytes"),
        ("keys and values", "kv_bytes"),
        ("one pass, estimated", "activation_bytes"),
        ("together", "total_bytes"),
    ):
        kept, everything = getattr(planned.budget, field), getattr(planned.everything, field)
        table.add_row(
            name, f"{kept / 2**20:,.0f} MiB", f"{everything / 2**20:,.0f} MiB", f"{1 - kept / everything:.1%}"
        )
    kept, everything = planned.budget.prefill_flops, planned.everything.prefill_flops
    saved = f"{1 - kept / everything:.1%}"
    table.add_row("prefill", f"{kept / 1e9:,.0f} GFLOP", f"{everything / 1e9:,.0f} GFLOP", saved)
    return table


def _sampling(num_frames: int | None, start: float | None, end: float | None) -> FrameSampling | None:
    given = {"num_frames": num_frames, "start_s": start, "end_s": end}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return prismprune.FrameSampling(**chosen) if chosen else None


def _load(model: str, **options: Any) -> prismprune.PrunedVLM:
    with _progress(f"loading {model}") as report:
        return prismprune.PrunedVLM.from_pretrained(model, progress=report, **options)


@contextmanager
def _progress(first: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, gone when the work is done; yields what library functions report to."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=messages(), transient=True) as bar:
        task = bar.add_task(first, total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield report


def _show(found: Answer, model: str, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(_as_api(found, model)) + "\n")
        return
    output().print(found.text, markup=False)
    output().print()
    output().print(_costs(found))
    for warning in found.warnings:
        messages().print(f"warning: {warning}", style="yellow", markup=False)


def _as_api(found: Answer, model: str) -> dict[str, Any]:
    """The field names of the HTTP service's `POST /v1/answer`."""
    whole = asdict(found)
    completion = len(found.token_ids)
    return {
        "model": model,
        "answer": found.text,
        "finish_reason": found.finish_reason,
        "usage": {
            "prompt_tokens": found.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": found.prompt_tokens + completion,
        },
    } | {name: whole[name] for name in ("visual_tokens", "timings", "memory", "warnings", "token_map")}


def _costs(found: Answer) -> Table:
    tokens, times, memory = found.visual_tokens, found.timings, found.memory
    kinds = f" ({tokens.salient} salient, {tokens.diverse} diverse)" if tokens.salient is not None else ""
    stages = ("decode", "preprocess", "vision", "select", "prefill", "generate", "total")
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_row("visual tokens", f"{tokens.kept} of {tokens.original} kept{kinds}, method {tokens.method}")
    table.add_row(
        "time", ", ".join(f"{stage} {getattr(times, stage + '_ms'):.1f}" for stage in stages) + " ms"
    )
    table.add_row("first token", f"{times.time_to_first_token_ms:.1f} ms")
    peak, cache = memory.peak_bytes / 1e6, memory.kv_cache_bytes / 1e6
    table.add_row("memory", f"{peak:.0f} MB at most on {memory.device}, {cache:.1f} MB of it key-value cache")
    return table


def _save_map(path: Path, media: Sequence[Picture | Clip], found: Answer) -> None:
    from prismprune.visualization import draw_sheet  # noqa: PLC0415 -- help comes at once

    draw_sheet(media, found.token_map).save(path, "PNG")
    messages().print(f"kept tokens drawn in {path}", markup=False)


def _print_models(listed: dict[str, Any]) -> None:
    demo = listed["demo"]
    state = "fetched" if demo["fetched"] else "not fetched yet: `prismprune demo fetch`"
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    table.add_row("demo", f"{demo['name']}, {state} ({demo['cache']})")
    for one in listed["cached"]:
        weights = f"{one['size_bytes'] / 2**30:.1f} GiB" if one["complete"] else "weights not fetched"
        table.add_row("cached", f"{one['name']} ({one['family']}), {weights}, {one['revision'][:12]}")
    for family in listed["families"]:
        example = f", for example {family['example']}" if family["example"] else ""
        table.add_row("family", f"{family['name']} ({', '.join(family['modalities'])}){example}")
    table.add_row("methods", ", ".join(listed["methods"]))
    table.add_row("default budget", listed["default_token_budget"])
    output().print(table)


def _complain(message: str) -> None:
    messages().print(f"error: {' '.join(message.split())}", style="red", markup=False)
