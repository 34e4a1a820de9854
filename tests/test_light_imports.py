"""What starts often does not import what it does not use."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers")


def heavy_after(script: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter has imported at the end of `script`."""
    code = f"import sys\n{script}\nprint(*({{*{HEAVY}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("import prismprune.cli", id="the command line"),
        pytest.param("import prismprune.demo.cli", id="make serve's check of the demo's cache"),
        pytest.param("import worker.supervisor", id="the worker's supervisor"),
        pytest.param("import service.app", id="the front end"),
    ],
)
def test_starting_loads_no_model_code(script: str) -> None:
    """Torch and transformers take seconds to import: only what computes pays them."""
    assert heavy_after(script) == []
