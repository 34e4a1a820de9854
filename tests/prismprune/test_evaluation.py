"""Comparisons: what is asked, what counts as right, what is measured, and that runs resume."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from prismprune import METHODS, InvalidOptionError, PrunedVLM, UnknownMethodError, open_media
from prismprune.cli import app
from prismprune.evaluation.compare import (
    Marks,
    OneReading,
    compare,
    generated,
    identity,
    parsed_method,
    same_answer,
)
from prismprune.evaluation.measures import nearest_cosines, overlap, paired_difference, wilson
from prismprune.evaluation.report import Kept, Report
from prismprune.evaluation.subjects import Question, Subject, read_subjects
from prismprune.media import Picture
from prismprune.vlm import GenerationOptions
from tests.prismprune.tiny import picture, save_tiny_llava

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from prismprune.encoding import EncodedMedia
    from prismprune.families.base import Reading

ALL = ("none", None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> PrunedVLM:
    return PrunedVLM.from_pretrained(checkpoint)


def subject(number: int, *questions: Question) -> Subject:
    asked = questions or (Question("color", "red?", "no"), Question("count", "two?", "yes"))
    return Subject(f"picture {number}", asked, lambda: Picture(picture(number)))


def marked(*marks: bool) -> Any:
    """A marker with the same marks for every setting."""
    return lambda questions, _encoded: Marks(list(marks[: len(questions)]))


def last(reports: Any) -> Report:
    *_, report = reports
    return report


@given(asked=st.integers(1, 500), share=st.floats(0, 1))
def test_the_interval_holds_the_shares_that_the_score_test_accepts(asked: int, share: float) -> None:
    """Both ends solve (share - p)^2 = z^2 p (1 - p) / n, which is how Wilson defines them."""
    right = round(share * asked)
    low, high = wilson(right, asked)
    assert 0 <= low <= right / asked <= high <= 1
    for end in (low, high):
        distance = (right / asked - end) ** 2
        assert math.isclose(distance, 1.959963984540054**2 * end * (1 - end) / asked, abs_tol=1e-9)


def test_no_questions_leave_everything_possible() -> None:
    """Without data the interval is all of it."""
    assert wilson(0, 0) == (0, 1)


def test_overlap_is_the_part_of_the_kept_that_the_reference_keeps() -> None:
    """Three of four are among the reference's; the same index in another view is another token."""
    assert overlap({(0, 1), (0, 2), (1, 1), (1, 3)}, {(0, 1), (0, 2), (1, 3), (1, 2)}) == 0.75
    assert overlap(set(), {(0, 1)}) == 1


