"""What the benchmarks compute from what they measured."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks._measure import (
    Spread,
    at_least,
    in_turns,
    kept_tokens,
    one_of,
    output_file,
    peak_bytes,
    percentile,
    ratios,
    reset_peak,
    several,
    tail_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("warm_up", [1, 3])
def test_sides_take_turns_and_first_rounds_are_dropped(warm_up: int) -> None:
    """In an order that moves on, so that each side comes first as often as the others."""
    called: list[tuple[str, int]] = []

    def side(name: str, number: int) -> int:
        called.append((name, number))
        return number

    sides = {name: lambda number, name=name: side(name, number) for name in "abc"}
    measured = in_turns(sides, 3, warm_up=warm_up)
    assert measured == {name: list(range(warm_up, warm_up + 3)) for name in "abc"}
    assert [name for name, _ in called[:9]] == [*"abc", *"bca", *"cab"]
    assert [number for _, number in called] == [round_ for round_ in range(warm_up + 3) for _ in "abc"]


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    """In whatever order values come; one value is all three of them."""
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(median=3, q1=2, q3=4)
    assert Spread.of([7]) == Spread(7, 7, 7)
    assert str(Spread(1.23456, 1, 2000)) == "1.23 (1 to 2e+03)"


def test_ratios_are_of_values_that_belong_together() -> None:
    """Not of medians: a slow round is slow on both sides. Sides of other numbers of rounds are refused."""
    assert ratios([2, 40, 6], [1, 10, 3]) == Spread(median=2, q1=2, q3=3)
    with pytest.raises(ValueError, match="zip"):
        ratios([1, 2], [1])


def test_a_percentile_is_one_of_the_values() -> None:
    """Of fewer than a hundred the 99th is the greatest, and has that name."""
    values = list(range(200, 0, -1))
    assert [percentile(values, share) for share in (0, 0.5, 0.99, 1)] == [1, 100, 198, 200]
    assert percentile([3, 9, 6], 0.99) == 9
    assert [tail_name(count) for count in (1, 99, 100)] == ["most", "most", "p99"]


def test_memorys_peak_begins_anew() -> None:
    """What was there before the reset and is gone does not count."""
    cpu = torch.device("cpu")
    held = bytearray(300 * 2**20)
    high = peak_bytes(cpu)
    del held
    reset_peak(cpu)
    assert peak_bytes(cpu) < high - 250 * 2**20


def test_lists_are_told_by_commas() -> None:
    assert several(at_least(1))("1, 8,1") == (1, 8)
    assert several(at_least(0.1))("0.5,2") == (0.5, 2.0)
    assert several(kept_tokens)("all,64") == ("all", "64")
    assert several(one_of(("a", "b")))("b") == ("b",)


REFUSED: list[tuple[Callable[[str], object], str]] = [
    *((several(at_least(1)), text) for text in ("", "1,", "0", "x", "1.5")),
    *((several(kept_tokens), text) for text in ("foo", "-1", "0")),
    *((at_least(0.1), text) for text in ("0", "nan", "inf")),
    (one_of(["a"]), "b"),
]


def test_what_is_no_argument_is_refused() -> None:
    """Before anything is measured."""
    for kind, text in REFUSED:
        with pytest.raises(ArgumentTypeError, match=repr(text.rpartition(",")[2])):
            kind(text)


def test_a_file_is_written_where_there_is_a_folder(tmp_path: Path) -> None:
    assert output_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    assert output_file("new.json") == Path("new.json")
    for place in (tmp_path, tmp_path / "no" / "new.json"):
        with pytest.raises(ArgumentTypeError, match="cannot be written"):
            output_file(str(place))
