"""`.ci/run` brings what pip cannot, and its tests are not skipped in silence where it could have."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.deploy.conftest import ROOT, program
from tests.present import present

if TYPE_CHECKING:
    from pathlib import Path

MAKE = 'echo "make $* CI=${CI-unset}"'


def ran(programs: Path, **stubs: str) -> list[str]:
    """What `.ci/run` prints on a machine that has nothing but these programs, with CI set."""
    for name, line in (stubs | {"make": MAKE}).items():
        path = programs / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    for name in ("dirname", "timeout"):
        (programs / name).symlink_to(present(shutil.which(name)))
    command = [present(shutil.which("bash")), str(ROOT / ".ci/run")]
    environment = {"PATH": str(programs), "CI": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_a_program_that_is_missing_fails_a_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    """A developer reads what was skipped; there nobody does."""
    monkeypatch.setenv("CI", ci)
    either = (pytest.skip.Exception, pytest.fail.Exception)  # the wrong one would skip this test, too
    with pytest.raises(either, match="apt-get install prometheus") as raised:
        program("no-such-program")
    assert raised.type is outcome


def test_promtool_is_installed_where_it_is_missing(tmp_path: Path) -> None:
    """By root, with apt-get; then whatever is skipped is a failure."""
    *apt, make = ran(tmp_path, id="echo 0", apt_get='echo "apt-get $*"')
    assert [line.split()[-1] for line in apt] == ["update", "prometheus"]
    assert make == "make check test CI=true"


def test_nothing_is_installed_that_is_there(tmp_path: Path) -> None:
    """Not every run needs the network."""
    assert ran(tmp_path, promtool="", id="echo 0", apt_get="echo asked") == ["make check test CI=true"]


@pytest.mark.parametrize(
    "stubs",
    [{"id": "echo 0"}, {"id": "echo 1000", "apt_get": "echo asked"}, {"id": "echo 0", "apt_get": "exit 100"}],
    ids=["no apt-get", "not root", "no network"],
)
def test_a_machine_without_promtool_runs_the_other_tests(tmp_path: Path, stubs: dict[str, str]) -> None:
    """And skips those, as a developer's does."""
    assert ran(tmp_path, **stubs) == ["make check test CI=unset"]
