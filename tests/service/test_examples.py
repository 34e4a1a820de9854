"""The commands and the program of docs/api.md, pasted, against a front end with a stand-in for the worker."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.service.conftest import listening

if TYPE_CHECKING:
    from tests.service.conftest import MakeSettings, StandInWorker

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL | re.MULTILINE)
DOCUMENTED = "http://127.0.0.1:8000"


def pasted(language: str) -> list[str]:
    """The page's blocks in `language`; a page without any would test nothing."""
    blocks = [text for name, text in BLOCKS if name == language]
    assert blocks
    assert all(DOCUMENTED in text for text in blocks)
    return blocks


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", pasted("sh"))
async def test_a_pasted_command_is_answered(
    make_settings: MakeSettings, worker: StandInWorker, command: str
) -> None:
    """From the repository's root, where the picture is."""
    del worker
    async with listening(make_settings()) as port:
        here = command.replace(DOCUMENTED, f"http://127.0.0.1:{port}")
        done = await asyncio.to_thread(
            subprocess.run, ["sh", "-c", here], cwd=ROOT, capture_output=True, check=True, timeout=60
        )
    reply = json.loads(done.stdout)
    assert reply.get("answer") == "red" or reply["media_type"] == "image/png", reply


@pytest.mark.parametrize(
    ("asked", "printed"),
    [
        (": 64,", "['red', 'red'] 64\n"),
        (': 64, "timeout_s": 0,', "['red', 'red'] 64\n"),  # 202, and polled for
        (": 0,", "/invalid-budget token_budget: must be a whole number"),
    ],
)
@pytest.mark.parametrize("program", pasted("python"))
@pytest.mark.usefixtures("worker")
async def test_the_pasted_program_prints_its_answers(
    make_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    program: str,
    asked: str,
    printed: str,
) -> None:
    """One for each of its questions, with the budget that it asks for, also later; or what was wrong."""
    monkeypatch.chdir(ROOT)
    async with listening(make_settings()) as port:
        here = program.replace(DOCUMENTED, f"http://127.0.0.1:{port}").replace(": 64,", asked)
        await asyncio.to_thread(exec, here, {})
    assert printed in capsys.readouterr().out