@given(st.integers(0, 999))
def test_coverage_is_the_cosine_to_the_nearest_kept_patch(seed: int) -> None:
    """Each dropped patch, by the definition."""
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(9, 3)))
    kept, dropped = [1, 4, 7], [0, 2, 8]
    found = nearest_cosines(features, torch.tensor(kept), torch.tensor(dropped))
    unit = features / features.norm(dim=1, keepdim=True)
    expected = [max(float(unit[i] @ unit[j]) for j in kept) for i in dropped]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_nothing_kept_covers_nothing() -> None:
    """A frame whose budget is zero."""
    nothing = torch.zeros(0, dtype=torch.long)
    assert nearest_cosines(torch.randn(3, 2), nothing, torch.arange(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("said", "true", "same"),
    [("red", "red", True), (" Red. ", "red", True), ("a  b", "A b", True), ("reddish", "red", False)],
)
def test_an_answer_counts_when_it_is_the_true_one(said: str, true: str, same: bool) -> None:
    """Case, spaces and a final period apart."""
    assert same_answer(said, true) == same


def test_a_method_carries_its_options() -> None:
    """Numbers are read as numbers, words as words."""
    written = "prism:pool_factor=all,salient_share=0.25,fps_start=most_isolated"
    expected = {"pool_factor": "all", "salient_share": 0.25, "fps_start": "most_isolated"}
    assert parsed_method(written) == ("prism", expected)
    assert parsed_method("saliency") == ("saliency", {})


@pytest.mark.parametrize("method", ["prism:pool_factor", "prism:best=1", "prism:salient_share=2"])
def test_options_that_are_none_are_refused_before_anything_runs(vlm: PrunedVLM, method: str) -> None:
    """Without a value, unknown, or out of range."""
    with pytest.raises(InvalidOptionError):
        next(compare(vlm, "test", [subject(0)], [(method, 4)]))


def test_an_unknown_method_is_refused_before_anything_runs(vlm: PrunedVLM) -> None:
    """The error of `selector` comes through."""
    with pytest.raises(UnknownMethodError):
        next(compare(vlm, "test", [subject(0)], [("best", 4)]))


def test_questions_are_grouped_by_picture_in_order(tmp_path: Path) -> None:
    """Lines about one picture need not stand together; paths are relative to the file."""
    (tmp_path / "images").mkdir()
    picture(1).save(tmp_path / "images" / "one.png")
    picture(2).save(tmp_path / "two.png")
    rows = [
        {"image": "images/one.png", "question": "a?", "answer": "1"},
        {"image": "two.png", "question": "b?", "answer": "2", "group": "count"},
        {"image": "images/one.png", "question": "c?", "answer": "3"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    first, second = read_subjects(path)
    assert first.questions == (Question("", "a?", "1"), Question("", "c?", "3"))
    assert second.questions == (Question("count", "b?", "2"),)
    assert first.media.size == picture(1).size
    assert [one.name for one in read_subjects(path, limit=1)] == ["images/one.png"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"text"',
        '{"image": "a.png", "question": "?"}',
        '{"image": 1, "question": "", "answer": ""}',
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    """The file's name and the line's number."""
    path = tmp_path / "questions.jsonl"
    path.write_text('{"image": "a.png", "question": "?", "answer": "!"}\n' + line + "\n")
    with pytest.raises(InvalidOptionError, match=r"questions\.jsonl, line 2"):
        list(read_subjects(path))


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """Told from one that is no question."""
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b'\n{"image": "a.png", "question": "\xe4?", "answer": "!"}\n')
    with pytest.raises(InvalidOptionError, match=r"questions\.jsonl, line 2 is not UTF-8"):
        list(read_subjects(path))


def test_a_picture_that_is_missing_is_told_before_the_first_is_asked_about(tmp_path: Path) -> None:
    """By the first line that names it; those beyond the limit need not be there."""
    picture(1).save(tmp_path / "one.png")
    rows = [{"image": name, "question": "?", "answer": "!"} for name in ("one.png", "two.png", "two.png")]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidOptionError, match=r"questions\.jsonl, line 2: there is no file .*two\.png"):
        next(read_subjects(path))
    assert [one.name for one in read_subjects(path, limit=1)] == ["one.png"]


def test_every_method_is_compared_at_every_budget(vlm: PrunedVLM) -> None:
    """Each setting keeps exactly its budget and gets every question of every picture."""
    settings_ = [ALL, *((method, tokens) for method in METHODS for tokens in (8, 3))]
    report = last(compare(vlm, "test", [subject(0), subject(1)], settings_))
    assert list(report.tallies) == settings_
    for (_, budget), tally in report.tallies.items():
        assert [one.tokens for one in tally.kept] == [budget or 16] * 2
        assert tally.questions == 4


def test_answers_are_those_of_the_model(vlm: PrunedVLM) -> None:
    """A question whose true answer is what the model says counts; another does not."""
    said = vlm.answer(picture(0), "red?", token_budget=5, max_new_tokens=16).text
    asked = subject(0, Question("", "red?", said), Question("", "red?", said + "!"))
    report = last(compare(vlm, "test", [asked], [("prism", 5)]))
    assert report.tallies["prism", 5].right.total() == 1


def test_what_is_kept_is_what_the_library_keeps(vlm: PrunedVLM) -> None:
    """One reading of the tower leads to the tokens, features and measures that `encode` gives."""
    encoded: dict[int, EncodedMedia] = {}

    def noted(questions: Sequence[Question], one: EncodedMedia) -> Marks:
        encoded[one.visual_tokens.kept] = one
        return Marks([True] * len(questions))

    report = last(compare(vlm, "test", [subject(3)], [ALL, ("visionzip", 7)], marker=noted))
    expected = vlm.encode(picture(3), 7, method="visionzip")
    assert encoded[7].token_map == expected.token_map
    torch.testing.assert_close(encoded[7].visuals[0].features, expected.visuals[0].features)
    prism = set(vlm.encode(picture(3), 7).token_map[0].kept)
    (kept,) = report.tallies["visionzip", 7].kept
    assert kept.overlap == len(prism & set(expected.token_map[0].kept)) / 7
    assert -1 <= kept.coverage < 1
    (all_kept,) = report.tallies[ALL].kept
    assert (all_kept.overlap, all_kept.coverage) == (1, 1)


def test_the_tower_runs_once_a_picture(vlm: PrunedVLM) -> None:
    """However many settings there are."""
    runs: list[None] = []
    hook = vlm.model.model.vision_tower.register_forward_pre_hook(lambda *_: runs.append(None))
    try:
        settings_ = [ALL, ("prism", 4), ("random", 4), ("divprune", 4)]
        last(compare(vlm, "test", [subject(0), subject(1)], settings_, marker=marked(True, False)))
    finally:
        hook.remove()
    assert len(runs) == 2


class _Opened:
    """Subjects that count how often they are opened."""

    def __init__(self) -> None:
        self.count = 0

    def subject(self, number: int) -> Subject:
        def opened() -> Picture:
            self.count += 1
            return Picture(picture(number))

        return Subject(str(number), subject(number).questions, opened)


def test_what_was_said_is_written_for_any_scorer(vlm: PrunedVLM, tmp_path: Path) -> None:
    """A line a question and setting: all that the question's own line held, the answer, and how it came."""
    picture(0).save(tmp_path / "a.png")
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "question": "red?", "answer": "no", "group": "color", "question_id": 7},
        {"image": "a.png", "question": "two?", "answer": "yes", "said": "not this"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings_, path = [ALL, ("saliency", 4)], tmp_path / "answers.jsonl"
    last(compare(vlm, "q", read_subjects(tmp_path / "q.jsonl"), settings_, answers=path))
    found = [json.loads(line) for line in path.read_text().splitlines()]
    kept = vlm.encode(picture(0), 4, method="saliency")
    options = GenerationOptions(max_new_tokens=16)
    said = [one.text for one in vlm.answer_encoded(kept, [row["question"] for row in rows], options)]
    assert [row["said"] for row in found[2:]] == said
    how = {"method": "saliency", "budget": 4, "kept": 4, "right": False}
    assert found[2:] == [row | how | {"said": one} for row, one in zip(rows, said, strict=True)]
    assert [(row["method"], row["budget"], row["kept"]) for row in found[:2]] == [("none", "all", 16)] * 2


def test_answers_come_from_the_results_where_they_hold_them(vlm: PrunedVLM, tmp_path: Path) -> None:
    """A second run asks nothing; marks without answers, as of packed questions, are asked again."""
    results, answers, asked = tmp_path / "results.jsonl", tmp_path / "answers.jsonl", _Opened()
    for marker, opened in ((marked(True, True), 1), (generated(vlm), 2), (generated(vlm), 2)):
        written = answers if opened == 2 else None
        one = [asked.subject(0)]
        last(compare(vlm, "t", one, [ALL], marker=marker, results=results, answers=written))
        assert asked.count == opened
    first, second = (json.loads(line) for line in answers.read_text().splitlines())
    said = json.loads(results.read_text().splitlines()[-1])["said"]
    assert said == [first["said"], second["said"]]
    assert {"image": "0", "question": "red?", "answer": "no", "group": "color"}.items() <= first.items()


def test_a_run_resumes_where_it_was_cut_off(vlm: PrunedVLM, tmp_path: Path) -> None:
    """Finished pictures are not opened again, half a line is dropped, and the report is the same."""
    path, opened = tmp_path / "results.jsonl", _Opened()
    subjects = [opened.subject(number) for number in range(3)]
    settings_ = [ALL, ("prism", 4)]
    whole = last(compare(vlm, "t", subjects, settings_, marker=marked(True, False), results=path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])
    opened.count = 0
    resumed = last(compare(vlm, "t", subjects, settings_, marker=marked(True, False), results=path))
    assert opened.count == 1
    assert resumed.rows()[0] == whole.rows()[0]
    assert len(path.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    "lines",
    [
        '{"image": "a"}\n',
        "[]\n",
        "{}\n",
        "\n",
        "words",
        '{"image": "a"}',
        '{"of": ["a"], "right": 1, "kept": {}}\n',
    ],
)
@pytest.mark.parametrize("results", [0, 2])
def test_a_file_of_anything_else_is_not_taken_for_results(
    vlm: PrunedVLM, tmp_path: Path, results: int, lines: str
) -> None:
    """The line is named and the file stays as it was, also where its last line has no end."""
    path = tmp_path / "results.jsonl"
    path.touch()
    if results:
        last(compare(vlm, "t", [subject(0)], [ALL, ("prism", 4)], marker=marked(True, True), results=path))
    content = path.read_text() + lines
    path.write_text(content)
    with pytest.raises(InvalidOptionError, match=rf"{path}, line {results + 1} is no result of compare"):
        next(compare(vlm, "t", [subject(0)], [ALL], marker=marked(True, True), results=path))
    assert path.read_text() == content


def test_results_of_other_questions_or_models_are_not_taken_over(vlm: PrunedVLM, tmp_path: Path) -> None:
    """A picture whose questions changed is asked anew; one file may hold several models' results."""
    path = tmp_path / "results.jsonl"
    one, other = subject(0), subject(0, Question("color", "blue?", "no"))
    last(compare(vlm, "t", [one], [ALL], marker=marked(True, True), results=path))
    report = last(compare(vlm, "t", [other], [ALL], marker=marked(False), results=path))
    assert report.tallies[ALL].right.total() == 0
    path.write_text(path.read_text().replace(identity(vlm), "another model"))
    report = last(compare(vlm, "t", [one], [ALL], marker=marked(False, False), results=path))
    assert report.tallies[ALL].right.total() == 0


def filled(pictures: int = 2) -> Report:
    report = Report("test")
    asked = [Question("color", "a?", "red"), Question("color", "a?", "blue"), Question("count", "b?", "2")]
    kept = Kept(tokens=4, overlap=0.5, coverage=0.75, select_ms=2.0)
    for _ in range(pictures):
        report.ask(asked)
        report.tallies[ALL].add(asked, [True, True, False], kept)
        report.tallies["prism", 8].add(asked, [True, False, False], kept)
        report.tallies["prism", 4].add(asked, [False, False, True], kept)
    return report


def test_a_row_holds_the_sums() -> None:
    """Accuracy with its interval, in all and by kind, relative to the unpruned model."""
    row = filled().rows()[1]
    low, high = wilson(2, 6)
    assert row == {
        "method": "prism",
        "budget": 8,
        "pictures": 2,
        "questions": 6,
        "right": 2,
        "accuracy": 1 / 3,
        "low": low,
        "high": high,
        "relative": 0.5,
        "difference": None,
        "difference_low": None,
        "difference_high": None,
        "overlap": 0.5,
        "coverage": 0.75,
        "select_ms": 2.0,
        "accuracy: color": 0.5,
        "accuracy: count": 0.0,
    }


def test_methods_are_compared_with_prism_by_pairs_of_pictures() -> None:
    """One that is right more often by the same about every picture is so for certain."""
    report = filled(pictures=12)
    asked = [Question("color", "a?", "red"), Question("color", "a?", "blue"), Question("count", "b?", "2")]
    kept = report.tallies["prism", 8].kept[0]
    for marks in ([True, True, False], [True, False, True]) * 6:
        report.tallies["random", 8].add(asked, marks, kept)
        report.tallies["random", 4].add(asked, [marks[2], False, False], kept)
        report.tallies["random", 16].add(asked, marks, kept)
    rows = {(row["method"], row["budget"]): row for row in report.rows()}
    even, varied = rows["random", 8], rows["random", 4]
    assert (even["difference"], even["difference_low"], even["difference_high"]) == pytest.approx(
        (1 / 3,) * 3
    )
    assert varied["difference"] == pytest.approx(-1 / 6)
    assert varied["difference_low"] < -1 / 6 < varied["difference_high"]
    assert [rows[setting]["difference"] for setting in (("none", "all"), ("random", 16))] == [None, None]
    assert "+33.3 (+33.3 to +33.3)" in shown(report)


def shown(report: Report) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


def test_the_interval_of_a_difference_holds_it_as_often_as_it_says() -> None:
    """95 times of 100, with answers about one picture that agree, and pictures of unlike many questions."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        asked = rng.integers(4, 12, 120)
        bias = rng.normal(0.0, 0.15, 120)  # of a picture, the same for all of its questions
        right, reference = rng.binomial(asked, np.clip(0.7 + bias, 0, 1)), rng.binomial(asked, 0.6)
        _, low, high = paired_difference(right.tolist(), reference.tolist(), asked.tolist())
        held += low <= 0.1 <= high
    assert 0.91 * 400 <= held <= 0.98 * 400


def test_no_questions_tell_nothing_of_a_difference() -> None:
    """However many pictures there are."""
    assert paired_difference([0] * 12, [0] * 12, [0] * 12) == (0.0, -1.0, 1.0)


@pytest.mark.parametrize("pictures", [1, 2, 9])
def test_few_pictures_tell_nothing_of_a_difference(pictures: int) -> None:
    """How much pictures differ cannot be seen in them, also where they agree."""
    assert paired_difference([3] * pictures, [1] * pictures, [4] * pictures) == (0.5, -1.0, 1.0)


def test_the_interval_of_a_difference_ends_where_differences_do() -> None:
    """Right 11 times of 12 where the other never is: nobody can be more than always right."""
    difference, low, high = paired_difference([1] * 11 + [0], [0] * 12, [1] * 12)
    assert difference == pytest.approx(11 / 12)
    assert 0.7 < low < difference < high == 1.0


def test_the_majority_goes_by_kind_or_by_wording() -> None:
    """Half of the colors are red and every count is 2; of one kind alone, each wording has its own."""
    assert filled().majority == 4 / 6
    report = Report("one kind")
    report.ask([Question("", "a?", "1"), Question("", "a?", "2"), Question("", "b?", "3")])
    assert report.majority == 2 / 3


def test_the_table_as_csv_reads_back(tmp_path: Path) -> None:
    """A header and a line a setting."""
    report = filled()
    report.write_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("none", "all"),
        ("prism", "8"),
        ("prism", "4"),
    ]
    assert float(rows[1]["accuracy: color"]) == 0.5


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    """Accuracy over budget, with the unpruned model as a line; its format follows the ending."""
    filled().write_plot(tmp_path / "plot.png")
    assert open_media(tmp_path / "plot.png").size[0] > 500
    with pytest.raises(InvalidOptionError, match=r"plot\.nothing"):
        filled().write_plot(tmp_path / "plot.nothing")


def write_questions(folder: Path) -> Path:
    for number in range(2):
        picture(number).save(folder / f"{number}.png")
    rows = [{"image": f"{number}.png", "question": "what?", "answer": "it"} for number in range(2)]
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_plot_that_cannot_be_drawn_is_told_before_anything_is_computed(
    checkpoint: Path, tmp_path: Path
) -> None:
    command = ["compare", str(write_questions(tmp_path)), "--model", str(checkpoint), "--budget", "4"]
    results = tmp_path / "r.jsonl"
    ran = CliRunner().invoke(
        app, [*command, "--results", str(results), "--plot", str(tmp_path / "plot.nothing")]
    )
    assert ran.exit_code == 2
    assert "plot.nothing" in ran.stderr
    assert not results.exists()


def test_the_command_compares_and_writes(checkpoint: Path, tmp_path: Path) -> None:
    """One JSON object on standard output; the table as CSV; the results to resume from."""
    command = ["compare", str(write_questions(tmp_path)), "--model", str(checkpoint), "--json"]
    command += ["--method", "prism", "--method", "prism:salient_share=0", "--budget", "4", "--budget", "4"]
    table, results = tmp_path / "tables" / "t.csv", tmp_path / "runs" / "r.jsonl"  # in folders to be made
    answers = tmp_path / "said" / "a.jsonl"
    command += ["--max-new-tokens", "2", "--csv", str(table), "--results", str(results)]
    command += ["--answers", str(answers)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    methods = [(row["method"], row["budget"]) for row in found["settings"]]
    assert methods == [("none", "all"), ("prism", 4), ("prism:salient_share=0", 4)]
    assert (found["suite"], found["pictures"]) == ("asked", 2)
    assert len(results.read_text().splitlines()) == 6
    assert table.read_text().startswith("method,budget,")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["method"] for row in rows].count("prism") == len(rows) / 3
    assert all(isinstance(row["said"], str) for row in rows)


def test_a_plot_that_cannot_be_drawn_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after all questions were answered: matplotlib is an extra."""
    monkeypatch.setattr("prismprune.evaluation.report.find_spec", lambda _: None)
    command = ["compare", str(write_questions(tmp_path)), "--model", str(tmp_path / "none")]
    command += ["--plot", "p.png"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "needs matplotlib" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--method", "best"], "Unknown method"), (["--method", "prism:x=1"], "prism takes")],
)
def test_the_command_refuses_a_bad_method_at_once(tmp_path: Path, options: list[str], message: str) -> None:
    """Before a model is loaded: there is none at that place."""
    command = ["compare", str(write_questions(tmp_path)), "--model", str(tmp_path / "none"), *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert message in done.output


def test_the_command_writes_no_file_over_another(tmp_path: Path) -> None:
    """Answers are written anew: in the place of the results they would end what hours have made."""
    kept = tmp_path / "runs.jsonl"
    kept.write_text("of an earlier run\n")
    command = ["compare", str(write_questions(tmp_path)), "--results", str(kept), "--answers", str(kept)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "a file of their own" in done.output
    assert kept.read_text() == "of an earlier run\n"


@pytest.mark.parametrize("option", ["--results", "--answers", "--csv", "--plot"])
@pytest.mark.parametrize("name", ["itself", "symlink", "hard link"])
def test_the_command_writes_nothing_over_the_questions(tmp_path: Path, option: str, name: str) -> None:
    """By whatever name they are given; nothing is cut off a file without a last line's end either."""
    questions = write_questions(tmp_path)
    questions = questions.rename(tmp_path / "asked.png")  # an ending that a plot may have
    questions.write_text(questions.read_text().rstrip())
    content, target = questions.read_text(), tmp_path / "other.png"
    if name == "symlink":
        target.symlink_to(questions)
    elif name == "hard link":
        target.hardlink_to(questions)
    else:
        target = tmp_path / "." / "asked.png"
    command = ["compare", str(questions), "--model", str(tmp_path / "none"), option, str(target)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "a file of their own" in done.output
    assert questions.read_text() == content


def test_results_that_are_none_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    """There is none at that place."""
    results = tmp_path / "r.jsonl"
    results.write_text('{"image": "a.png"}\n')
    command = ["compare", str(write_questions(tmp_path)), "--model", str(tmp_path / "none")]
    done = CliRunner().invoke(app, [*command, "--results", str(results)])
    assert done.exit_code == 2
    assert done.stderr == f"error: {results}, line 1 is no result of compare.\n"


def test_the_command_refuses_an_empty_file(tmp_path: Path) -> None:
    """Nothing to ask is an error, not an empty table."""
    (tmp_path / "empty.jsonl").write_text("")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "empty.jsonl")])
    assert done.exit_code == 2
    assert "holds no questions" in done.output


def test_a_reader_of_ones_own_replaces_the_scores(vlm: PrunedVLM) -> None:
    """As an ablation does: other attention, other tokens; the features stay those of the tower."""

    class Upside(OneReading):
        def __init__(self, family: Any, media: Any) -> None:
            super().__init__(family, media)
            self.readings = [replace(one, attention=partial(upside, one)) for one in self.readings]

    def upside(one: Reading) -> Tensor:
        return 1 - one.attention()

    kept: list[tuple[int, ...]] = []

    def noted(questions: Sequence[Question], one: EncodedMedia) -> Marks:
        kept.append(one.token_map[0].kept)
        return Marks([True] * len(questions))

    for reader in (OneReading, Upside):
        last(compare(vlm, "t", [subject(0)], [("saliency", 8)], marker=noted, reader=reader))
    assert set(kept[0]) | set(kept[1]) == set(range(16))
