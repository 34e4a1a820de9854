"""What each program says of itself: a question for help starts nothing, and makes no key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.keys import main

ROOT = Path(__file__).parents[2]


def said(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("program", ["service", "service.keys", "service.serve", "worker"])
def test_help_is_a_usage_that_names_the_settings(program: str) -> None:
    """Exit code 0, without any setting."""
    done = said(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m {program}")
    assert "docs/settings.md" in done.stdout


@pytest.mark.parametrize("program", ["service", "service.serve", "worker"])
def test_an_unknown_option_starts_nothing(program: str) -> None:
    """Exit code 2, as for a bad setting."""
    done = said(program, "--port=1")
    assert done.returncode == 2
    assert "unrecognized arguments: --port=1" in done.stderr


@pytest.mark.parametrize(
    "argv", [["--name"], ["-x"], ["--", "--name"], ["a b"], ["a:b"], [""], [], ["a", "b"]]
)
def test_a_bad_name_gets_no_key(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One that looks like an option least of all."""
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == 2
    assert "prism_" not in capsys.readouterr().out
