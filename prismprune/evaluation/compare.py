"""Methods x budgets on a set of questions: the tower runs once a picture, and runs resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from prismprune.budget import TokenBudget
from prismprune.encoding import EncodedMedia, EncodingRequest, encode
from prismprune.errors import InvalidOptionError
from prismprune.evaluation.measures import nearest_cosines, overlap
from prismprune.evaluation.report import UNPRUNED, Kept, Report, Setting
from prismprune.evaluation.subjects import Question, Subject
from prismprune.selection import selector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from prismprune.families.base import Family, Pixels, Reading, View, Wanted
    from prismprune.media import Clip, Picture
    from prismprune.vlm import PrunedVLM


@dataclass(frozen=True, slots=True)
class Marks:
    """Which of the questions about one encoded picture are answered rightly.

    said: the answers, None where none were generated.
    """

    right: list[bool]
    said: list[str] | None = None


Marker = Callable[[Sequence[Question], EncodedMedia], Marks]
Reader = Callable[["Family", "Picture | Clip"], "OneReading"]


class OneReading:
    """A family whose tower has read one picture or clip: each way to encode it goes on from there.

    Stands in for the family in `encode`; everything but reading is the family's own.
    """

    def __init__(self, family: Family, media: Picture | Clip) -> None:
        self._family = family
        self.pixels = family.preprocess(family.views([media]))
        self.readings = [family.read(group) for group in self.pixels]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def preprocess(self, _views: Sequence[View]) -> list[Pixels]:
        return self.pixels

    def read(self, pixels: Pixels, wanted: Wanted | None = None) -> Reading:
        del wanted  # of no other method
        return next(one for group, one in zip(self.pixels, self.readings, strict=True) if group is pixels)


def compare(
    vlm: PrunedVLM,
    suite: str,
    subjects: Iterable[Subject],
    settings: Sequence[Setting],
    *,
    marker: Marker | None = None,
    reader: Reader = OneReading,
    results: Path | None = None,
    answers: Path | None = None,
) -> Iterator[Report]:
    """Yield the growing report after each subject; the last one is whole.

    settings: (method, budget) each; a method may carry options, see `parsed_method`.
    marker: None: answers are generated, and count when `same_answer` says so.
    results: a file of JSON lines, a line a subject and setting, written as they are done. What it already
        holds of this model, these questions and settings is taken from there.
    answers: a file of JSON lines to write anew, a line a question and setting: see `answer_lines`. What
        `results` holds without answers is asked again then.

    Raises `InvalidOptionError` or `UnknownMethodError` for a setting, and the former where `results` holds
    anything else, before anything is run.
    """
    for method, _ in settings:
        parsed_method(method)
    marker = marker or generated(vlm)
    journal = Journal(results, identity(vlm))
    report = Report(suite)
    with answers.open("w", encoding="utf-8") if answers else nullcontext() as file:
        for subject in subjects:
            report.ask(subject.questions)
            missing = [one for one in settings if not journal.has(subject, one, said=file is not None)]
            for setting, marks, kept in _examined(vlm, subject, missing, marker, reader) if missing else ():
                journal.write(subject, setting, marks, kept)
            for setting in settings:
                marks, kept = journal.read(subject, setting)
                report.tallies[setting].add(subject.questions, marks.right, kept)
                if file is not None:
                    file.writelines(answer_lines(subject, setting, marks, kept))
            yield report


def answer_lines(subject: Subject, setting: Setting, marks: Marks, kept: Kept) -> Iterator[str]:
    """A JSON line a question: what was asked, with all that its own line held, and what came of it.

    "said" is the answer, "right" whether it counts; "method", "budget" (tokens, or "all"), "kept" (tokens).
    """
    method, budget = setting
    how = {"method": method, "budget": "all" if budget is None else budget, "kept": kept.tokens}
    said: Sequence[str | None] = marks.said or [None] * len(marks.right)
    for question, one, right in zip(subject.questions, said, marks.right, strict=True):
        asked = {"image": subject.name, "question": question.text, "answer": question.answer}
        group = {"group": question.kind} if question.kind else {}
        yield json.dumps(asked | group | dict(question.line) | how | {"said": one, "right": right}) + "\n"


def parsed_method(method: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a method as written: `prism`, `prism:pool_factor=2,fps_start=most_isolated`.

    Values are JSON where they can be read so, text otherwise. Raises `InvalidOptionError` for options without
    a value, and what `selector` raises.
    """
    name, _, written = method.partition(":")
    options: dict[str, Any] = {}
    for option in filter(None, written.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise InvalidOptionError(f"An option of a method is written name=value, not {option!r}.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    if name != UNPRUNED[0]:
        selector(name, **options)
    return name, options


def generated(vlm: PrunedVLM, max_new_tokens: int = 16) -> Marker:
    """Mark what the model says, greedily, to each question."""
    from prismprune.vlm import GenerationOptions  # noqa: PLC0415 (a cycle would close: vlm is the user's object)

    def marker(questions: Sequence[Question], encoded: EncodedMedia) -> Marks:
        options = GenerationOptions(max_new_tokens=max_new_tokens)
        answers = vlm.answer_encoded(encoded, [question.text for question in questions], options)
        said = [answer.text for answer in answers]
        return Marks([same_answer(one, q.answer) for one, q in zip(said, questions, strict=True)], said)

    return marker


def same_answer(said: str, true: str) -> bool:
    """Whether both are the same words, apart from case, spaces and a final period."""
    one, other = (" ".join(text.casefold().split()).removesuffix(".") for text in (said, true))
    return one == other


def identity(vlm: PrunedVLM) -> str:
    """What tells one model's results from another's: name, version, quantization, number format, layout."""
    version = vlm.revision or Path(vlm.model.config.name_or_path).name
    layout = [] if vlm.layout == "native" else [vlm.layout]
    return " ".join([vlm.name, version, vlm.quantization or "unquantized", str(vlm.dtype), *layout])


Results = dict[tuple[str, ...], tuple[Marks, Kept]]
"""By model, subject, its questions, method and budget."""
LINE_START = b'{"of": ['
"""Of every result, so that an unfinished one can be told from a line of another file."""


def read_results(path: Path) -> tuple[Results, int]:
    """What a file of results holds, and how many of its bytes: a killed process may leave a line unfinished.

    Nothing is written. Raises `InvalidOptionError` for a line that is none, naming it.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    results = dict(_result(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1))
    if rest[: len(LINE_START)] != LINE_START[: len(rest)]:
        raise _no_result(f"{path}, line {len(lines) + 1}")
    return results, sum(len(line) + 1 for line in lines)


def _result(line: bytes, place: str) -> tuple[tuple[str, ...], tuple[Marks, Kept]]:
    try:
        row = json.loads(line)
        marks = Marks([bool(one) for one in row["right"]], row.get("said"))
        return tuple(map(str, row["of"])), (marks, Kept(**row["kept"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _no_result(place) from None


def _no_result(place: str) -> InvalidOptionError:
    return InvalidOptionError(f"{place} is no result of compare.")


class Journal:
    """Results by subject and setting, kept in a file of JSON lines if there is one."""

    def __init__(self, path: Path | None, model: str) -> None:
        self._path = path
        self._model = model
        self._done: Results = {}
        if path is not None and path.exists():
            self._done, finished = read_results(path)
            if finished < path.stat().st_size:
                os.truncate(path, finished)

    def _key(self, subject: Subject, setting: Setting) -> tuple[str, ...]:
        asked = json.dumps([[question.text, question.answer] for question in subject.questions])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        return self._model, subject.name, digest, setting[0], str(setting[1])

    def has(self, subject: Subject, setting: Setting, *, said: bool = False) -> bool:
        """Whether it was asked; with its answers, where they must be `said`."""
        found = self._done.get(self._key(subject, setting))
        return found is not None and (not said or found[0].said is not None)

    def read(self, subject: Subject, setting: Setting) -> tuple[Marks, Kept]:
        return self._done[self._key(subject, setting)]

    def write(self, subject: Subject, setting: Setting, marks: Marks, kept: Kept) -> None:
        key = self._key(subject, setting)
        self._done[key] = marks, kept
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"of": key, **asdict(marks), "kept": asdict(kept)}) + "\n")


@torch.inference_mode()
def _examined(
    vlm: PrunedVLM, subject: Subject, settings: Sequence[Setting], marker: Marker, reader: Reader
) -> Iterator[tuple[Setting, Marks, Kept]]:
    media = subject.media
    reading = reader(vlm._family, media)  # noqa: SLF001 (one reading of the tower serves all settings)
    encoded: dict[Setting, EncodedMedia] = {}

    def encoding(setting: Setting) -> EncodedMedia:
        if setting not in encoded:
            encoded[setting] = _encoded(reading, media, setting)
        return encoded[setting]

    for setting in settings:
        one = encoding(setting)
        reference = one if setting[1] is None else encoding(("prism", setting[1]))
        kept = Kept(
            tokens=one.visual_tokens.kept,
            overlap=overlap(_places(one), _places(reference)),
            coverage=_coverage(reading, one),
            select_ms=one.timings.select_ms,
        )
        yield setting, marker(subject.questions, one), kept


def _encoded(reading: OneReading, media: Picture | Clip, setting: Setting) -> EncodedMedia:
    method, tokens = setting
    if tokens is None:
        request = EncodingRequest((media,))
    else:
        name, options = parsed_method(method)
        request = EncodingRequest((media,), TokenBudget(tokens=tokens), name, options)
    return encode(cast("Family", reading), [request])[0]


def _places(encoded: EncodedMedia) -> set[tuple[int, int]]:
    """(view, raster index) of the kept tokens."""
    return {(view, token) for view, part in enumerate(encoded.token_map) for token in part.kept}


def _coverage(reading: OneReading, encoded: EncodedMedia) -> float:
    """Mean cosine of the dropped patches to the nearest kept one of their view; 1 where none is dropped."""
    nearest = [
        nearest_cosines(one.patches[row], *_parted(group, row, encoded.token_map[place].kept))
        for group, one in zip(reading.pixels, reading.readings, strict=True)
        for row, place in enumerate(group.places)
    ]
    cosines = torch.cat(nearest)
    return float(cosines.mean()) if len(cosines) else 1.0


def _parted(group: Pixels, row: int, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Kept and dropped raster indices of one view, of the part of its grid that the model gets to see."""
    seen = group.region(row).raster(group.grid)
    stay = torch.tensor(kept, dtype=torch.long)
    return stay, seen[~torch.isin(seen, stay)]
