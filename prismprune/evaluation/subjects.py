"""What is asked about: pictures or clips with their questions, from a file of JSON lines or a suite."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prismprune.errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from prismprune.media import Clip, Picture


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its one true answer; `kind` groups questions in a report and may be empty.

    line: all fields of the line it was read from; a scorer may want those back that mean nothing here.
    """

    kind: str
    text: str
    answer: str
    line: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Subject:
    """A picture or clip that is opened when needed, and what is asked about it; `name` identifies it."""

    name: str
    questions: tuple[Question, ...]
    opened: Callable[[], Picture | Clip]

    @property
    def media(self) -> Picture | Clip:
        """Drawn or decoded anew at each use."""
        return self.opened()


def read_subjects(path: Path, limit: int | None = None) -> Iterator[Subject]:
    """The pictures (or videos) of a file of JSON lines, in order of first mention; the first `limit` of them.

    A line is {"image": path, "question": text, "answer": text} and optionally "group": text, with whatever
    other fields it has. A relative path is relative to the file's folder. Lines about one picture need not
    stand together.

    Raises `InvalidOptionError` for a line that is none or whose picture is no file, naming it, before any is
    opened.
    """
    asked: dict[str, list[Question]] = defaultdict(list)
    places: dict[str, str] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path.name}, line {number}"
                image, question = _parsed(line, place)
                asked[image].append(question)
                places.setdefault(image, place)
    chosen = list(asked)[:limit]
    for image in chosen:
        if not (path.parent / image).is_file():
            raise InvalidOptionError(f"{places[image]}: there is no file {path.parent / image}.")
    for image in chosen:
        yield Subject(image, tuple(asked[image]), _opener(path.parent / image))


def _parsed(line: bytes, place: str) -> tuple[str, Question]:
    try:
        row: Any = json.loads(line.decode())
    except UnicodeDecodeError:
        raise InvalidOptionError(f"{place} is not UTF-8.") from None
    except ValueError:
        row = None
    try:
        fields = [row["image"], row.get("group", ""), row["question"], row["answer"]]
    except (KeyError, TypeError, AttributeError):
        fields = [None]
    if not all(isinstance(field, str) for field in fields):
        raise InvalidOptionError(
            f'{place}: expected {{"image": path, "question": text, "answer": text}}, "group" if wanted.'
        )
    image, kind, text, answer = fields
    return image, Question(kind, text, answer, row)


def _opener(path: Path) -> Callable[[], Picture | Clip]:
    def opened() -> Picture | Clip:
        from prismprune.media import open_media  # noqa: PLC0415 (loads the decoders)

        return open_media(path)

    return opened
