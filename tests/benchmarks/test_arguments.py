"""Command lines that cannot be measured are refused before minutes of work."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import engine, geometry, joining, overhead, queueing, stages, waiting
from benchmarks.serving import __main__ as serving
from benchmarks.serving import checkpoint

if TYPE_CHECKING:
    from types import ModuleType

REFUSED = [
    (serving, "--rivals foo"),
    (serving, "--budgets foo"),
    (serving, "--tokens 1"),
    (serving, "--clients 0"),
    (serving, "--waves 0.5"),
    (serving, "--rates 0"),
    (serving, "--json no/such/folder.json"),
    (serving, "--device cuda"),
    (serving, "--cores 9999"),
    (geometry, "--budgets x"),
    (stages, "--budgets 64,x"),
    (engine, "--clients 0"),
    (joining, "--tokens 0"),
    (overhead, "--rounds 0"),
    (waiting, "--tokens 8,4"),
    (queueing, "--fsync sometimes"),
    (queueing, "--jobs 5"),
    (queueing, "--workers 64 --jobs 10239"),
]


@pytest.mark.parametrize(("script", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", value))
def test_a_bad_argument_ends_at_once(
    script: ModuleType, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With argparse's code, and the name of the option."""
    monkeypatch.setattr(sys, "argv", ["script", *words.split()])
    with pytest.raises(SystemExit, match="2"):
        script.parsed()
    assert any(word in capsys.readouterr().err for word in words.split() if word.startswith("--"))


def test_defaults_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for script in {script for script, _ in REFUSED}:
        monkeypatch.setattr(sys, "argv", ["script"])
        script.parsed()


def test_the_checkpoint_has_a_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It took `--help` for a folder."""
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit, match="0"):
        checkpoint.main()
    assert "folder" in capsys.readouterr().out
