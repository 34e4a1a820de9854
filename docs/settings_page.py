"""`python -m docs.settings_page`: writes settings.md from the settings classes, which are the only source."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from prismprune.settings import LibrarySettings
from service.serve.settings import ServeSettings
from service.settings import ServiceSettings
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic.fields import FieldInfo
    from pydantic_settings import BaseSettings

PAGE = Path(__file__).parent / "settings.md"
HEAD = """\
# Settings

Written by `python -m docs.settings_page` from the settings classes. Each process reads its own at start,
from the environment; an empty variable is as good as none. Where two processes know a name, each may be told
another value. Seconds end in `_S`, sizes in `_BYTES`.
"""
PARTS: tuple[tuple[str, str, type[BaseSettings]], ...] = (
    ("Front end", "`python -m service`", ServiceSettings),
    ("Worker", "`python -m worker`; the library's settings hold for it too", WorkerSettings),
    ("Library", "`prismprune`, on the command line and in the worker", LibrarySettings),
    ("`make serve`", "hands the others on to the front end and the worker that it starts", ServeSettings),
)
OWN = ("prismprune", "service", "worker")
_NAMES = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text", Path: "path"}
_BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(*part) for part in PARTS)])


def _section(title: str, text: str, settings: type[BaseSettings]) -> str:
    meanings = _meanings(settings)
    rows = [
        f"| `PRISM_{name.upper()}` | {_default(field)} | {_values(field)} | {meanings.get(name, '')} |"
        for name, field in settings.model_fields.items()
    ]
    head = (f"## {title}", "", f"{text}.", "", "| variable | default | values | |", "|---|---|---|---|")
    return "\n".join([*head, *rows, ""])


def _meanings(settings: type[BaseSettings]) -> dict[str, str]:
    """Each field's docstring: the string that follows it, where the class or one above it declares it."""
    found: dict[str, str] = {}
    for each in reversed([each for each in settings.__mro__ if each.__module__.split(".")[0] in OWN]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in pairwise(statements):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(field.target, ast.Name)
            ):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split()).replace(
                    "|", "\\|"
                )
    return found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if field.default_factory is not None:
        return "per user"
    if field.default is None or field.default == ():
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _values(field: FieldInfo) -> str:
    """The type in words, and the bounds."""
    return " ".join([_words(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: Iterable[Any]) -> list[str]:
    """The bounds of `annotated_types`, which pydantic's `Field` may hold one level down."""
    constraints = [bound for each in metadata for bound in getattr(each, "metadata", (each,))]
    return [
        text.format(getattr(each, key))
        for each in constraints
        for key, text in _BOUNDS.items()
        if hasattr(each, key)
    ]


def _words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in inner)
    if origin is tuple:
        return "list, by commas"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(each) for each in inner if each is not type(None))
    if origin is typing.Annotated:
        return " ".join([_words(inner[0]), *_bounds(inner[1:])])
    return _NAMES[annotation]


if __name__ == "__main__":
    PAGE.write_text(page())
